"""The processes of one run under torchrun: who this one is, and the few things they tell each other. Alone, all of it is free."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(hours=12)
"""How long ranks wait for each other: the first one reads the data alone."""


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` of `size`, of which `on_machine` share this machine."""

    rank: int = 0
    size: int = 1
    on_machine: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads data, plans, logs and writes what is whole."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.size > 1

    def wait(self) -> None:
        """Until every rank is here."""
        if self.are_several:
            import torch.distributed as dist

            dist.barrier()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in 64 bits."""
        if not self.are_several:
            return list(values)
        import torch
        import torch.distributed as dist

        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sums([float(here)])[0] > 0

    def each(self, value: int) -> list[int]:
        """Every rank's value, by rank."""
        row = [0.0] * self.size
        row[self.rank] = float(value)
        return [int(one) for one in self.sums(row)]

    def part(self, rows: Sequence[int]) -> Sequence[int]:
        """This rank's of rows that the number of ranks divides."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]

    def mesh(self) -> Any:
        """The ranks as torch's device mesh of one axis."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (self.size,))


ALONE = Ranks()
"""One process."""


def ranks_of_environment() -> Ranks:
    """Who torchrun says this process is; alone without it."""
    named = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    return Ranks(*(int(os.environ.get(name, alone)) for name, alone in named.items()))


@contextmanager
def joined(ranks: Ranks) -> Iterator[Ranks]:
    """Within, the ranks can hear each other."""
    if not ranks.are_several:
        yield ranks
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
