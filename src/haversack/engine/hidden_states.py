"""Hidden states between layers, kept in mapped files: their pages are the page cache's, not the process's."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class HiddenStates:
    """Named tensors `(sequences, tokens, hidden_size)` in a folder; one becomes visible when it is finished.

    Disk: `sequences * tokens * hidden_size * itemsize` bytes each.
    """

    def __init__(self, folder: Path, num_tokens: int, hidden_size: int, dtype: torch.dtype):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._row, self._dtype = folder, (num_tokens, hidden_size), dtype

    def create(self, name: str, num_sequences: int) -> torch.Tensor:
        """A new tensor to fill; invisible until `finish`."""
        file = self._folder / f"{name}.part"
        file.unlink(missing_ok=True)
        return self._map(file, num_sequences)

    def finish(self, name: str) -> None:
        (self._folder / f"{name}.part").replace(self._folder / name)

    def open(self, name: str, num_sequences: int) -> torch.Tensor:
        """The first `num_sequences` of a finished tensor."""
        return self._map(self._folder / name, num_sequences)

    def cut(self, name: str, new_name: str, num_sequences: int) -> None:
        """Rename, then give back the disk behind the first sequences."""
        (self._folder / name).replace(self._folder / new_name)
        os.truncate(self._folder / new_name, self._num_elements(num_sequences) * self._dtype.itemsize)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return (self._folder / name).exists()

    def finished(self) -> list[str]:
        return sorted(file.name for file in self._folder.iterdir() if file.suffix != ".part")

    def _num_elements(self, num_sequences: int) -> int:
        return num_sequences * self._row[0] * self._row[1]

    def _map(self, file: Path, num_sequences: int) -> torch.Tensor:
        size = self._num_elements(num_sequences)
        return torch.from_file(str(file), shared=True, size=size, dtype=self._dtype).view(num_sequences, *self._row)
