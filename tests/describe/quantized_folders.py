"""Tiny models whose linears are stored in other tools' layouts, packed here by plain loops from known integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.engine.tiny import tiny_config

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Matrix:
    """What a linear is made of: codes `(out, in)`, scales and zero points `(out, groups)`, the group of each column."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return (self.codes - self.zeros[:, self.groups]).double() * self.scales[:, self.groups].double()


def matrix(
    out_features: int, in_features: int, bits: int, group_size: int, *, symmetric: bool, seed: int, mixed: bool = False
):
    generator = torch.Generator().manual_seed(seed)
    num_groups = in_features // group_size
    codes = torch.randint(1 << bits, (out_features, in_features), generator=generator)
    scales = (torch.rand(out_features, num_groups, generator=generator) / 8 / (1 << bits)).half()
    zeros = torch.full((out_features, num_groups), 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(1, 1 << bits, (out_features, num_groups), generator=generator)
    groups = torch.arange(in_features) // group_size
    if mixed:
        groups = groups[torch.randperm(in_features, generator=generator)]
    return Matrix(codes, scales, zeros, groups)


def words(values: np.ndarray, bits: int) -> torch.Tensor:
    """int32 along the last axis, bit by bit."""
    rows, count = values.shape
    out = np.zeros((rows, -(-count * bits // 32)), dtype=np.uint32)
    for i in range(count):
        for bit in range(bits):
            at = i * bits + bit
            out[:, at // 32] |= ((values[:, i] >> bit) & 1).astype(np.uint32) << np.uint32(at % 32)
    return torch.from_numpy(out.view(np.int32).copy())


def gptq(m: Matrix, bits: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(m.codes.numpy(), bits).T.contiguous(),
        "qzeros": words(m.zeros.T.numpy() - 1, bits),
        "scales": m.scales.T.contiguous(),
        "g_idx": m.groups.int(),
    }


def awq(m: Matrix, bits: int) -> dict[str, torch.Tensor]:
    def packed(values: torch.Tensor) -> torch.Tensor:  # (length, out)
        order = values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1)
        return words(order.numpy(), bits)

    return {"qweight": packed(m.codes.T), "qzeros": packed(m.zeros.T), "scales": m.scales.T.contiguous()}


def packed_integers(m: Matrix, bits: int) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": words(m.codes.numpy(), bits),
        "weight_scale": m.scales.bfloat16(),
        "weight_shape": torch.tensor(m.codes.shape),
    }
    m.scales = m.scales.bfloat16()
    if not bool((m.zeros == 1 << (bits - 1)).all()):
        tensors["weight_zero_point"] = words(m.zeros.T.numpy(), bits).T.contiguous()
    return tensors


def bytes_of_integers(m: Matrix, bits: int) -> dict[str, torch.Tensor]:
    return {"weight": (m.codes - 128).to(torch.int8), "weight_scale": m.scales}


def save_quantized(
    folder: Path,
    pack: Callable[[Matrix, int], dict[str, torch.Tensor]],
    quantization: dict,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    mixed: bool = False,
    family: str = "llama",
) -> dict[str, Matrix]:
    """A tiny model in float16 whose layers' linears are stored by `pack`; the matrices by parameter name."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    config.intermediate_size = 192  # whole groups of 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for seed, name in enumerate(sorted(n for n in tensors if "_proj.weight" in n)):
        rows, columns = tensors.pop(name).shape
        width = min(group_size, columns)
        found[name] = matrix(rows, columns, bits, width, symmetric=symmetric, seed=seed, mixed=mixed)
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{word}": value.contiguous() for word, value in pack(found[name], bits).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return found
