"""Workloads: what a model shall do, in tokens and users: serve, tune or train.

A workload says nothing of a model or a machine, so it is checked in two steps: the numbers against themselves when it
is made, and against a model's positions with `check_positions`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from haversack.errors import PlanError, UsageError


@dataclass(frozen=True)
class ServeWorkload:
    """Generate `generate_tokens` after prompts of `prompt_tokens`, for `users` sequences at once.

    `prefill_chunk_tokens` None leaves the chunk to the planner; `min_tokens_per_second` is a bound on the sum over
    users. Raises UsageError naming the field, its value and what is allowed.
    """

    task: ClassVar[str] = "serve"

    prompt_tokens: int
    generate_tokens: int
    users: int = 1
    prefill_chunk_tokens: int | None = None
    min_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        _check_count("prompt_tokens", self.prompt_tokens, minimum=1)
        _check_count("generate_tokens", self.generate_tokens, minimum=0)
        _check_count("users", self.users, minimum=1)
        if self.prefill_chunk_tokens is not None:
            _check_count("prefill_chunk_tokens", self.prefill_chunk_tokens, minimum=1)
        speed = self.min_tokens_per_second
        if speed is not None and (
            isinstance(speed, bool) or not isinstance(speed, int | float) or not math.isfinite(speed) or speed <= 0
        ):
            raise UsageError(f"min_tokens_per_second is {speed!r}, but must be a number above zero.")

    @property
    def context_tokens(self) -> int:
        """Positions one user needs: the prompt and everything generated after it."""
        return self.prompt_tokens + self.generate_tokens

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values one user needs: the last generated token is never fed back."""
        return self.prompt_tokens + max(0, self.generate_tokens - 1)

    def prefill_chunks(self, chunk_tokens: int | None = None) -> tuple[int, ...]:
        """Tokens per prefill step: at most `chunk_tokens`, else the workload's own, else the whole prompt at once."""
        step = min(chunk_tokens or self.prefill_chunk_tokens or self.prompt_tokens, self.prompt_tokens)
        full, rest = divmod(self.prompt_tokens, step)
        return (step,) * full + ((rest,) if rest else ())

    def to_dict(self) -> dict[str, Any]:
        """`{"task": "serve", field: value, ...}`, JSON-ready."""
        return {"task": self.task, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServeWorkload:
        """The workload that `to_dict` wrote. Raises PlanError naming a wrong task or field."""
        return _from_dict(cls, data)


PRECISIONS = {
    "fp32": "weights, gradients and optimizer state in 32 bits",
    "bf16": "weights, gradients and optimizer state in 16 bits",
    "autocast": "32 bits kept, products computed in 16",
    "master": "weights and gradients in 16 bits, master weights and optimizer state in 32",
    "rotated8": "as master, products of the layers' linears in 8-bit integers of rotated numbers",
    "int8": "matrices of the layers in 8 bits, other weights and gradients in 16, updates rounded at random instead of master weights",
}
ATTENTIONS = ("sdpa", "eager")
METHODS = ("full", "lora", "qlora", "lq-lora", "peqa", "paca", "side")
WITH_ADAPTERS = ("lora", "qlora", "lq-lora")
PACKED = ("qlora", "lq-lora", "peqa")
"""Methods that round the base to 4 bits."""
ADAPTED = ("query-value", "attention", "linear")
LOSSES = {
    "fp32": "logits widened to 32 bits, as transformers does",
    "native": "logits in the dtype they come in",
    "cut": "logits in blocks, never held together",
}
RECOMPUTATIONS = ("none", "full")
KEPT_OF_RECOMPUTED = {
    "attention": "what attention gives",
    "products": "what attention and products with weights give",
}
"""What a layer that runs again may keep of its first run beside its input, from the least."""
SAVED = {
    "exact": "activations kept for the backward pass as they are",
    "8bit": "activations of layers kept in 8 bits, so that gradients are rounded",
    "fp8": "activations of layers kept as 8-bit floats, so that gradients are rounded",
    "sampled": "some rows of linears' inputs kept, so that gradients of weights are right on average",
    "disk": "activations of layers written to a file and read again",
    "tokens": "three quarters of the tokens run by layers between the first and the last, so that as much less is kept",
    "resting": "half of the layers at rest in each step, without gradients, and activations of all kept in 8 bits",
    "reversible": "layers coupled so that their inputs are found again from the last one's outputs, and none is kept",
}
NEEDS_ALL_WEIGHTS = {
    "sampled": "whose linears are frozen",
    "resting": "whose layers are frozen",
}
LIKELIHOOD = "likelihood"
"""The objective of predicting each next token; others are recipes that compare two answers."""
UPDATES = {
    "step": "all weights once all gradients are there",
    "backward": "each weight as soon as its gradient is there",
}


def recomputation(recompute: str, num_layers: int | None = None) -> dict[int, str]:
    """Layer that runs again -> what it keeps of its first run beside its input (`KEPT_OF_RECOMPUTED`, or nothing: ""), as
    `recompute` says: none, full, full+products, or as in `0-3,7+attention`. Raises UsageError for other words, and for a layer beyond
    `num_layers`, without which `full` names none."""
    if recompute == "none":
        return {}
    found: dict[int, str] = {}
    for piece in recompute.split(",") if isinstance(recompute, str) else [""]:
        named, plus, kept = piece.partition("+")
        first, dash, last = named.partition("-")
        last = last if dash else first
        is_whole = named == "full" and piece == recompute
        numbered = first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**6
        if not (is_whole or numbered) or (plus and kept not in KEPT_OF_RECOMPUTED):
            raise UsageError(
                f"recompute is {recompute!r}, but must be one of {', '.join(RECOMPUTATIONS)}, or layers as in 0-3,7; what they keep may "
                f"follow: {', '.join('+' + name for name in KEPT_OF_RECOMPUTED)}."
            )
        layers = range(num_layers or 0) if is_whole else range(int(first), int(last) + 1)
        found |= dict.fromkeys(layers, kept)
    if num_layers is not None and found and max(found) >= num_layers:
        raise UsageError(f"recompute is {recompute!r}, but the model has {num_layers} layers: 0 to {num_layers - 1}.")
    return found


def name_recomputation(kept: Mapping[int, str], num_layers: int) -> str:
    """What `recomputation` reads: none, full, or ranges of layers, with what they keep."""
    if not kept:
        return "none"
    runs: list[tuple[int, int, str]] = []
    for layer, what in sorted(kept.items()):
        if runs and runs[-1][1:] == (layer - 1, what):
            runs[-1] = (runs[-1][0], layer, what)
        else:
            runs.append((layer, layer, what))

    def name(first: int, last: int, what: str) -> str:
        layers = "full" if last - first + 1 == num_layers else f"{first}-{last}" if last > first else str(first)
        return f"{layers}+{what}" if what else layers

    return ",".join(name(*run) for run in runs)


@dataclass(frozen=True)
class TrainingWorkload:
    """What tuning and training share: steps of `batch_size` sequences of `seq_len` tokens on each rank.

    `accumulation_steps` such batches make one step of the optimizer. `precision` and `optimizer` say which states
    there are (`PRECISIONS`; an optimizer's recipe, which is looked up where a run is planned or begun); `recompute` "full" keeps each layer's input alone and runs the layer again for its
    backward pass, `0-3,7` does so with those layers, `full+products` or `0-3+attention` keep some of what they gave first; `attention` is transformers' name of the attention function; `loss` says which logits there are (`LOSSES`);
    `samples_apart` that rows hold several samples which do not see one another, so that attention has a mask; `update` when weights are
    updated (`UPDATES`); `saved` how activations are kept (`SAVED`). Raises UsageError naming the field, its
    value and what is allowed.
    """

    task: ClassVar[str]

    batch_size: int
    seq_len: int
    accumulation_steps: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    recompute: str = "none"
    attention: str = "sdpa"
    loss: str = "fp32"
    samples_apart: bool = False
    update: str = "step"
    saved: str = "exact"

    def __post_init__(self) -> None:
        _check_count("batch_size", self.batch_size, minimum=1)
        _check_count("seq_len", self.seq_len, minimum=2)
        _check_count("accumulation_steps", self.accumulation_steps, minimum=1)
        _check_choice("precision", self.precision, PRECISIONS)
        recomputation(self.recompute)
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_choice("loss", self.loss, LOSSES)
        _check_choice("update", self.update, UPDATES)
        _check_choice("saved", self.saved, SAVED)
        if self.saved != "exact" and self.precision == "autocast":
            raise UsageError(
                f"saved is {self.saved!r} under precision autocast, whose 16-bit copies of weights would be kept so, too; choose another "
                "precision."
            )
        if self.saved != "exact" and self.recompute != "none":
            raise UsageError(
                f"saved is {self.saved!r} with recompute {self.recompute}, but layers that run again keep nothing; choose one of them."
            )
        if self.update == "backward" and self.accumulation_steps > 1:
            raise UsageError(
                f"update is 'backward' with {self.accumulation_steps} accumulation_steps, but gradients that are dropped as they "
                "come can't be summed; choose update step, or one batch for each step."
            )
        if self.update == "backward" and self.saved == "resting":
            raise UsageError(
                "update is 'backward' with saved 'resting', which looks at weights before and after a step; choose update step."
            )

    @property
    def can_update_in_backward(self) -> bool:
        """Whether weights may be updated during the backward pass."""
        return self.accumulation_steps == 1 and self.saved != "resting"

    @property
    def context_tokens(self) -> int:
        """Positions a sequence needs."""
        return self.seq_len

    def to_dict(self) -> dict[str, Any]:
        """`{"task": task, field: value, ...}`, JSON-ready."""
        return {"task": self.task, **dataclasses.asdict(self)}

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step on one rank."""
        return self.batch_size * self.seq_len * self.accumulation_steps

    @property
    def weights_dtype(self) -> str:
        """The dtype that trained weights are kept in, by safetensors' name."""
        return "F32" if self.precision in ("fp32", "autocast") else "BF16"

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimizer updates 32-bit copies of 16-bit weights."""
        return self.precision in ("master", "rotated8")

    @property
    def updates_in_32_bits(self) -> bool:
        """Whether the optimizer sees each weight in 32 bits, whatever it is kept in."""
        return self.has_master_weights or self.precision == "int8"

    @property
    def state_dtype(self) -> str:
        """The dtype of optimizer states that are kept as floats."""
        return "BF16" if self.precision == "bf16" else "F32"


@dataclass(frozen=True)
class TrainWorkload(TrainingWorkload):
    """Train every weight, from a config or a checkpoint."""

    task: ClassVar[str] = "train"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainWorkload:
        """The workload that `to_dict` wrote. Raises PlanError naming a wrong task or field."""
        return _from_dict(cls, data)


@dataclass(frozen=True)
class TuneWorkload(TrainingWorkload):
    """Tune a checkpoint: all of it (`full`), low-rank adapters beside it, as it is (`lora`) or in 4 bits (`qlora`; `lq-lora`: rounded so
    that base and adapters together begin near it), the scales of a base in 4 bits (`peqa`), `lora_rank` columns of each matrix (`paca`), or a side network that reads its hidden states (`side`).

    `objective` is what is learned: `LIKELIHOOD`, or the recipe of a loss over pairs of answers. `lora_rank` and `lora_targets` (queries and values, the projections around attention, or every linear of the layers) count for adapters
    alone, as does `lora_dropout`, the share of their inputs that is dropped while training. Under `master` precision adapters are kept in 32 bits beside a 16-bit base, and need no copies.
    """

    task: ClassVar[str] = "tune"

    method: str = "lora"
    lora_rank: int = 16
    lora_targets: str = "linear"
    lora_dropout: float = 0.0
    objective: str = LIKELIHOOD

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.lora_dropout
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise UsageError(f"lora_dropout is {share!r}, but must be a share from 0 to below 1, like 0.05.")
        if share and self.method not in WITH_ADAPTERS:
            raise UsageError(
                f"lora_dropout is {share!r} with method {self.method!r}, which has no low-rank adapters; leave it at 0."
            )
        _check_choice("method", self.method, METHODS)
        if self.precision == "int8" and self.method != "full":
            raise UsageError(
                f"precision is 'int8' with method {self.method}, whose weights are frozen; choose method full, or qlora for a base in 4 bits."
            )
        if self.saved in NEEDS_ALL_WEIGHTS and self.method != "full":
            raise UsageError(
                f"saved is {self.saved!r} with method {self.method}, {NEEDS_ALL_WEIGHTS[self.saved]}; choose method full, or keep activations as they are."
            )
        if self.saved == "reversible" and self.lora_dropout:
            raise UsageError(
                f"saved is 'reversible' with lora_dropout {self.lora_dropout}, but layers that are run backwards can't drop at random; leave it at 0."
            )
        _check_choice("lora_targets", self.lora_targets, ADAPTED)
        _check_count("lora_rank", self.lora_rank, minimum=1)
        if self.method == "side" and (self.recompute != "none" or self.saved != "exact"):
            raise UsageError(
                f"method is 'side' with recompute {self.recompute} and saved {self.saved}, but the model's layers keep nothing; leave both out."
            )

    @property
    def needs_all_weights(self) -> bool:
        """Whether what is asked of weights or activations goes with method full alone."""
        return self.precision == "int8" or self.saved in NEEDS_ALL_WEIGHTS

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimizer updates 32-bit copies of 16-bit weights."""
        return super().has_master_weights and self.method == "full"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TuneWorkload:
        """The workload that `to_dict` wrote. Raises PlanError naming a wrong task or field."""
        return _from_dict(cls, data)


Workload = ServeWorkload | TuneWorkload | TrainWorkload


def workload_from_dict(data: Mapping[str, Any]) -> Workload:
    """The workload of whichever task `to_dict` wrote. Raises PlanError for another task, or a wrong field."""
    kinds: tuple[type[Any], ...] = (ServeWorkload, TuneWorkload, TrainWorkload)
    kind = next((kind for kind in kinds if kind.task == data.get("task")), None)
    if kind is None:
        raise PlanError(f"the plan's workload has the task {data.get('task')!r}, which is none of serve, tune, train.")
    return kind.from_dict(data)


def check_positions(workload: Workload, max_positions: int | None, model: str) -> None:
    """Raise UsageError if the workload's context is longer than the positions `model` was made for (None: no limit)."""
    if max_positions is None or workload.context_tokens <= max_positions:
        return
    if isinstance(workload, TrainingWorkload):
        raise UsageError(
            f"sequences of {workload.seq_len} tokens were asked, but {model} has {max_positions} positions; ask for at "
            f"most {max_positions}."
        )
    raise UsageError(
        f"{workload.prompt_tokens} prompt and {workload.generate_tokens} generated tokens need "
        f"{workload.context_tokens} positions, but {model} has {max_positions}; "
        f"ask for at most {max_positions} tokens in all."
    )


def _from_dict(cls: Any, data: Mapping[str, Any]) -> Any:
    fields = dict(data)
    if (task := fields.pop("task", None)) != cls.task:
        raise PlanError(f"the plan's workload has the task {task!r}, but this command reads {cls.task!r}.")
    try:
        return cls(**fields)
    except TypeError as error:
        raise PlanError(f"the plan's workload has wrong fields: {error}.") from None
    except UsageError as error:
        raise PlanError(f"the plan's workload is wrong: {error}") from None


def _check_choice(field: str, value: str, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if value not in names:
        raise UsageError(f"{field} is {value!r}, but must be one of {', '.join(names)}.")


def _check_count(field: str, value: int, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UsageError(f"{field} is {value!r}, but must be a whole number of at least {minimum}.")
