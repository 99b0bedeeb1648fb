"""How a training run is spread over ranks, and the part of a model's config that one rank computes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from haversack.describe.workload import TrainingWorkload, TuneWorkload
from haversack.errors import UsageError

ZERO_STAGES = (0, 1, 2, 3)

_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head")
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Parallelism:
    """Degrees of each kind; their product is the number of ranks.

    `zero` shards over `data * context` ranks: 1 optimizer states, 2 gradients too, 3 weights too (fully sharded data
    parallel). `offload` keeps what is sharded beside the weights on the host. `expert` is cut from `data`. Raises UsageError
    naming what is wrong and what is allowed.
    """

    data: int = 1
    zero: int = 0
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline", "context", "expert"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}, but must be a whole number of at least 1.")
        if self.zero not in ZERO_STAGES or isinstance(self.zero, bool):
            raise UsageError(f"zero is {self.zero!r}, but must be one of {', '.join(map(str, ZERO_STAGES))}.")
        if self.data % self.expert:
            raise UsageError(f"{self.expert} expert-parallel ranks don't divide {self.data} data-parallel ones.")
        if self.offload and not self.zero:
            raise UsageError("offload keeps sharded states on the host, but zero is 0; choose zero 1, 2 or 3.")

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def shards(self) -> int:
        """Ranks over which `zero` shards."""
        return self.data * self.context

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_spread(workload: TrainingWorkload) -> None:
    """Raise UsageError for what is asked of a run that one process alone can do: it looks at whole weights, or at whole gradients."""
    method = workload.method if isinstance(workload, TuneWorkload) else "full"
    if method in ("paca", "peqa", "side"):
        raise UsageError("methods paca, peqa and side are for one process; choose lora or full.")
    if workload.precision == "int8":
        raise UsageError("precision int8 is for one process; choose master.")
    if workload.saved in ("resting", "reversible"):
        raise UsageError(f"saved={workload.saved} is for one process; choose recompute full.")
    if workload.update == "backward":
        raise UsageError("update=backward is for one process; several ranks shard gradients instead.")


def rank_config(config: Mapping[str, Any], parallel: Parallelism, name: str) -> dict[str, Any]:
    """The config of what one tensor-parallel rank computes: its heads, its columns, its rows of the vocabulary. Experts stay: only
    that a rank's share of them is whole is checked. Raises UsageError where a degree does not divide.
    """
    cut: dict[str, Any] = dict(config)
    if parallel.tensor > 1:
        hidden, heads = config.get("hidden_size", config.get("n_embd")), config.get("num_attention_heads")
        if "num_key_value_heads" not in config and heads and "n_head" not in config:
            cut["num_key_value_heads"] = heads
        if "head_dim" not in config and heads and isinstance(hidden, int):
            cut["head_dim"] = hidden // heads
        for key in (*_HEADS, *_WIDTHS):
            value = cut.get(key)
            if not isinstance(value, int):
                continue
            if key == "num_key_value_heads" and value < parallel.tensor and parallel.tensor % value == 0:
                cut[key] = 1  # ranks share a head
                continue
            if value % parallel.tensor:
                raise UsageError(
                    f"{parallel.tensor} tensor-parallel ranks don't divide {key} {value} of {name}; choose a divisor."
                )
            cut[key] = value // parallel.tensor
        if isinstance(cut.get("vocab_size"), int):
            cut["vocab_size"] = -(-cut["vocab_size"] // parallel.tensor)
            cut["pad_token_id"] = None  # it may lie in another rank's rows
    if parallel.expert > 1:
        found = next((key for key in _EXPERTS if isinstance(config.get(key), int)), None)
        if found is None:
            raise UsageError(f"expert parallelism was asked, but {name} has no experts; leave expert at 1.")
        if config[found] % parallel.expert:
            raise UsageError(
                f"{parallel.expert} expert-parallel ranks don't divide the {config[found]} experts of {name}; choose a divisor."
            )
    return cut


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each pipeline stage; earlier stages take what does not divide. Raises UsageError for more stages than
    layers."""
    if stages > num_layers:
        raise UsageError(f"{stages} pipeline stages were asked of {num_layers} layers; ask for at most {num_layers}.")
    each, rest = divmod(num_layers, stages)
    starts = [stage * each + min(stage, rest) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]
