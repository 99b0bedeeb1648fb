"""Every byte has an owner: declared tensors, and bytes per time point, resident and tier.

This is what predictions are made of and what measurements are compared with. Nothing here imports torch: a plan from a
config alone must stay instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

TIERS = ("device", "host", "disk")
"""Where bytes lie. On a machine without an accelerator the main memory is `device`: it is where the model computes."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element, by the names safetensors uses in its headers."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that an option declares it will create: name, safetensors dtype name, shape, tier. `num_bytes` is exact."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tier: str = "device"

    @property
    def num_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)

    def prefixed(self, prefix: str) -> StoredTensor:
        return StoredTensor(f"{prefix}.{self.name}", self.dtype, self.shape, self.tier)


def total_bytes(tensors: Iterable[StoredTensor], tier: str = "device") -> int:
    """Sum over the declared tensors that lie on a tier."""
    return sum(tensor.num_bytes for tensor in tensors if tensor.tier == tier)


@dataclass
class Ledger:
    """Bytes by time point, resident and tier: `timeline[time_point][resident][tier] -> bytes`.

    Time points keep insertion order (load, prefill chunks, decode). `peak_bytes(tier)` is the largest sum over residents
    at one time point.
    """

    timeline: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    def add(self, time_point: str, resident: str, tier: str, num_bytes: int) -> None:
        by_tier = self.timeline.setdefault(time_point, {}).setdefault(resident, {})
        by_tier[tier] = by_tier.get(tier, 0) + int(num_bytes)

    def total_bytes(self, time_point: str, tier: str = "device") -> int:
        return sum(tiers.get(tier, 0) for tiers in self.timeline[time_point].values())

    def peak(self, tier: str = "device") -> tuple[str, int]:
        """The first time point with the most bytes, and those bytes; ("", 0) for an empty ledger."""
        best = ("", 0)
        for time_point in self.timeline:
            num_bytes = self.total_bytes(time_point, tier)
            if num_bytes > best[1]:
                best = (time_point, num_bytes)
        return best

    def owners_at(self, time_point: str, tier: str = "device") -> dict[str, int]:
        """Bytes by resident, largest first."""
        rows = {name: tiers.get(tier, 0) for name, tiers in self.timeline[time_point].items()}
        return dict(sorted(((k, v) for k, v in rows.items() if v), key=lambda row: -row[1]))

    def rows(self) -> Iterator[tuple[str, str, str, int]]:
        for time_point, residents in self.timeline.items():
            for resident, tiers in residents.items():
                for tier, num_bytes in tiers.items():
                    yield time_point, resident, tier, num_bytes

    def to_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        return {t: {r: dict(tiers) for r, tiers in rows.items()} for t, rows in self.timeline.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Ledger:
        return cls({t: {r: dict(tiers) for r, tiers in rows.items()} for t, rows in data.items()})
