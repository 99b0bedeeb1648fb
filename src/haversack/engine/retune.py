"""Floats that a packed model keeps, tuned together: scales and norms, by the divergence of the packed model from the unpacked one.

Codes are chosen matrix by matrix; what all their errors do together is seen by the whole model alone. Each row's 16-bit scales (those
above second-level scales, else the groups' own) and each norm get a factor, beginning at 1, that follows the gradient of the
divergence on calibration text. Not a byte is added: scales and norms are rounded to what is stored as they are.

Source: the last stage of Chen et al. 2024 (EfficientQAT, arXiv 2407.11062, section 3.3: step sizes tuned end to end), with norms as in Li et al. 2023 (norm
tweaking, arXiv 2309.02784); differs in the loss, which is the divergence from the unpacked model, and in factors instead of values.

Memory: the whole model in float32 twice, one gradient of it, and the activations of `batch_sequences` sequences.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.layers import matrix_view
from haversack.engine.quiet import quiet_transformers
from haversack.engine.whole import load_whole
from haversack.errors import UsageError
from haversack.parts.weights.base import WeightOption

Packed = Mapping[str, tuple[WeightOption, Mapping[str, torch.Tensor]]]
"""Site id -> option and stored tensors."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RetuneSettings:
    """`epochs` (0 to 100) passes over the text in batches of `batch_sequences` (1 to 64), with Adam's steps of `rate` (above 0, to 0.1) at first, of a
    cosine towards zero. `seed` shuffles."""

    epochs: int = 2
    batch_sequences: int = 4
    rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("epochs", 0 <= self.epochs <= 100, "from 0 to 100"),
            ("batch_sequences", 1 <= self.batch_sequences <= 64, "from 1 to 64"),
            ("rate", 0 < self.rate <= 0.1, "above 0 and at most 0.1"),
        ):
            if not ok:
                raise UsageError(f"retuning: {name} is {getattr(self, name)!r}, but must be {allowed}.")


@dataclass(frozen=True)
class Retuned:
    """`tensors` of every packed site, and the parameters that were not packed and changed (`rest`), in their own dtypes; those given, where
    tuning did not lower the divergence on the text held back: `before` and `after`, nats per token."""

    tensors: dict[str, dict[str, torch.Tensor]]
    rest: dict[str, torch.Tensor]
    before: float
    after: float
    settings: RetuneSettings


