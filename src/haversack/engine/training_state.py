"""Everything a training step carries from one step to the next, as named tensors and plain values: what a checkpoint holds.

Names: `model.NAME` of a trained parameter (`model.NAME.codes` and so on where it is kept in 8 bits), `master.NAME` of its 32-bit copy, `optimizer.NAME.KEY` of its optimizer states (keys of
nested states joined by dots), `resting.N` how far a layer moved when it last ran, where layers rest, `random.cpu` the state of torch's generator (of other ranks `random.cpu.RANK`). Where a step is spread over
ranks, each has its rows of all tensors but generators and step counts, which the first rank has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
from torch import nn

from haversack.engine.optimizers import MasterWeights
from haversack.engine.rounded_weights import RoundedWeights, rounded_of
from haversack.engine.training_step import TrainingStep
from haversack.errors import CheckpointError

MODEL, MASTER, OPTIMIZER, RANDOM, RESTING = "model", "master", "optimizer", "random.cpu", "resting"


@dataclass(frozen=True)
class TrainingState:
    """`tensors` are the live ones, not copies: they may not change until they are written. `sharded` are the whole shapes of those of which
    this rank has rows."""

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)
    sharded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class SavedState(Protocol):
    """What `restore` reads from. `names` are the saved tensors with their shapes, whole; `read` gives one, or some of its rows."""

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def values(self) -> Mapping[str, Any]: ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor: ...


def state_of(step: TrainingStep) -> TrainingState:
    """The state between two steps. Costs no memory but the generator's few bytes."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, tensor in _kept(step).items():
        tensors[f"{MODEL}.{name}"] = tensor.detach()
    for name, (parameter, is_master) in _optimized(step).items():
        if is_master:
            tensors[f"{MASTER}.{name}"] = parameter.detach()
        for key, value in _flat(_states(step, parameter), f"{OPTIMIZER}.{name}"):
            if isinstance(value, torch.Tensor):
                tensors[key] = value
            else:
                values[key] = value
    if step.resting is not None:
        values |= {f"{RESTING}.{layer}": distance for layer, distance in enumerate(step.resting.distances)}
    shards = step.shards
    tensors[_random_name(step)] = torch.get_rng_state()
    if shards is None:
        return TrainingState(tensors, values)
    whole = {name: tuple(p.shape) for name, p in step.model.named_parameters()}
    sharded = {key: shape for key, tensor in tensors.items() if (shape := _whole_shape(key, tensor, whole))}
    if shards.rank:
        tensors = {key: tensor for key, tensor in tensors.items() if key in sharded or key.startswith(RANDOM)}
    return TrainingState(tensors, values, sharded)


