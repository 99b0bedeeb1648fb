"""Second moments of the inputs of one layer's products: which products share one, and passes that collect them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from haversack.engine.layers import StreamedModel
from haversack.engine.observe import InputSharing, ProductKey, ProductObserver, SecondMoment, StopForwardError


def batches(num_sequences: int, batch: int) -> list[slice]:
    return [slice(start, min(start + batch, num_sequences)) for start in range(0, num_sequences, batch)]


def watched_parameters(model: StreamedModel, layer: int) -> dict[str, torch.Tensor]:
    """The materialised parameters that the layer's sites are cut from, by name."""
    names = dict.fromkeys(f"{site.module}.{site.parameter}" for site in model.layer_sites(layer))
    return {name: model.module.get_parameter(name) for name in names}


def outside_parameter(model: StreamedModel, which: str) -> tuple[str, torch.Tensor]:
    """Name (under which the site is described) and parameter of the head, materialised."""
    parameter = model.module.get_output_embeddings().weight
    for site in model.outside_sites():
        names = [site.module, *site.tied_modules]
        if any(f"{name}.weight" == model.head_name for name in names):
            return f"{site.module}.{site.parameter}", parameter
    return model.head_name, parameter


@torch.no_grad()
def trace_inputs(
    model: StreamedModel, layer: int, watched: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> InputSharing:
    """Which of the layer's parameters share an input, from one sequence."""
    sharing = InputSharing()
    with ProductObserver(watched, on_input=sharing.see):
        model.run_layer(layer, hidden)
    sharing.forget_inputs()
    return sharing


def moment_rounds(
    sharing: InputSharing, watched: Mapping[str, torch.Tensor], limit_bytes: int, *, one_input_each: bool = False
) -> Iterator[set[ProductKey]]:
    """Sets of products, in order of use, whose second moments together stay within the limit (or are one alone).

    With `one_input_each` no set holds two inputs, but for the experts of one stack.
    """
    chosen: set[ProductKey] = set()
    num_bytes = 0
    for owner in sharing.members:
        parameter = watched[owner]
        if chosen and one_input_each:
            yield chosen
            chosen, num_bytes = set(), 0
        for expert in range(parameter.shape[0]) if parameter.ndim == 3 else [-1]:
            cost = 4 * sharing.in_features[owner] ** 2
            if chosen and num_bytes + cost > limit_bytes:
                yield chosen
                chosen, num_bytes = set(), 0
            chosen.add(ProductKey(owner, expert))
            num_bytes += cost
    if chosen:
        yield chosen


@torch.no_grad()
def collect_moments(
    model: StreamedModel,
    layer: int,
    watched: Mapping[str, torch.Tensor],
    keys: set[ProductKey],
    inputs: Iterable[tuple[slice, torch.Tensor]],
    outputs: torch.Tensor | None,
    stop_after: ProductKey | None = None,
) -> dict[ProductKey, SecondMoment]:
    """Second moments of these products over all inputs.

    The layer's outputs are written where `outputs` is given; forwards end early once `stop_after` has its input.
    """
    moments: dict[ProductKey, SecondMoment] = {}

    def add(key: ProductKey, x: torch.Tensor) -> None:
        if key in keys:
            moments.setdefault(key, SecondMoment(x.shape[1])).add(x)
            if key == stop_after:
                raise StopForwardError

    for part, hidden in inputs:
        try:
            with ProductObserver(watched, on_input=add):
                result = model.run_layer(layer, hidden)
        except StopForwardError:
            continue
        if outputs is not None:
            outputs[part] = result
    return moments


def shared_products(sharing: InputSharing, watched: Mapping[str, torch.Tensor]) -> list[list[ProductKey]]:
    """Products that read the same input, the owner first; one list per expert of a stack."""
    groups = []
    for owner, members in sharing.members.items():
        for expert in range(watched[owner].shape[0]) if watched[owner].ndim == 3 else [-1]:
            groups.append([ProductKey(name, expert) for name in members])
    return groups


def enough_tokens(in_features: int) -> int:
    """Tokens below which an expert's own second moment is not used: a quarter of its rank."""
    return max(1, in_features // 4)


class PooledMoment:
    """Mean of `x x^T` over all experts of a stack, for those that see too few tokens."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.num_tokens = 0

    def add(self, mean: torch.Tensor, num_tokens: int) -> None:
        if self.sum is None:
            self.sum = torch.zeros_like(mean)
        self.sum.add_(mean, alpha=num_tokens)
        self.num_tokens += num_tokens

    def mean(self) -> torch.Tensor:
        assert self.sum is not None, "no expert saw a token"
        return self.sum / self.num_tokens


def rare_expert_note(expert: int, num_tokens: int, enough: int) -> str:
    return (
        f"expert {expert} saw {num_tokens} calibration tokens, fewer than {enough}: the inputs of all experts stand in"
    )
