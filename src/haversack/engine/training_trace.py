"""One training step traced through the model's own code on tensors without memory, cut into segments at layer borders.

Few layers of each kind run; `compose` strings their segments together to any depth. A segment's bytes are booked by owner: what it adds
for good, and what lives at its highest moment. New architectures need no formula.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from haversack.describe.checkpoint import dtype_name, torch_dtype
from haversack.describe.model import Model
from haversack.describe.skeleton import build_skeleton
from haversack.describe.workload import TrainingWorkload, recomputation
from haversack.engine.adapters import PackedLinear
from haversack.engine.pairs import Pairs
from haversack.engine.profile import layer_kinds, skip_layers_but
from haversack.engine.quiet import quiet_transformers
from haversack.engine.resting_layers import DEFAULT_SHARE, sample_bytes
from haversack.engine.rounded_weights import rounded_of
from haversack.engine.scales import TrainedScales
from haversack.engine.trace import WORKSPACE, OwnedBytes, Segment
from haversack.engine.training_step import TrainingStep, inner_matrices
from haversack.engine.true_values import TrueValues
from haversack.engine.update_trace import TrainedTensor, trace_updates
from haversack.errors import UnsupportedModelError, UsageError
from haversack.ledger import DTYPE_BYTES
from haversack.recipes.base import optimizer_option

ACTIVATIONS, GRADIENTS, LOGITS = "activations", "gradients", "logits and loss"
FORWARD, BACKWARD = "forward", "backward"
EMBED, LOSS, LOSS_BACKWARD, EMBED_BACKWARD = "embed", "loss", "loss backward", "embed backward"


class AttentionError(UsageError):
    """The family has no such attention function."""


@dataclass(frozen=True)
class TrainingTrace:
    """Segments of one micro-step, what the update holds beside them, and what stays.

    `resident_bytes` by owner (weights, packed weights, adapters, master weights) and `trained` are of the whole model,
    all layers; `evaluation` are segments of a pass that saves nothing for a backward pass; `update_bytes` are what the update holds for a moment beside weights, gradients and states; `packed` are the shapes of packed matrices in the order of their packing. `segments` are of the layers that ran; `stands_for[layer]` is the one that speaks for a layer, and
    `drops_like[layer]` the one whose bytes go like its own when the loss is there (the one before the last layer loses its
    output then). `gradients` are the trained tensors that are not at rest; `written` are bytes of activations that a layer that ran keeps on disk.
    """

    num_layers: int
    resident_bytes: Mapping[str, int]
    trained: tuple[TrainedTensor, ...] = field(repr=False)
    update_bytes: int
    packed: tuple[tuple[int, int], ...] = field(repr=False)
    stands_for: Mapping[int, int] = field(repr=False)
    drops_like: Mapping[int, int] = field(repr=False)
    segments: Mapping[str, Segment] = field(repr=False)
    evaluation: Mapping[str, Segment] = field(repr=False)
    written: Mapping[int, int] = field(default_factory=dict, repr=False)
    gradients: tuple[TrainedTensor, ...] = field(default=(), repr=False)

    @property
    def disk_bytes(self) -> int:
        """Of all layers' activations that are kept on disk, at the end of the forward pass."""
        return sum(self.written.get(shown, 0) for shown in self.stands_for.values())

    @property
    def gradient_bytes(self) -> int:
        """Of all trained tensors but those at rest."""
        return sum(DTYPE_BYTES[t.dtype] * prod(t.shape) for t in self.gradients)

    def kept_bytes(self, layer: int) -> int:
        """What a layer's forward pass leaves for its backward pass."""
        segment = self.segments[f"{FORWARD} {self.stands_for[layer]}"]
        return sum(n for owner, n in _changes(segment.start, segment.end).items() if owner.startswith(ACTIVATIONS))

    @property
    def accumulates(self) -> bool:
        """Whether gradients of an earlier batch are there when the micro-step begins."""
        return self.segments[EMBED].start.get(GRADIENTS, 0) > 0


@dataclass(frozen=True)
class Moment:
    """The highest moment of a segment of the whole model: bytes by owner beside what stays (`workspace`: what the
    segment holds for itself)."""

    name: str
    owners: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.owners.values())


