"""Train the value tables of trellis codes on normal samples: `python -m reference.trellis BITS OUTPUT.safetensors`.

Search and means take turns, as in Lloyd's algorithm: the best path of every sample row by Viterbi's algorithm, then each
value moves towards the mean of the samples it stands for. The start is a random order of normal quantiles.
"""

from __future__ import annotations

import math
import sys

import torch
from safetensors.torch import save_file

from haversack.codecs.trellis import WINDOW_BITS

NUM_ROWS, NUM_COLUMNS, ROUNDS = 192, 384, 50
STEP = 0.7
"""How far a value moves towards its mean: samples are drawn anew in each round, and few fall on one value."""


def best_windows(samples: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
    """Viterbi's algorithm: indices into the table `(rows, columns)` of the path nearest to each row of samples."""
    rows, columns = samples.shape
    num_states, num_codes = len(table) >> bits, 1 << bits
    cost = torch.full((rows, num_states), math.inf)
    cost[:, 0] = 0
    before = torch.arange(len(table)) >> bits  # the state before a window; after it: the window's low bits
    came_from = torch.empty(columns, rows, num_states, dtype=torch.uint8)
    for column in range(columns):
        error = (samples[:, column, None] - table).square_().add_(cost[:, before])
        cost, best = error.view(rows, num_codes, num_states).min(1)
        came_from[column] = best.to(torch.uint8)
    windows = torch.empty(rows, columns, dtype=torch.int64)
    state = cost.argmin(1)
    for column in reversed(range(columns)):
        windows[:, column] = came_from[column].gather(1, state[:, None])[:, 0].long() * num_states + state
        state = windows[:, column] >> bits
    return windows


def train(bits: int) -> torch.Tensor:
    """The table of codes of `bits`, float16."""
    size = 1 << WINDOW_BITS[bits]
    quantiles = torch.erfinv(2 * (torch.arange(size, dtype=torch.float64) + 0.5) / size - 1) * math.sqrt(2)
    table = quantiles[torch.randperm(size, generator=torch.Generator().manual_seed(2))].float()
    generator = torch.Generator().manual_seed(0)
    for done in range(ROUNDS):
        samples = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=generator)
        windows = best_windows(samples, table, bits)
        print(f"round {done}: mean squared error {float((samples - table[windows]).square().mean()):.5f}", flush=True)
        count = torch.bincount(windows.flatten(), minlength=size)
        total = torch.bincount(windows.flatten(), weights=samples.flatten().double(), minlength=size).float()
        moved = (1 - STEP) * table + STEP * total / count.clamp_min(1)
        table = torch.where(count > 5, moved, table)
    return table.half()


if __name__ == "__main__":
    save_file({f"bits{sys.argv[1]}": train(int(sys.argv[1]))}, sys.argv[2])
