"""Matrices in GPTQ's layout: what AutoGPTQ and GPTQModel write.

Of a linear `NAME` with `(out, in)` weights of b bits in groups: `NAME.qweight`, int32 `(in * b / 32, out)`, codes packed along
the inputs; `NAME.scales` `(groups, out)`; `NAME.qzeros`, int32 `(groups, out * b / 32)`; `NAME.g_idx`, int32 `(in,)`, the group
of each input (with activation order these are no runs). The first version of the format stores zero points less one,
the second (`checkpoint_format` "gptq_v2") as they are. A weight is `(code - zero) * scale`. Source of the method: Frantar et
al. 2022 (arXiv 2210.17323); of the layout: the files themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haversack.describe.stored_form import IntegerForm, Read, group_order
from haversack.describe.words import WORD_BITS, num_words, unpack_words
from haversack.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from haversack.describe.checkpoint import CheckpointTensor

METHOD = "gptq"
SUFFIX = ".qweight"

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to stored zero points, by `checkpoint_format`."""


def check(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModelError for a variant of the layout that is not read."""
    form, bits = str(config.get("checkpoint_format", "gptq")), config.get("bits")
    if form not in _FORMATS or bits not in (2, 3, 4, 8):
        raise UnsupportedModelError(
            f"{name!r} is stored by GPTQ with {bits!r} bits in the form {form!r}, but 2, 3, 4 and 8 bits in the forms "
            f"{' and '.join(_FORMATS)} are read; name the unquantized checkpoint."
        )


@dataclass(frozen=True)
class GptqForm(IntegerForm):
    """One linear's matrix."""

    bits: int
    columns: int
    added_to_zeros: int

    def read_codes(self, start: int, stop: int, read: Read) -> torch.Tensor:
        packed = self.parts["qweight"]
        words = read(packed, [(0, packed.shape[0], 1), (start, stop, 1)])
        return unpack_words(words.T.contiguous(), self.bits, self.columns)

    def read_scales(self, start: int, stop: int, read: Read) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        scales, zeros = self.parts["scales"], self.parts["qzeros"]
        num_groups, rows = scales.shape
        chosen = read(scales, [(0, num_groups, 1), (start, stop, 1)]).float().T.contiguous()
        packed = read(zeros, [(0, n, 1) for n in zeros.shape])
        points = unpack_words(packed, self.bits, rows)[:, start:stop].T.int() + self.added_to_zeros
        index = self.parts.get("g_idx")
        order = None if index is None else group_order(read(index, [(0, self.columns, 1)]), num_groups)
        return chosen, points.contiguous(), order


def form_of(
    base: str, tensors: Mapping[str, CheckpointTensor], config: Mapping[str, Any]
) -> tuple[GptqForm, tuple[int, int]] | None:
    """The form of `base` and the shape `(out, in)` of its matrix, or None where shapes do not agree with the layout."""
    parts = {
        word: tensors[f"{base}.{word}"]
        for word in ("qweight", "scales", "qzeros", "g_idx")
        if f"{base}.{word}" in tensors
    }
    if not {"qweight", "scales", "qzeros"} <= parts.keys():
        return None
    packed, scales, zeros, index = (parts.get(word) for word in ("qweight", "scales", "qzeros", "g_idx"))
    assert packed is not None and scales is not None and zeros is not None
    if packed.dtype != "I32" or zeros.dtype != "I32" or len(packed.shape) != 2 or len(scales.shape) != 2:
        return None
    words, rows = packed.shape
    bits = config["bits"]
    if index is not None and len(index.shape) == 1 and index.shape[0]:  # single modules may have bits of their own
        bits = words * WORD_BITS // index.shape[0]
    columns = words * WORD_BITS // bits if bits in (2, 3, 4, 8) else 0
    groups = scales.shape[0]
    sound = (
        columns > 0
        and num_words(columns, bits) == words
        and scales.shape == (groups, rows)
        and scales.dtype in ("F16", "BF16", "F32")
        and zeros.shape == (groups, num_words(rows, bits))
        and (index.shape == (columns,) and index.dtype == "I32" if index is not None else columns % max(1, groups) == 0)
    )
    if not sound or not groups:
        return None
    width = "whole columns" if groups == 1 else f"groups of {-(-columns // groups)}"
    title = f"GPTQ's {bits}-bit integers in {width}"
    added = _FORMATS[config.get("checkpoint_format", "gptq")]
    return GptqForm(parts, title, bits, columns, added), (rows, columns)
