"""Matrices in AWQ's layout for matrix products ("gemm"): what AutoAWQ writes.

Of a linear `NAME` with `(out, in)` weights of 4 bits in groups: `NAME.qweight`, int32 `(in, out / 8)`; `NAME.qzeros`, int32
`(groups, out / 8)`; `NAME.scales` `(groups, out)`. A word holds eight neighbouring outputs in the order 0, 2, 4, 6, 1, 3, 5,
7, from its lowest bits up. A weight is `(code - zero) * scale`. Source of the method: Lin et al. 2023 (arXiv 2306.00978); of
the layout: the files themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haversack.describe.stored_form import IntegerForm, Read
from haversack.describe.words import unpack_words
from haversack.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from haversack.describe.checkpoint import CheckpointTensor

METHOD = "awq"
SUFFIX = ".qweight"
BITS = 4
PER_WORD = 8

OUTPUTS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word output 0, 1, 2 ... of eight is."""


def check(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModelError for a variant of the layout that is not read."""
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
    if version != "gemm" or bits != BITS:
        raise UnsupportedModelError(
            f"{name!r} is stored by AWQ with {bits!r} bits in the form {version!r}, but 4 bits in the form gemm are read; "
            "name the unquantized checkpoint."
        )


@dataclass(frozen=True)
class AwqForm(IntegerForm):
    """One linear's matrix."""

    columns: int
    bits: int = BITS

    def read_codes(self, start: int, stop: int, read: Read) -> torch.Tensor:
        return self._outputs(self.parts["qweight"], start, stop, read)

    def read_scales(self, start: int, stop: int, read: Read) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        scales = self.parts["scales"]
        chosen = read(scales, [(0, scales.shape[0], 1), (start, stop, 1)]).float().T.contiguous()
        return chosen, self._outputs(self.parts["qzeros"], start, stop, read).int(), None

    def _outputs(self, packed: CheckpointTensor, start: int, stop: int, read: Read) -> torch.Tensor:
        """Codes `(stop - start, length)` of outputs, from words `(length, out / 8)`."""
        import torch

        first = start // PER_WORD
        words = read(packed, [(0, packed.shape[0], 1), (first, -(-stop // PER_WORD), 1)])
        codes = unpack_words(words, BITS, words.shape[1] * PER_WORD).unflatten(1, (-1, PER_WORD))
        ordered = codes[..., torch.tensor(OUTPUTS)].flatten(1)
        return ordered[:, start - first * PER_WORD : stop - first * PER_WORD].T.contiguous()


def form_of(
    base: str, tensors: Mapping[str, CheckpointTensor], config: Mapping[str, Any]
) -> tuple[AwqForm, tuple[int, int]] | None:
    """The form of `base` and the shape `(out, in)` of its matrix, or None where shapes do not agree with the layout."""
    parts = {word: tensors[f"{base}.{word}"] for word in ("qweight", "scales", "qzeros") if f"{base}.{word}" in tensors}
    if len(parts) < 3 or any(len(part.shape) != 2 for part in parts.values()):
        return None
    packed, scales, zeros = parts["qweight"], parts["scales"], parts["qzeros"]
    columns, rows, groups = packed.shape[0], packed.shape[1] * PER_WORD, scales.shape[0]
    sound = (
        packed.dtype == zeros.dtype == "I32"
        and scales.dtype in ("F16", "BF16", "F32")
        and scales.shape == (groups, rows)
        and zeros.shape == (groups, rows // PER_WORD)
        and groups > 0
        and columns % groups == 0
    )
    return (
        (AwqForm(parts, f"AWQ's 4-bit integers in groups of {columns // groups}", columns), (rows, columns))
        if sound
        else None
    )