def compose(trace: TrainingTrace, others: Mapping[int, TrainingTrace] | None = None) -> list[Moment]:
    """The moments of one micro-step over all layers, in order; layers that `others` names are as it has them."""
    layers = range(trace.num_layers)
    of = {i: (others or {}).get(i, trace) for i in layers}
    first, last = of[0], of[trace.num_layers - 1]
    names = [(EMBED, EMBED, first)]
    names += [(f"{FORWARD} {i}", f"{FORWARD} {of[i].stands_for[i]}", of[i]) for i in layers]
    names += [(LOSS, LOSS, last), (LOSS_BACKWARD, LOSS_BACKWARD, last)]
    names += [(f"{BACKWARD} {i}", f"{BACKWARD} {of[i].stands_for[i]}", of[i]) for i in reversed(layers)]
    names += [(EMBED_BACKWARD, EMBED_BACKWARD, first)]
    moments = []
    held = {GRADIENTS: trace.gradient_bytes if trace.accumulates else 0}
    for name, traced, own_trace in names:
        segment = own_trace.segments.get(traced)
        if segment is None:
            if (
                name == EMBED_BACKWARD
            ):  # a frozen embedding has no backward pass, unless its layer recomputes: as many moments either way
                moments.append(Moment(name, held))
            continue
        own = LOGITS if traced in (LOSS, LOSS_BACKWARD) else WORKSPACE
        at_peak = _changes(segment.start, segment.peak)
        grown = at_peak.pop(GRADIENTS, 0)
        rest = sum(at_peak.values())
        if rest < 0 and held.get(own, 0) + rest < 0:  # what it gives back is the layers'
            own = ACTIVATIONS
        moments.append(Moment(name, _add(held, {GRADIENTS: grown, own: rest})))
        changes = _changes(segment.start, segment.end)
        if traced == LOSS:  # the end of autocast drops every layer's copies of weights
            changes = {owner: n for owner, n in changes.items() if not owner.startswith(ACTIVATIONS)}
            changes[ACTIVATIONS] = sum(_dropped(of[i], i) for i in layers)
        lump: dict[str, int] = {}
        for owner, num_bytes in changes.items():
            kind = ACTIVATIONS if owner.startswith(ACTIVATIONS) else owner
            lump[kind] = lump.get(kind, 0) + num_bytes
        held = _add(held, lump)
    return moments


def compose_evaluation(trace: TrainingTrace) -> list[Moment]:
    """The moments of one batch that is evaluated, over all layers, in order."""
    return compose(replace(trace, segments=trace.evaluation))


def _dropped(trace: TrainingTrace, layer: int) -> int:
    """How a layer's bytes change while the loss is computed."""
    loss, owner = trace.segments[LOSS], f"{ACTIVATIONS} {trace.drops_like[layer]}"
    return loss.end.get(owner, 0) - loss.start.get(owner, 0)


def trace_training(model: Model, workload: TrainingWorkload, *, all_layers: bool = False) -> TrainingTrace:
    """Trace one step of `workload`; with `all_layers`, every layer runs (slow: for checking the composition).

    Takes about a second for layers of any width; allocates nothing. Assumes sequences without padding.
    """
    kinds = _kinds(model, workload)
    shown = set(range(model.num_layers)) if all_layers else {i for same in kinds.values() for i in same}
    shown.add(model.num_layers - 1)
    stands_for = {i: i if i in shown else kinds[i][-1] for i in range(model.num_layers)}
    drops_like = {i: i if i in shown else kinds[i][0] for i in range(model.num_layers)}
    with quiet_transformers():
        skeleton: Any = build_skeleton(model.config, model.name)
        if skeleton.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{model.name} ({model.model_type}) is an encoder-decoder, which is served and not trained here; choose a "
                "decoder-only model."
            )
        skeleton.to(torch_dtype(workload.weights_dtype))
        _set_attention(skeleton, model, workload)
        skip_layers_but(skeleton, model, shown)
        step = TrainingStep(skeleton, model, workload)
    every = _AllLayers(_layers(skeleton, model), stands_for)
    resident = {owner: sum(t.nbytes for t in every.of(tensors)) for owner, tensors in step.residents().items()}
    if workload.has_master_weights:
        resident["master weights"] = 4 * sum(p.numel() for p in every.of(step.trained))
    matrices = {id(p) for p in inner_matrices(skeleton, model)}
    asleep = set() if step.resting is None else {id(p) for p in step.resting.parameters(step.resting.resting)}

    def described(tensors: Sequence[torch.Tensor]) -> tuple[TrainedTensor, ...]:
        return tuple(TrainedTensor(tuple(p.shape), dtype_name(p.dtype), id(p) in matrices) for p in every.of(tensors))

    trained, gradients = described(step.trained), described([p for p in step.trained if id(p) not in asleep])
    shapes = {
        id(m.codes): (len(m.codes), m.in_features)
        for m in skeleton.modules()
        if isinstance(m, PackedLinear | TrainedScales)
    }
    shapes |= {id(m.codes): (m.weight.shape[0], m.weight.shape[1]) for m in rounded_of(skeleton).values()}
    packed = tuple(shapes[id(codes)] for codes in every.of([b for b in skeleton.buffers() if id(b) in shapes]))
    update_bytes = trace_updates(step.optimizer_over, optimizer_option(workload.optimizer), gradients)
    if step.resting is not None:
        awake = [p for p in step.resting.parameters() if id(p) not in asleep]
        update_bytes += sum(sample_bytes(p.numel()) for p in every.of(awake))
    written: dict[int, int] = {}
    segments, evaluation = _run(step, model, sorted(shown), written)
    return TrainingTrace(
        model.num_layers,
        resident,
        trained,
        update_bytes,
        packed,
        stands_for,
        drops_like,
        segments,
        evaluation,
        written,
        gradients,
    )


