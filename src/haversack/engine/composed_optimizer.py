"""The one optimizer that every option builds: an ordinary `torch.optim.Optimizer` whose state is what the option declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from haversack.describe.checkpoint import dtype_name, torch_dtype
from haversack.errors import UsageError
from haversack.kernels.adamw_codes import adamw_codes_, takes
from haversack.kernels.pieces import piece_starts
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import (
    PIECE_ELEMENTS,
    STEP,
    Moment,
    OptimizerOption,
    Reduced,
    StatePrecision,
    Update,
)
from haversack.parts.optimizer.block_state import BlockState


class ComposedOptimizer(Optimizer):
    """`option` over `params`, one tensor at a time.

    `params` are parameters, or groups that may set hyper-parameters of their own (`lr` and what the option's rule has).
    `matrices` are those inside the layers, which the option is for; all other tensors keep whole states, under AdamW where
    the rule is for matrices alone (its learning rate is in the second group). `lr` replaces the option's; AdamW's beside it
    moves in proportion. `seed` and a parameter's position make the random bases, so that parameters must come in the same order
    after a resume. State dicts hold tensors and numbers alone, and load to the bit. Raises UsageError for sparse gradients and for states
    of another option or shape.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        option: OptimizerOption,
        *,
        matrices: Iterable[nn.Parameter],
        lr: float | None = None,
        seed: int = 0,
    ):
        self.option = option
        self.seed = seed
        self.shared: dict[torch.device, dict[str, torch.Tensor]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        taken = {id(parameter) for parameter in matrices}
        given = list(params)
        asked: list[dict[str, Any]] = [dict(g) if isinstance(g, dict) else {"params": [g]} for g in given]
        if asked and not isinstance(given[0], dict):
            asked = [{"params": given}]
        every = [p for group in asked for p in group["params"]]
        self._largest = max((p.numel() for p in every), default=1)
        factor = 1.0 if lr is None else lr / option.rule.lr
        groups = []
        for group in asked:
            split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for parameter in group.pop("params"):
                split[id(parameter) in taken and parameter.ndim == 2].append(parameter)
            for inner, parameters in split.items():
                if parameters:
                    rule = option.at((2, 2) if inner else (2,), inner=inner).rule
                    defaults = {**rule.defaults(), "largest_elements": self._largest}
                    defaults["lr"] = lr if lr is not None and rule is option.rule else defaults["lr"] * factor
                    groups.append({**defaults, **group, "params": parameters, "inner": inner})
        if not groups:
            raise UsageError("an optimizer was asked for without any parameters to train.")
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter)
        return loss

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """Update one parameter by its gradient, which is left as it is."""
        place = self._place(parameter)
        assert place is not None, "the parameter is another optimizer's"
        number, seed = place
        group = self.param_groups[number]
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise UsageError("a gradient is sparse, but moments are dense; make the embedding with sparse=False.")
        option = self.option.at(tuple(parameter.shape), inner=group["inner"])
        state = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter, group["inner"]))
        step = 1
        if STEP.name in state:
            state[STEP.name] += 1
            step = int(state[STEP.name].item())
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if option.subspace is None:
            self._whole(option, parameter, grad, state, step, group)
        else:
            self._within(option, parameter, grad, state, step, group, seed)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether this optimizer is the parameter's."""
        return self._place(parameter) is not None

    def _whole(
        self,
        option: OptimizerOption,
        parameter: nn.Parameter,
        grad: torch.Tensor,
        state: dict[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
    ) -> None:
        begun = option.rule.begin(grad, state, step, group, parameter)
        target = parameter if parameter.is_contiguous() else parameter.contiguous()
        flat = target.view(-1)
        done = self._compiled(option, flat, grad, state, step, group)
        for piece, update in self._updates(option, grad, state, begun, group, first=done):
            update.apply(flat[piece].view(update.numerator.shape))
        if target is not parameter:
            parameter.copy_(target)

    def _compiled(
        self,
        option: OptimizerOption,
        flat: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
    ) -> int:
        """Update as many numbers as one compiled pass can, whole blocks from the first: of AdamW with moments in 8 or 4 bits; how many it were."""
        precision = option.state
        if type(option.rule) is not AdamW or not isinstance(precision, BlockState):
            return 0
        if not takes(flat, grad, precision.block_size) or "exp_avg_scale" not in state:
            return 0
        tables, beta1, beta2 = self._tables(flat.device), group["beta1"], group["beta2"]
        blocks = len(flat) // precision.block_size
        end = blocks * precision.block_size
        num_bytes = end * precision.bits // 8
        kept = [
            t for name in ("exp_avg", "exp_avg_sq") for t in (state[name][:num_bytes], state[f"{name}_scale"][:blocks])
        ]
        codes = [tables[f"{use} {kind}"].view(-1) for kind in ("signed", "unsigned") for use in ("decode", "encode")]
        root, step_size = (1 - beta2**step) ** -0.5, group["lr"] / (1 - beta1**step)
        numbers = [1 - beta1, beta2, 1 - beta2, root, group["eps"], step_size]
        adamw_codes_(flat[:end], grad.view(-1)[:end], *kept, *codes, numbers, precision.block_size, precision.bits)
        return end

    def _within(
        self,
        option: OptimizerOption,
        parameter: nn.Parameter,
        grad: torch.Tensor,
        state: dict[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
        seed: int,
    ) -> None:
        subspace = option.subspace
        assert subspace is not None
        tall = grad.shape[0] > grad.shape[1]
        grad = grad.T if tall else grad
        if option.state is not None:
            grad = grad.float()
        basis = self._basis(option, grad, state, step, seed)
        reduced = subspace.reduce(grad, basis)
        if subspace.resets_moments:
            step = (step - 1) % subspace.refresh_steps + 1
            if step == 1:
                for moment in option.rule.moments(tuple(reduced.shape)):
                    for name in _names(option, moment):
                        state[name].zero_()
        begun = option.rule.begin(reduced, state, step, group, parameter)
        direction = torch.empty_like(reduced, memory_format=torch.contiguous_format)
        step_size = group["lr"]
        for piece, update in self._updates(option, reduced, state, begun, group):
            direction.view(-1)[piece] = update.direction().view(-1)
            step_size = update.step_size
        if option.residual is None:
            whole = subspace.expand(direction, basis, grad.shape[0])
        else:
            reached = Reduced(subspace, basis, grad, reduced, direction)
            whole = option.residual.combine(reached, state, group["lr"] / step_size if step_size else 0.0)
        Update(whole.T if tall else whole, None, step_size).apply(parameter)

    def _basis(
        self, option: OptimizerOption, grad: torch.Tensor, state: dict[str, torch.Tensor], step: int, seed: int
    ) -> torch.Tensor:
        """The basis as it is stored, or as its seed makes it."""
        subspace = option.subspace
        assert subspace is not None
        moment = subspace.basis_moment(grad.shape[0])
        if moment is None:
            made = subspace.basis(grad, step, seed)
            return made.to(grad.dtype) if made.is_floating_point() else made
        precision = option.precision_of(moment)
        if subspace.refreshes(step, state):
            made = subspace.basis(grad, step, seed)
            if subspace.scalars:
                subspace.refreshed(step, state, self._kept_basis(precision, moment, grad, state).float(), made)
            if precision is None:
                state[moment.name].copy_(made)
            else:
                precision.write(state, self._tables(grad.device), moment, slice(0, prod(moment.shape)), made)
        return self._kept_basis(precision, moment, grad, state)

    def _kept_basis(
        self, precision: StatePrecision | None, moment: Moment, grad: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The basis as it is stored, in the gradient's dtype."""
        if precision is None:
            return state[moment.name]
        found = precision.read(state, self._tables(grad.device), moment, slice(0, prod(moment.shape)))
        return found.view(moment.shape).to(grad.dtype)

    def _updates(
        self,
        option: OptimizerOption,
        grad: torch.Tensor,
        state: dict[str, torch.Tensor],
        begun: Any,
        group: Mapping[str, Any],
        first: int = 0,
    ) -> Iterable[tuple[slice, Update]]:
        """The rule's updates, piece by piece of the flattened gradient from its number `first` on, with moments read before and written
        after."""
        rule, precision = option.rule, option.state
        declared = rule.moments(tuple(grad.shape))
        shared = self._tables(grad.device) if precision is not None else {}
        n = grad.numel()
        flat = grad.reshape(-1)
        length = PIECE_ELEMENTS if rule.elementwise else max(1, n)
        for start in piece_starts(n, length, grad, first):
            piece = slice(start, min(start + length, n))
            shape = (piece.stop - piece.start,) if rule.elementwise else tuple(grad.shape)
            g = flat[piece].view(shape)
            g = g.float() if precision is not None else g
            moments = {}
            for moment in declared:
                if precision is not None and moment.coded:
                    moments[moment.name] = precision.read(state, shared, moment, piece).view(shape)
                elif rule.elementwise:
                    moments[moment.name] = state[moment.name].view(-1)[piece]
                else:
                    moments[moment.name] = state[moment.name]
            update = rule.update(g, moments, begun, group)
            if precision is not None:
                for moment in declared:
                    if moment.coded:
                        precision.write(state, shared, moment, piece, moments[moment.name])
            yield piece, update

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load hyper-parameters and states to the bit. Raises UsageError where they are another option's or shape's."""
        super().load_state_dict({**state_dict, "state": {}})
        every = [p for group in self.param_groups for p in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(every, saved, strict=True):
            loaded = state_dict["state"].get(number)
            if loaded is None:
                continue
            place = self._place(parameter)
            assert place is not None
            fresh = self._new_state(parameter, self.param_groups[place[0]]["inner"])
            found = {k: (v.dtype, tuple(v.shape)) for k, v in loaded.items()}
            wanted = {k: (v.dtype, tuple(v.shape)) for k, v in fresh.items()}
            if found != wanted:
                raise UsageError(
                    f"saved states of parameter {number} are {found}, but {self.option.label} has {wanted}: they are of "
                    "another optimizer or model; begin anew, or choose the optimizer that they were saved by."
                )
            for name, tensor in fresh.items():
                tensor.copy_(loaded[name])
            self.state[parameter] = fresh

    def _new_state(self, parameter: nn.Parameter, inner: bool) -> dict[str, torch.Tensor]:
        declared = self.option.stored(tuple(parameter.shape), dtype_name(parameter.dtype), inner=inner)
        return {
            t.name: torch.zeros(t.shape, dtype=torch_dtype(t.dtype), device="cpu" if t == STEP else parameter.device)
            for t in declared
        }

    def _tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        if device not in self.shared:
            tables = {} if self.option.state is None else self.option.state.shared()
            self.shared[device] = {name: table.to(device) for name, table in tables.items()}
        return self.shared[device]

    def _place(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        """The parameter's group, and its seed; None where it has no place here."""
        if id(parameter) not in self._places:
            position = 0
            for number, group in enumerate(self.param_groups):
                for p in group["params"]:
                    self._places[id(p)] = (number, self.seed + position)
                    position += 1
        return self._places.get(id(parameter))


def _names(option: OptimizerOption, moment: Moment) -> list[str]:
    """Where a moment is stored."""
    if option.state is None or not moment.coded:
        return [moment.name]
    return [tensor.name for tensor in option.state.stored(moment)]
