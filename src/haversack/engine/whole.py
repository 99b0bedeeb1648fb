"""A model with all its weights in memory, whatever its checkpoint stores them as; or with all but those that will be packed at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from haversack.describe.assemble import read_parameter
from haversack.describe.checkpoint import Checkpoint, torch_dtype
from haversack.describe.model import Model
from haversack.engine.adapters import ReadMatrix, whole_linears
from haversack.engine.layers import StreamedModel, materialize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_whole(
    described: Model, *, dtype: torch.dtype | Literal["auto"] = "auto", attention: str = "sdpa"
) -> PreTrainedModel:
    """The model of a described folder: by transformers, or, where tensors are stored in a form of their own, read here, so
    that no other library is needed and the values are those that everything else is made from."""
    from transformers import AutoModelForCausalLM

    assert described.folder is not None, "weights lie in a folder"
    checkpoint = Checkpoint.open(described.folder)
    if not checkpoint.forms:
        return AutoModelForCausalLM.from_pretrained(described.folder, dtype=dtype, attn_implementation=attention)
    own = torch_dtype(described.dtype) if dtype == "auto" else dtype
    streamed = StreamedModel(described, checkpoint, own)
    materialize(streamed, streamed.module.state_dict().keys())
    streamed.module.to(dtype=own)  # type: ignore[call-arg]
    streamed.module.config.dtype = own
    streamed.module.set_attn_implementation(attention)
    for parameter in streamed.module.parameters():
        parameter.requires_grad_(True)
    return streamed.module


def load_to_pack(described: Model, *, dtype: torch.dtype, attention: str) -> tuple[PreTrainedModel, ReadMatrix]:
    """The model of a described folder without the linears of its layers, which stay on meta, and what reads one of these: so that packing
    them never holds two. For models whose `reads_one_by_one`."""
    assert described.folder is not None, "weights lie in a folder"
    streamed = StreamedModel(described, Checkpoint.open(described.folder), dtype)
    left = {f"{site.module}.weight" for site, _ in whole_linears(streamed.module, described)}
    materialize(streamed, [name for name in streamed.module.state_dict() if name not in left])
    streamed.module.set_attn_implementation(attention)

    def read(name: str) -> torch.Tensor:
        path, _, parameter = name.rpartition(".")
        return read_parameter(streamed.checkpoint, described, path, parameter).to(dtype)

    return streamed.module, read