def _kinds(model: Model, workload: TrainingWorkload) -> dict[int, tuple[int, ...]]:
    """For each layer, the first two that are like it, and recompute, rest or run fewer tokens as it does."""
    recomputed = recomputation(workload.recompute, model.num_layers)
    apart: set[int] = set()
    if workload.saved == "resting":
        apart = set(range(int(DEFAULT_SHARE * model.num_layers)))  # those that rest first: with them a step holds most
    if workload.saved == "tokens":
        apart = {0}
    alike: dict[tuple[int, str | None, bool], list[int]] = {}
    for layer, (first, *_) in layer_kinds(model).items():
        alike.setdefault((first, recomputed.get(layer), layer in apart), []).append(layer)
    return {layer: tuple(sorted(layers)[:2]) for layers in alike.values() for layer in layers}


class _AllLayers:
    """The tensors of all layers from those of the layers that were kept, each speaking for its like, in order."""

    def __init__(self, layers: Mapping[int, nn.Module], stands_for: Mapping[int, int]):
        self._stands_for = stands_for
        self._layer: dict[int, int] = {}
        for index in sorted(set(stands_for.values())):
            for tensor in (*layers[index].parameters(), *layers[index].buffers()):
                self._layer.setdefault(id(tensor), index)

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the kept model in the order of the whole one: before the layers, layer by layer, after them."""
        inside: dict[int, list[torch.Tensor]] = {}
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        for tensor in tensors:
            layer = self._layer.get(id(tensor))
            if layer is None:
                (after if inside else before).append(tensor)
            else:
                inside.setdefault(layer, []).append(tensor)
        for index in sorted(self._stands_for):
            before += inside.get(self._stands_for[index], [])
        return before + after


def _set_attention(skeleton: Any, model: Model, workload: TrainingWorkload) -> None:
    try:
        skeleton.set_attn_implementation(workload.attention)
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise AttentionError(
            f"{model.name} can't run with attention {workload.attention!r} ({reason}); choose another."
        ) from None


def _run(
    step: TrainingStep, model: Model, shown: Sequence[int], written: dict[int, int]
) -> tuple[dict[str, Segment], dict[str, Segment]]:
    """Segments of a micro-step whose model, on meta, is filled with fakes, and of a batch evaluated after it; while gradients
    accumulate, they are there from the micro-step's beginning. What each layer keeps on disk is put into `written`."""
    live = OwnedBytes()
    workload = step.workload
    with FakeTensorMode(), _plain_data(workload.samples_apart), live:
        live.owner = "weights"
        step.model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        step.model.tie_weights()
        ids = torch.zeros(workload.batch_size, workload.seq_len, dtype=torch.int64)
        layers = _layers(step.model, model)
        for layer in shown:
            layers[layer].register_forward_pre_hook(lambda *_, layer=layer: _note_disk(step, written, layer, -1))
            layers[layer].register_forward_hook(lambda *_, layer=layer: _note_disk(step, written, layer, 1))
        for parameter in step.trained:  # before an optimizer's own hooks, which may drop the gradient
            parameter.register_post_accumulate_grad_hook(lambda p: live.assign(p.grad, GRADIENTS))
        if workload.update == "backward":  # its states are there from the second step on
            step.begin(model)
            _make_gradients(step, live)
            live.owner = "update"
            step.update()
        if step.resting is not None:
            step.resting.rest()
        if workload.accumulation_steps > 1:
            _make_gradients(step, live)
        segments = _segments_of_step(step, ids, live, layers, shown)
        for parameter in step.trained:
            parameter.grad = None
        step.model.eval()
        with torch.no_grad():
            evaluation = _segments_of_step(step, ids, live, layers, shown)
    return segments, evaluation


def _note_disk(step: TrainingStep, written: dict[int, int], layer: int, sign: int) -> None:
    """Before (-1) and after a layer runs: what it keeps on disk. A pass that keeps nothing leaves what was noted."""
    if step.on_disk is not None and step.model.training:
        written[layer] = sign * step.on_disk.held_bytes + (written[layer] if sign > 0 else 0)