def _whole_shape(key: str, tensor: torch.Tensor, whole: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The whole shape of a tensor that has one number for each of its parameter's; None of others."""
    kind, _, rest = key.partition(".")
    if kind not in (MODEL, MASTER, OPTIMIZER):
        return None
    shape = whole[rest if kind != OPTIMIZER else _owner(rest, whole)]
    return shape if tensor.ndim == len(shape) and tensor.ndim else None


def _random_name(step: TrainingStep) -> str:
    return RANDOM if step.shards is None or not step.shards.rank else f"{RANDOM}.{step.shards.rank}"


def restore(step: TrainingStep, saved: SavedState) -> bool:
    """Put a saved state back, whatever the number of ranks that saved it; whether random numbers go on as they would have (not where this rank
    was not there). One tensor is held twice at a time. Raises CheckpointError where the state is of other parameters."""
    names, values = saved.names, saved.values
    kept, optimized = _kept(step), _optimized(step)
    rows, whole = {}, {name: tuple(p.shape) for name, p in step.model.named_parameters()}
    if step.shards is not None:
        rows = {name: step.shards.rows(p) for name, p in step.model.named_parameters() if p.ndim}
    wanted = {f"{MODEL}.{name}": whole.get(name, tuple(tensor.shape)) for name, tensor in kept.items()}
    wanted |= {f"{MASTER}.{name}": whole[name] for name, (_, is_master) in optimized.items() if is_master}
    found = {name: shape for name, shape in names.items() if name.startswith((f"{MODEL}.", f"{MASTER}."))}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"the checkpoint holds other trained weights than this run: {len(odd)} differ, first {odd[0]!r}; the method, "
            "the rank or the model was changed."
        )
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(saved.read(f"{MODEL}.{name}", rows.get(name)))
        for name, (parameter, is_master) in optimized.items():
            if is_master:
                parameter.copy_(saved.read(f"{MASTER}.{name}", rows.get(name)))
    by_parameter: dict[str, dict[str, Any]] = {}
    for key in [*names, *values]:
        if key.startswith(f"{OPTIMIZER}."):
            name = _owner(key[len(OPTIMIZER) + 1 :], optimized)
            own_rows = rows.get(name) if names.get(key) == whole[name] else None
            value = saved.read(key, own_rows) if key in names else values[key]
            _put(by_parameter.setdefault(name, {}), key[len(OPTIMIZER) + len(name) + 2 :].split("."), value)
    for name, (parameter, _) in optimized.items():
        if name in by_parameter:
            _states(step, parameter).update(by_parameter[name])
    if step.resting is not None:
        count = len(step.resting.distances)
        step.resting.distances = [float(values.get(f"{RESTING}.{layer}", inf)) for layer in range(count)]
        step.resting.rest()
    if (random := _random_name(step)) not in names:
        return False
    torch.set_rng_state(saved.read(random))
    return True


def _trained(step: TrainingStep) -> dict[str, nn.Parameter]:
    trained = {id(parameter) for parameter in step.trained}
    return {name: step.own(p) for name, p in step.model.named_parameters() if id(p) in trained}


def _kept(step: TrainingStep) -> dict[str, torch.Tensor]:
    """What holds the values of the trained weights: themselves, or their codes and scales, as `NAME.codes` and so on."""
    found: dict[str, torch.Tensor] = {}
    codes = {f"{name}.weight": module.rounded.stored for name, module in rounded_of(step.model).items()}
    for name, parameter in _trained(step).items():
        if name in codes:
            found |= {f"{name}.{kind}": tensor for kind, tensor in codes[name].items()}
        else:
            found[name] = parameter
    return found


def _optimized(step: TrainingStep) -> dict[str, tuple[nn.Parameter, bool]]:
    """Name -> the tensor that the optimizer updates, and whether it is a 32-bit copy."""
    wide = {}
    if isinstance(step.optimizer, MasterWeights | RoundedWeights):
        wide = {id(parameter): own for parameter, own in step.optimizer.pairs}
    is_master = isinstance(step.optimizer, MasterWeights)
    return {name: (wide.get(id(p), p), is_master and id(p) in wide) for name, p in _trained(step).items()}


def _states(step: TrainingStep, parameter: nn.Parameter) -> Any:
    """The optimizer's own mapping of one parameter's states."""
    for optimizer in step.optimizer.optimizers:
        if optimizer.holds(parameter):
            return optimizer.state[parameter]
    raise AssertionError("every trained parameter has an optimizer")


def _flat(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        assert isinstance(key, str) and "." not in key, f"optimizer state {key!r} has no plain name"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}.{key}")
        else:
            plain = isinstance(value, torch.Tensor | int | float | bool | str | None)
            assert plain, f"optimizer state {prefix}.{key} is a {type(value).__name__}, which a checkpoint can't hold"
            yield f"{prefix}.{key}", value


def _owner(key: str, optimized: Mapping[str, Any]) -> str:
    """The parameter whose name begins `NAME.KEY`: parameters' names hold dots, so the longest that is one."""
    pieces = key.split(".")
    for count in range(len(pieces) - 1, 0, -1):
        if (name := ".".join(pieces[:count])) in optimized:
            return name
    raise CheckpointError(f"the checkpoint holds optimizer states {key!r} of no trained parameter.")


def _put(state: dict[str, Any], path: list[str], value: Any) -> None:
    for piece in path[:-1]:
        state = state.setdefault(piece, {})
    state[path[-1]] = value
