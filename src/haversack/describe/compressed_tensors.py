"""Matrices in the compressed-tensors format: what llmcompressor writes and vLLM reads.

Of a linear `NAME` with `(out, in)` weights, `NAME.weight_scale` `(out, groups)`, `(out, 1)` or `(1,)`, and

    pack-quantized    `NAME.weight_packed`, int32 `(out, in * b / 32)`, `NAME.weight_shape`, int64 `(2,)`, and, if asymmetric,
                      `NAME.weight_zero_point`, int32 `(out * b / 32, groups)`, packed along the outputs; all codes and zero
                      points plus half their range; with activation order `NAME.weight_g_idx`, the group of each input
    int-quantized     `NAME.weight`, int8 `(out, in)`, and, if asymmetric, `NAME.weight_zero_point`, int8
    float-quantized   `NAME.weight`, float8 `(out, in)`

A weight is `(code - zero) * scale`. Scales of activations are left aside: they say how a kernel rounds inputs. Source:
github.com/vllm-project/compressed-tensors, and the files themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haversack.describe.stored_form import IntegerForm, Range, Read, StoredForm, group_order
from haversack.describe.words import MAX_BITS, WORD_BITS, num_words, unpack_words
from haversack.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from haversack.describe.checkpoint import CheckpointTensor

METHOD = "compressed-tensors"
SUFFIX = ".weight_scale"
PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
FORMATS = (PACK, INT, FLOAT, "naive-quantized", "mixed-precision", "dense")

_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "weight")
_FLOATS = ("F16", "BF16", "F32")


def check(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModelError for a format, or a sparsity, that is not read."""
    groups = config.get("config_groups")
    named = [config.get("format")]
    if isinstance(groups, Mapping):
        named += [group.get("format") for group in groups.values() if isinstance(group, Mapping)]
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        named.append(sparsity["format"])
    foreign = [form for form in named if form is not None and form not in FORMATS]
    if foreign:
        raise UnsupportedModelError(
            f"{name!r} is stored by compressed-tensors as {foreign[0]!r}, but {', '.join(FORMATS[:3])} are read; name the "
            "unquantized checkpoint."
        )


@dataclass(frozen=True)
class PackedForm(IntegerForm):
    """One linear's matrix, integers in words."""

    bits: int
    columns: int

    def read_codes(self, start: int, stop: int, read: Read) -> torch.Tensor:
        packed = self.parts["weight_packed"]
        return unpack_words(read(packed, [(start, stop, 1), (0, packed.shape[1], 1)]), self.bits, self.columns)

    def read_scales(self, start: int, stop: int, read: Read) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        import torch

        rows = self.parts["weight_packed"].shape[0]
        scales = _scales(self.parts["weight_scale"], rows, start, stop, read)
        zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.int32)
        points, index = self.parts.get("weight_zero_point"), self.parts.get("weight_g_idx")
        if points is not None:
            words = read(points, [(0, n, 1) for n in points.shape]).T.contiguous()
            zeros = unpack_words(words, self.bits, rows)[:, start:stop].T.int().contiguous()
        order = None if index is None else _order(read(index, [(0, self.columns, 1)]), scales.shape[1])
        return scales, zeros, order


@dataclass(frozen=True)
class Int8Form(IntegerForm):
    """One linear's matrix, an integer per byte."""

    columns: int
    bits: int = 8

    def read_codes(self, start: int, stop: int, read: Read) -> torch.Tensor:
        import torch

        signed = read(self.parts["weight"], [(start, stop, 1), (0, self.columns, 1)])
        return signed.view(torch.uint8) ^ 128  # plus half the range

    def read_scales(self, start: int, stop: int, read: Read) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        import torch

        rows = self.parts["weight"].shape[0]
        scales = _scales(self.parts["weight_scale"], rows, start, stop, read)
        zeros = torch.full(scales.shape, 128, dtype=torch.int32)
        if (points := self.parts.get("weight_zero_point")) is not None:
            zeros = zeros + _scales(points, rows, start, stop, read).int()
        index = self.parts.get("weight_g_idx")
        order = None if index is None else _order(read(index, [(0, self.columns, 1)]), scales.shape[1])
        return scales, zeros, order


