"""Slabs: the declared tensors of a layer, preallocated."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import TYPE_CHECKING

from haversack.describe.site import AttentionSite
from haversack.errors import DoesNotFitError, UsageError
from haversack.ledger import StoredTensor
from haversack.units import format_bytes

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
    """The declared tensors on their tiers, zero: a slot that is not written yet is multiplied by a probability of zero.

    Never tensors of inference mode, which could not be written to after a prefill that ran in it.
    """
    import torch

    with torch.inference_mode(False):
        return {t.name: _room(t, device) for t in declared}


def _room(declared: StoredTensor, device: str | torch.device) -> torch.Tensor:
    import torch

    if declared.tier == "disk" and declared.num_bytes:
        return _room_on_disk(declared)
    if declared.tier == "host":
        if torch.device(device).type == "cpu":
            raise UsageError(
                "main memory is the device here, so that nothing can lie in the host beside it; take the disk."
            )
        device = "cpu"
    return torch.zeros(declared.shape, dtype=torch_dtype(declared.dtype), device=device)


def _room_on_disk(declared: StoredTensor) -> torch.Tensor:
    """A tensor over the pages of a file without a name in the folder of temporary files (`TMPDIR`), gone with the tensor.

    The system may write its pages out and drop them: they are no private memory. Raises DoesNotFitError where the disk has no room.
    """
    import torch

    size = declared.num_bytes
    with tempfile.TemporaryFile(prefix="haversack-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise DoesNotFitError(
                f"{format_bytes(size)} of {declared.name} don't fit into {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a "
                "folder with more room.",
                shortfall_bytes=size,
                owners={"kv": size},
                cheapest_change="set TMPDIR to a folder with more room",
            ) from None
        pages = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(pages, dtype=torch_dtype(declared.dtype)).view(declared.shape)
