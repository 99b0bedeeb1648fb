"""How scales of groups are stored: 16-bit floats, powers of two in a byte, or small integers under a 16-bit scale.

    f16        2 bytes per group
    e8m0       1 byte per group: 2^(code - 127), as in the OCP microscaling formats (Rouhani et al. 2023, arXiv
               2310.10537); the code 0 is read as 0, for groups of zeros
    s4 s6      second-level scales: signed integers of 4 or 6 bits per group, times one float16 per *superblock* of 256
               columns; the product is rounded to float16, which is what kernels read. At groups of 32 columns and 6 bits
               that is 0.25 bits per weight where f16 takes 0.5.
    u4 u6      the same without a sign, for tables that are symmetric about zero

Layout `scales-v1` of the integers: the codes of a superblock, padded with zeros to a multiple of 4, take `bits * n / 8`
bytes; first n/2 bytes of low nibbles (byte j holds code j and, in its high half, code j + n/2), then for 6 bits n/4
bytes of the two high bits (byte j holds codes j, j + n/4, j + n/2, j + 3n/4 from its low bits up). Signed codes are
stored plus half their range. A row's superblocks follow one another.

Working state is a dictionary of tensors whose first dimension is the row, so that rows can be chosen and replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haversack.ledger import StoredTensor

if TYPE_CHECKING:
    import torch

SUPERBLOCK_COLUMNS = 256
"""Columns under one 16-bit scale."""

LAYOUT = "scales-v1"
"""Name and version of the integers' layout."""

_F16_MAX = 65504.0
_E8M0_BIAS = 127

Tensors = Mapping[str, "torch.Tensor"]