def _segments_of_step(
    step: TrainingStep, ids: torch.Tensor, live: OwnedBytes, layers: Mapping[int, nn.Module], shown: Sequence[int]
) -> dict[str, Segment]:
    live.cut("before")
    live.segments.clear()
    _one_step(step, ids, live, layers, shown)
    return {segment.name: segment for segment in live.segments}


def _make_gradients(step: TrainingStep, live: OwnedBytes) -> None:
    live.owner = GRADIENTS
    for parameter in step.trained:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def _one_step(
    step: TrainingStep, ids: torch.Tensor, live: OwnedBytes, layers: Mapping[int, nn.Module], shown: Sequence[int]
) -> None:
    """One micro-step, cut where layers begin and end, forward and (where gradients are wanted) backward."""
    handles = []
    entered: list[int] = []

    def enter(layer: int, hidden: torch.Tensor) -> None:
        if layer in entered:
            return  # it runs again, for its backward pass
        _end_forward(live, entered, shown)
        entered.append(layer)
        live.owner = f"{ACTIVATIONS} {layer}"
        before = shown.index(layer) - 1
        if hidden.requires_grad:
            done = f"{BACKWARD} {shown[before + 1]}"
            handles.append(hidden.register_hook(lambda grad: leave(done, shown[before] if before >= 0 else None)))

    def leave(done: str, following: int | None) -> None:
        live.cut(done)
        live.owner = f"{ACTIVATIONS} {following}" if following is not None else EMBED

    def finish(hidden: torch.Tensor) -> None:
        _end_forward(live, entered, shown)
        live.owner = LOGITS
        if hidden.requires_grad:
            handles.append(hidden.register_hook(lambda grad: leave(LOSS_BACKWARD, shown[-1])))

    for layer in shown:
        handles.append(layers[layer].register_forward_pre_hook(_on_input(layer, enter), with_kwargs=True))
    handles.append(layers[shown[-1]].register_forward_hook(_on_output(finish, entered)))
    live.owner = EMBED
    loss = step.loss(ids, positions=ids if step.workload.samples_apart else None, pairs=_pairs(step, ids))
    live.cut(LOSS)
    if loss.requires_grad:
        loss.backward()
    for handle in handles:
        handle.remove()
    if not loss.requires_grad:
        return
    last = live.segments[-1].name
    if last == LOSS:
        name = LOSS_BACKWARD
    elif last == f"{BACKWARD} {shown[0]}":
        name = EMBED_BACKWARD
    else:  # a frozen embedding: the first layer's input asks for no gradient
        name = f"{BACKWARD} {shown[0]}"
    live.cut(name)


def _pairs(step: TrainingStep, ids: torch.Tensor) -> Pairs | None:
    """One pair in each row, where answers are compared."""
    if step.preference is None:
        return None
    reference = torch.zeros(2 * len(ids)) if step.preference.uses_reference else None
    return Pairs(ids, len(ids), reference)


def _end_forward(live: OwnedBytes, entered: Sequence[int], shown: Sequence[int]) -> None:
    live.cut(f"{FORWARD} {entered[-1]}" if entered else EMBED)


def _on_input(layer: int, enter: Any) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _on_output(finish: Any, entered: Sequence[int]) -> Any:
    seen: list[bool] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not seen:
            seen.append(True)
            finish(output[0] if isinstance(output, tuple) else output)

    return hook


def _layers(skeleton: nn.Module, model: Model) -> dict[int, nn.Module]:
    for module in skeleton.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == model.num_layers:
                return dict(enumerate(child))
    raise AssertionError("a described model has a list of its layers")


@contextmanager
def _plain_data(samples_apart: bool) -> Iterator[None]:
    """Code that looks at values sees sequences without padding, one in each row (several with `samples_apart`), and code that asks
    whether it is traced hears no: it must take the way that it takes with real data."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda x: False))
        if samples_apart:
            stack.enter_context(mock.patch(_FIND_SAMPLES, lambda positions: (positions != 1).cumsum(-1)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(TrueValues())
        yield


_FIND_SAMPLES = "transformers.masking_utils.find_packed_sequence_indices"
"""Where transformers sees from positions that rows hold several samples."""


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    rows = {owner: after.get(owner, 0) - before.get(owner, 0) for owner in {**before, **after}}
    return {owner: num_bytes for owner, num_bytes in rows.items() if num_bytes}


def _add(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {owner: one.get(owner, 0) + other.get(owner, 0) for owner in {**one, **other}}