def retune(
    model: Model,
    packed: Packed,
    token_ids: torch.Tensor,
    held_back: torch.Tensor,
    *,
    settings: RetuneSettings | None = None,
    progress: Progress | None = None,
) -> Retuned:
    """Scales and norms of less divergence on `token_ids` `(sequences, tokens)`, kept if they have less on `held_back` too.

    Raises UsageError for settings out of range. Sites without 16-bit scales stay as they are.
    """
    settings, tell = settings or RetuneSettings(), progress or (lambda what, done, total: None)
    with quiet_transformers():
        reference = load_whole(model, dtype=torch.float32).eval().requires_grad_(False)
        student = load_whole(model, dtype=torch.float32).eval()
    own = {tensor.name: _DTYPES[tensor.dtype] for tensor in model.rest if tensor.dtype in _DTYPES}
    parameters = dict(student.named_parameters())
    rows = [_Rows(site, parameters, *packed[site.id]) for site in model.weights if site.id in packed]
    norms = [_Norm(n, parameters[n], own[n]) for n in own if n in parameters and parameters[n].ndim == 1]
    factors: list[_Factor] = [*rows, *norms]
    for parameter in parameters.values():
        parameter.requires_grad_(any(factor.parameter is parameter for factor in factors))
    before = _mean_divergence(reference, student, held_back)
    optimizer = torch.optim.Adam([factor.value for factor in factors], lr=settings.rate)
    order = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * -(-len(token_ids) // settings.batch_sequences)
    done = 0
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(token_ids), generator=order).split(settings.batch_sequences):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * (1 + math.cos(math.pi * done / steps)) / 2
            student.zero_grad(set_to_none=True)
            _divergence(reference, student, token_ids[batch]).backward()
            for factor in factors:
                factor.take_gradient()
            optimizer.step()
            for factor in factors:
                factor.apply()
            done += 1
            tell("tuning scales and norms", done, steps)
    tensors = {factor.site.id: factor.stored() for factor in rows}
    rest = {factor.name: (factor.value * factor.before).to(factor.dtype) for factor in norms}
    for factor in factors:
        factor.round_as_stored()
    after = _mean_divergence(reference, student, held_back)
    if not after < before:
        return Retuned({id: dict(tensors) for id, (_, tensors) in packed.items()}, {}, before, before, settings)
    return Retuned(tensors, rest, before, after, settings)


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _divergence(reference: torch.nn.Module, student: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL in nats per token."""
    with torch.no_grad():
        wanted = torch.log_softmax(reference(input_ids=ids, use_cache=False).logits.float(), -1)
    found = torch.log_softmax(student(input_ids=ids, use_cache=False).logits.float(), -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def _mean_divergence(reference: torch.nn.Module, student: torch.nn.Module, token_ids: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float(_divergence(reference, student, row[None])) for row in token_ids) / len(token_ids)


class _Factor(ABC):
    """Something of a model that is multiplied by a tuned `value`."""

    value: torch.Tensor
    parameter: torch.Tensor

    @abstractmethod
    def take_gradient(self) -> None:
        """Set the gradient of `value` from that of what it multiplies."""

    @abstractmethod
    def apply(self) -> None:
        """Write the product into the model."""

    @abstractmethod
    def round_as_stored(self) -> None:
        """Write into the model what will be stored."""


class _Norm(_Factor):
    def __init__(self, name: str, parameter: torch.nn.Parameter, dtype: torch.dtype):
        self.name, self.parameter, self.dtype = name, parameter, dtype
        self.before = parameter.detach().clone()
        self.value = torch.ones_like(self.before)

    def take_gradient(self) -> None:
        if self.parameter.grad is not None:
            self.value.grad = self.parameter.grad * self.before

    def apply(self) -> None:
        self.parameter.data.copy_(self.value * self.before)

    def round_as_stored(self) -> None:
        self.parameter.data.copy_((self.value * self.before).to(self.dtype))


class _Rows(_Factor):
    """A site: factors `(out, pieces)` of its stored scales, one row's columns cut evenly into as many pieces as it has scales, or one factor
    for each row where a transform mixes columns."""

    def __init__(
        self,
        site: WeightSite,
        parameters: Mapping[str, torch.nn.Parameter],
        option: WeightOption,
        tensors: Mapping[str, torch.Tensor],
    ):
        self.option, self.site, self.tensors, self.name = (
            option,
            site,
            tensors,
            option.grid.float_scales if option.grid else None,
        )
        self.parameter = parameters[f"{site.module}.{site.parameter}"]
        alone = replace(option, corrections=())
        shape = (site.out_features, site.in_features)
        self.before = alone.dense(tensors, *shape).float()
        self.corrections = option.dense(tensors, *shape).float() - self.before if option.corrections else None
        of_columns = option.grid is not None and not option.transforms
        self.width = option.grid.scale_columns(site.in_features) if option.grid and of_columns else site.in_features
        self.value = torch.ones(site.out_features, -(-site.in_features // self.width))
        self.apply()

    def _expanded(self) -> torch.Tensor:
        return self.value.repeat_interleave(self.width, 1)[:, : self.site.in_features]

    def take_gradient(self) -> None:
        if self.name is None or self.parameter.grad is None:
            return
        pushed = matrix_view(self.parameter.grad, self.site.module_slice) * self.before
        padding = self.value.shape[1] * self.width - self.site.in_features
        self.value.grad = torch.nn.functional.pad(pushed, (0, padding)).view(*self.value.shape, -1).sum(-1)

    def apply(self) -> None:
        matrix = self._expanded() * self.before
        if self.corrections is not None:
            matrix += self.corrections
        matrix_view(self.parameter, self.site.module_slice).copy_(matrix)

    def round_as_stored(self) -> None:
        matrix_view(self.parameter, self.site.module_slice).copy_(
            self.option.dense(self.stored(), self.site.out_features, self.site.in_features)
        )

    def stored(self) -> dict[str, torch.Tensor]:
        tensors = dict(self.tensors)
        if self.name is not None:
            scales = tensors[self.name]
            limit = torch.finfo(torch.float16).max
            tensors[self.name] = (scales.float() * self.value).clamp_(-limit, limit).half()
        return tensors
