"""Checkpoints that several ranks wrote: any number of ranks reads its rows back; a part that is missing or damaged is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from haversack.errors import CheckpointError
from haversack.formats.checkpoints import (
    begin_checkpoint,
    finish_checkpoint,
    newest_intact,
    note_hashes,
    noted_hashes,
    open_checkpoint,
    write_part,
)

WHOLE = {"model.a": torch.arange(35.0).view(7, 5), "model.b": torch.arange(2.0)}
COUNT = torch.tensor(4.0)


def rows_of(rank: int, size: int, length: int) -> tuple[int, int]:
    """As torch cuts a first axis."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)


def write(folder: Path, size: int) -> Path:
    begin_checkpoint(folder, 3)
    for rank in range(size):
        own = {name: tensor[slice(*rows_of(rank, size, len(tensor)))] for name, tensor in WHOLE.items()}
        alone = {"optimizer.a.step": COUNT} if rank == 0 else {}
        hashes = write_part(folder, 3, {**own, **alone}, set(WHOLE), (rank, size))
        note_hashes(folder, 3, rank, hashes)
    shapes = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}
    return finish_checkpoint(folder, 3, noted_hashes(folder, 3), {"x": 1}, {"model": "m"}, shapes)


@pytest.mark.parametrize("wrote", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_another_number_wrote(tmp_path: Path, wrote: int) -> None:
    saved = open_checkpoint(write(tmp_path, wrote))
    assert saved.names == {"model.a": (7, 5), "model.b": (2,), "optimizer.a.step": ()} and saved.values == {"x": 1}
    assert torch.equal(saved.read("optimizer.a.step"), COUNT)
    for name, tensor in WHOLE.items():
        assert torch.equal(saved.read(name), tensor)
        for size in (1, 2, 3, 4, 9):
            for rank in range(size):
                rows = rows_of(rank, size, len(tensor))
                assert torch.equal(saved.read(name, rows), tensor[slice(*rows)])


def test_a_part_that_is_missing_or_damaged_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    part = path / "state-00001-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged in tensor"):
        open_checkpoint(path)
    part.unlink()
    found, damaged = newest_intact(tmp_path)
    assert found is None and "holds other tensors than were written" in damaged[0]
