"""Low-rank adapters as peft keeps them: `adapter_config.json` and `adapter_model.safetensors`, written and read.

peft's tensors are `base_model.model.MODULE.lora_A.weight` (our `down`, `(rank, in)`) and `.lora_B.weight` (`up`, `(out, rank)`), scaled by
`lora_alpha / r`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from haversack.describe.checkpoint import Checkpoint
from haversack.engine.adapters import LowRankAdapter
from haversack.errors import CheckpointError
from haversack.formats.output import write_whole
from haversack.formats.safetensors_file import write_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False, None),
}
"""Settings of peft that make another adapter than ours, and the values under which they don't."""


def adapters_of(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Name of the adapted linear -> its adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankAdapter)}


def save_adapter(model: nn.Module, folder: Path, base_model: str) -> None:
    """Write what a model's adapters changed into a folder that `peft.PeftModel.from_pretrained` reads; one tensor at a time. Adapters that did not
    begin at zero are written with twice their rank: less where they began."""
    adapters = adapters_of(model)
    first = next(iter(adapters.values()))
    rank = len(first.change()[1])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(hasattr(a.base, "nf") for a in adapters.values()),
        "target_modules": _targets(model, adapters),
        "inference_mode": True,
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        up, down = adapter.change()
        tensors |= {f"{_PREFIX}{name}{_DOWN}": down, f"{_PREFIX}{name}{_UP}": up}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_whole(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read an adapter of peft's into a model that has adapters at the same places and of the same rank. Raises CheckpointError
    for another kind of adapter, other places or another rank."""
    config = read_adapter_config(folder)
    tensors = Checkpoint.open(folder)
    adapters = adapters_of(model)
    wanted = {f"{_PREFIX}{name}{end}" for name in adapters for end in (_DOWN, _UP)}
    if wanted != set(tensors.tensors):
        odd = sorted(wanted ^ set(tensors.tensors))
        raise CheckpointError(
            f"{folder} adapts other places than were asked: {len(odd)} tensors differ, first {odd[0]!r}; choose lora_targets as it "
            "was made with."
        )
    for name, adapter in adapters.items():
        adapter.scale = _scale(config)
        for parameter, end in ((adapter.down, _DOWN), (adapter.up, _UP)):
            read = tensors.read(f"{_PREFIX}{name}{end}")
            if read.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder} has {list(read.shape)} at {name}{end}, but {list(parameter.shape)} was asked; say --with "
                    f"lora_rank={config['r']}."
                )
            with torch.no_grad():
                parameter.copy_(read)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's config. Raises CheckpointError where it is none, or of a kind that is not plain low-rank."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} has no readable {CONFIG_NAME} of a low-rank adapter.") from None
    if kind != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder} is an adapter of the kind {kind!r}; LORA with a rank and alpha can be read.")
    for name, neutral in _NEUTRAL.items():
        if name in config and config[name] not in neutral:
            raise CheckpointError(f"{folder} has {name}={config[name]!r}, which plain low-rank adapters have not.")
    return config


def _scale(config: Mapping[str, Any]) -> float:
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _targets(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> list[str]:
    """Last names of the adapted linears, where they name these and no others; else their whole names."""
    last = {name.rpartition(".")[2] for name in adapters}
    inside = tuple(f"{name}." for name in adapters)
    others = [name for name, _ in model.named_modules() if name not in adapters and not name.startswith(inside)]
    if any(name.rpartition(".")[2] in last for name in others):
        return sorted(adapters)
    return sorted(last)