class ScaleCoding(ABC):
    """One way to store scales `(rows, groups)`."""

    largest: float  # the largest magnitude that can be stored

    @abstractmethod
    def stored(self, rows: int, groups: int) -> tuple[StoredTensor, ...]:
        """The tensors that hold the scales of a matrix."""

    @abstractmethod
    def encode(self, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        """Working state whose values are near `wanted` `(rows, groups)`."""

    @abstractmethod
    def values(self, state: Tensors, groups: slice | torch.Tensor | None = None) -> torch.Tensor:
        """float32 scales `(rows, groups)` of a working state, or of some groups of it."""

    @abstractmethod
    def set_group(self, state: Tensors, group: int, wanted: torch.Tensor) -> torch.Tensor:
        """Write what is storable nearest to `wanted` `(rows,)` for one group, others left alone; returns it, float32."""

    @abstractmethod
    def pack(self, state: Tensors) -> dict[str, torch.Tensor]:
        """The stored tensors of a working state."""

    @abstractmethod
    def unpack(self, stored: Tensors, rows: slice | torch.Tensor, groups: int) -> torch.Tensor:
        """float32 scales `(rows, groups)` of some rows, from the stored tensors."""

    def neighbours(self, state: Tensors) -> Iterator[dict[str, torch.Tensor]]:
        """Other states, from which every group may be taken on its own: what rounding all groups at once has missed."""
        yield from ()


@dataclass(frozen=True)
class F16Scales(ScaleCoding):
    """One float16 per group."""

    largest = _F16_MAX

    def stored(self, rows: int, groups: int) -> tuple[StoredTensor, ...]:
        return (StoredTensor("scales", "F16", (rows, groups)),)

    def encode(self, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scales": _to_f16(wanted)}

    def values(self, state: Tensors, groups: slice | torch.Tensor | None = None) -> torch.Tensor:
        return (state["scales"] if groups is None else state["scales"][:, groups]).float()

    def set_group(self, state: Tensors, group: int, wanted: torch.Tensor) -> torch.Tensor:
        state["scales"][:, group] = _to_f16(wanted)
        return state["scales"][:, group].float()

    def pack(self, state: Tensors) -> dict[str, torch.Tensor]:
        return {"scales": state["scales"].contiguous()}

    def unpack(self, stored: Tensors, rows: slice | torch.Tensor, groups: int) -> torch.Tensor:
        return stored["scales"][rows].float()


@dataclass(frozen=True)
class PowerOfTwoScales(ScaleCoding):
    """One exponent per group, in a byte."""

    largest = 2.0**_E8M0_BIAS

    def stored(self, rows: int, groups: int) -> tuple[StoredTensor, ...]:
        return (StoredTensor("scales", "U8", (rows, groups)),)

    def encode(self, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        exponent = torch.log2(wanted.clamp_min(2.0**-_E8M0_BIAS)).round_().add_(_E8M0_BIAS)
        return {"scales": exponent.clamp_(0, 254).to(torch.uint8)}

    def set_group(self, state: Tensors, group: int, wanted: torch.Tensor) -> torch.Tensor:
        state["scales"][:, group] = self.encode(wanted)["scales"]
        return self.values(state, slice(group, group + 1))[:, 0]

    def values(self, state: Tensors, groups: slice | torch.Tensor | None = None) -> torch.Tensor:
        import torch

        codes = state["scales"] if groups is None else state["scales"][:, groups]
        return torch.where(codes == 0, 0.0, torch.exp2(codes.float() - _E8M0_BIAS))

    def pack(self, state: Tensors) -> dict[str, torch.Tensor]:
        return {"scales": state["scales"].contiguous()}

    def unpack(self, stored: Tensors, rows: slice | torch.Tensor, groups: int) -> torch.Tensor:
        return self.values({"scales": stored["scales"][rows]})

    def neighbours(self, state: Tensors) -> Iterator[dict[str, torch.Tensor]]:
        for step in (-1, 1):
            yield {"scales": (state["scales"].short() + step).clamp_(1, 254).to(state["scales"].dtype)}


@dataclass(frozen=True)
class SuperblockScales(ScaleCoding):
    """Integers of `bits` per group under one float16 per superblock of `num_groups` groups."""

    bits: int
    num_groups: int
    signed: bool

    largest = _F16_MAX

    def stored(self, rows: int, groups: int) -> tuple[StoredTensor, ...]:
        blocks = -(-groups // self.num_groups)
        return (
            StoredTensor("scales", "U8", (rows, blocks * self._block_bytes)),
            StoredTensor("superscales", "F16", (rows, blocks)),
        )

    def encode(self, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        grouped = self._blocks(wanted)
        extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        superscales = _to_f16(extreme / (-(1 << (self.bits - 1)) if self.signed else self._high))
        scale = superscales.float()
        codes = torch.where(scale == 0, 0.0, grouped / scale).round_().clamp_(self._low, self._high)
        codes = codes.view(wanted.shape[0], -1)[:, : wanted.shape[1]].to(torch.int8)
        return {"scales": codes.contiguous(), "superscales": superscales.squeeze(-1)}

    def values(self, state: Tensors, groups: slice | torch.Tensor | None = None) -> torch.Tensor:
        import torch

        index = torch.arange(state["scales"].shape[1])
        index = index if groups is None else index[groups]
        scales = state["scales"][:, index].float() * state["superscales"][:, index // self.num_groups].float()
        return _to_f16(scales).float()

    def set_group(self, state: Tensors, group: int, wanted: torch.Tensor) -> torch.Tensor:
        import torch

        scale = state["superscales"][:, group // self.num_groups].float()
        codes = torch.where(scale == 0, 0.0, wanted / scale).round_().clamp_(self._low, self._high)
        state["scales"][:, group] = codes.to(torch.int8)
        return _to_f16(codes * scale).float()

    def pack(self, state: Tensors) -> dict[str, torch.Tensor]:
        import torch
        import torch.nn.functional as F

        blocks = self._blocks(state["scales"].short() - self._low)
        blocks = F.pad(blocks, (0, self._padded - self.num_groups)).to(torch.uint8)
        half, quarter = self._padded // 2, self._padded // 4
        low, high = blocks & 15, blocks >> 4
        packed = [low[..., :half] | low[..., half:] << 4]
        if self.bits == 6:
            parts = high.split(quarter, dim=-1)
            packed.append(parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6)
        return {
            "scales": torch.cat(packed, -1).flatten(1).contiguous(),
            "superscales": state["superscales"].contiguous(),
        }

    def unpack(self, stored: Tensors, rows: slice | torch.Tensor, groups: int) -> torch.Tensor:
        import torch

        superscales = stored["superscales"][rows]
        packed = stored["scales"][rows].view(*superscales.shape, self._block_bytes)
        half = self._padded // 2
        codes = torch.cat([packed[..., :half] & 15, packed[..., :half] >> 4], -1)
        if self.bits == 6:
            high = packed[..., half:]
            codes |= torch.cat([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)], -1)
        values = codes[..., : self.num_groups].float().add_(self._low).mul_(superscales.float()[..., None])
        return _to_f16(values.flatten(1)[:, :groups]).float()

    def neighbours(self, state: Tensors) -> Iterator[dict[str, torch.Tensor]]:
        import torch

        for step in (-1, 1, -2, 2):
            moved = (state["scales"].short() + step).clamp_(self._low, self._high).to(torch.int8)
            yield {"scales": moved, "superscales": state["superscales"]}

    @property
    def _low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def _high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def _padded(self) -> int:
        """Codes per superblock as packed."""
        return -(-self.num_groups // 4) * 4

    @property
    def _block_bytes(self) -> int:
        return self._padded * self.bits // 8

    def _blocks(self, scales: torch.Tensor) -> torch.Tensor:
        """`(rows, blocks, num_groups)`, the last block padded with zeros."""
        import torch.nn.functional as F

        padding = -scales.shape[1] % self.num_groups
        return F.pad(scales, (0, padding)).view(scales.shape[0], -1, self.num_groups)


SCALE_CODINGS = ("f16", "e8m0", "s4", "s6", "u4", "u6")
"""Every coding by name."""


def scale_coding(name: str, group_size: int) -> ScaleCoding:
    """The coding of a name for groups of `group_size` columns (0: whole rows, for f16 and e8m0)."""
    if name == "f16":
        return F16Scales()
    if name == "e8m0":
        return PowerOfTwoScales()
    return SuperblockScales(int(name[1]), SUPERBLOCK_COLUMNS // group_size, name[0] == "s")


def _to_f16(scales: torch.Tensor) -> torch.Tensor:
    import torch

    return scales.clamp(-_F16_MAX, _F16_MAX).to(torch.float16)
