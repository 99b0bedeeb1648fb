"""Slabs: the declared tensors of a layer, preallocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from haversack.describe.site import AttentionSite
from haversack.ledger import StoredTensor

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I32": torch.int32}
    return names[name]


def plain_slabs(site: AttentionSite, batch_size: int, num_tokens: int, dtype: str) -> tuple[StoredTensor, ...]:
    """Keys and values of `num_tokens` slots as they are: `(batch, kv_heads, slots, head_dim)`."""
    leading = (batch_size, site.num_kv_heads, num_tokens)
    return (
        StoredTensor("keys", dtype, (*leading, site.key_head_dim)),
        StoredTensor("values", dtype, (*leading, site.value_head_dim)),
    )


def selection_slabs(site: AttentionSite, batch_size: int, num_tokens: int) -> tuple[StoredTensor, ...]:
    """What each KV head knows of the tokens in its slots: their position and how much attention they were given."""
    shape = (batch_size, site.num_kv_heads, num_tokens)
    return StoredTensor("positions", "I32", shape), StoredTensor("importance", "F32", shape)


def allocate(declared: tuple[StoredTensor, ...], device: str | torch.device) -> dict[str, torch.Tensor]:
    """The declared tensors, zero: a slot that is not written yet is multiplied by a probability of zero.

    Never tensors of inference mode, which could not be written to after a prefill that ran in it.
    """
    import torch

    with torch.inference_mode(False):
        return {t.name: torch.zeros(t.shape, dtype=torch_dtype(t.dtype), device=device) for t in declared}