@dataclass(frozen=True)
class Float8Form(StoredForm):
    """One linear's matrix, a float per byte."""

    def region(self, ranges: Sequence[Range], read: Read) -> torch.Tensor:
        (start, stop, step), columns = ranges
        weight = self.parts["weight"]
        scales = _scales(self.parts["weight_scale"], weight.shape[0], start, stop, read)
        values = read(weight, [(start, stop, 1), (0, weight.shape[1], 1)]).float()
        scaled = values.unflatten(1, (scales.shape[1], -1)).mul_(scales.unsqueeze(-1)).flatten(1)
        return scaled[::step, slice(*columns)]


def form_of(
    base: str, tensors: Mapping[str, CheckpointTensor], read: Read
) -> tuple[StoredForm, tuple[int, int]] | None:
    """The form of `base` and the shape `(out, in)` of its matrix, or None where shapes do not agree with the layout."""
    parts = {word: tensors[f"{base}.{word}"] for word in _PARTS if f"{base}.{word}" in tensors}
    scales, points = parts["weight_scale"], parts.get("weight_zero_point")
    packed, weight = parts.get("weight_packed"), parts.get("weight")
    if packed is not None and weight is None:
        shape, bits = _packed_shape(packed, parts.get("weight_shape"), read)
    elif weight is not None and packed is None and len(weight.shape) == 2:
        shape, bits = (weight.shape[0], weight.shape[1]), 8
    else:
        return None
    rows, columns = shape
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    ordered = "weight_g_idx" not in parts or parts["weight_g_idx"].shape == (columns,)
    sound = scales.dtype in _FLOATS and scales.shape in ((rows, groups), (1,), (1, 1), ())
    if not (bits and sound and ordered and groups > 0 and columns and columns % groups == 0):
        return None
    width = f"groups of {columns // groups}" if groups > 1 else "whole rows"
    if packed is not None:
        stored_points = points is None or (points.dtype, points.shape) == ("I32", (num_words(rows, bits), groups))
        title = f"compressed-tensors' {bits}-bit integers in {width}"
        return (PackedForm(parts, title, bits, columns), shape) if stored_points else None
    assert weight is not None
    if weight.dtype == "I8" and (points is None or (points.dtype == "I8" and points.shape == scales.shape)):
        return Int8Form(parts, f"compressed-tensors' 8-bit integers in {width}", columns), shape
    if weight.dtype == "F8_E4M3" and (points is None or "zero_point" in points.name):
        return Float8Form(parts, f"compressed-tensors' 8-bit floats in {width}"), shape
    return None


def _packed_shape(packed: CheckpointTensor, shape: CheckpointTensor | None, read: Read) -> tuple[tuple[int, int], int]:
    """The matrix's shape, which is data of its own, and bits per code; 0 bits where they contradict each other."""
    if packed.dtype != "I32" or len(packed.shape) != 2 or shape is None:
        return (0, 0), 0
    if (shape.dtype, shape.shape) not in (("I64", (2,)), ("I32", (2,))):
        return (0, 0), 0
    rows, columns = (int(n) for n in read(shape, [(0, 2, 1)]))
    words = packed.shape[1]
    bits = words * WORD_BITS // columns if columns > 0 else 0
    sound = rows == packed.shape[0] and 1 <= bits <= MAX_BITS and num_words(columns, bits) == words
    return ((rows, columns), bits) if sound else ((0, 0), 0)


def _scales(scales: CheckpointTensor, rows: int, start: int, stop: int, read: Read) -> torch.Tensor:
    """float32 `(stop - start, groups)`; one number for all rows is repeated."""
    if len(scales.shape) == 2 and scales.shape[0] == rows:
        return read(scales, [(start, stop, 1), (0, scales.shape[1], 1)]).float()
    return read(scales, [(0, n, 1) for n in scales.shape]).float().reshape(1, 1).repeat(stop - start, 1)


def _order(index: torch.Tensor, num_groups: int) -> torch.Tensor | None:
    """None also where the index was never filled (llmcompressor writes -1 then)."""
    return None if bool((index < 0).any()) else group_order(index, num_groups)
