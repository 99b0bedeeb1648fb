"""Windows of a long text: which calibrate, which steer the search over plans, and which judge the plan that is kept.

What was optimised on a text is too well on that text, so the three never overlap. The divergence of a packed model is
near to a constant share of its own uncertainty on a text (on models A and B at 3 and 4 bits, 0.48 to 0.58% and 2.1 to
2.6% of the entropy, over six kinds of text), so that a promise made on easy text is broken on hard text. Windows for
measuring are therefore taken evenly over how hard they are, not over how common. How hard a window is, is asked of no
model: its ids' size under a general compressor correlates with the entropy of model B at 0.91.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from haversack.errors import UsageError

NUM_SEARCH, NUM_JUDGE = 8, 16
"""Windows for the search and for the judgement, if the text has them to spare."""

MIN_WINDOWS = 8
"""Windows of a text of which two can be held back."""

_OUTLIERS = 0.02
"""Share of the windows at either end that are left out: tables of numbers, licences said twice."""


@dataclass(frozen=True)
class TextWindows:
    """`(sequences, tokens)` each. `calibration` is spread evenly over the text; `search` and `judge` evenly from its easy
    to its hard windows, sorted so. `notes` say where the text was too short."""

    calibration: torch.Tensor
    search: torch.Tensor
    judge: torch.Tensor
    notes: tuple[str, ...] = ()


def text_windows(token_ids: Sequence[int], num_tokens: int, seq_len: int) -> TextWindows:
    """Cut a text for calibrating on `num_tokens` and for measuring.

    A text without windows to spare gives a quarter of them for measuring; one of less than `MIN_WINDOWS` is measured on
    what it is calibrated on, which is noted. Raises UsageError for less than 2 tokens.
    """
    notes = []
    if len(token_ids) < 2:
        raise UsageError(f"the calibration text has {len(token_ids)} tokens, but needs 2 or more; name a longer text.")
    if len(token_ids) < seq_len:
        notes.append(f"calibration text has {len(token_ids)} tokens, less than a sequence of {seq_len}; used as it is")
        seq_len = len(token_ids)
    available, wanted = len(token_ids) // seq_len, max(1, num_tokens // seq_len)
    spared = min(NUM_SEARCH + NUM_JUDGE, max(available // 4, available - wanted))
    if available < wanted + spared:
        if available < wanted:
            notes.append(
                f"calibration text gives {available} sequences of {seq_len} tokens, not the {wanted} asked for"
            )
        if available < MIN_WINDOWS:
            notes.append(
                "calibration text is too short to hold any back: plans are measured on it, and promise too little"
            )
    rows = torch.as_tensor(token_ids[: available * seq_len], dtype=torch.int64).view(available, seq_len)
    if available < MIN_WINDOWS:
        return TextWindows(rows[:wanted], rows, rows, tuple(notes))
    count = min(wanted, available - spared)
    taken = [i * available // count for i in range(count)]
    if count < wanted <= available:
        notes.append(f"{available - count} of the calibration text's {available} sequences are held back for measuring")
    held = sorted(set(range(available)) - set(taken), key=lambda i: (_hardness(rows[i]), i))
    judged = max(1, min(NUM_JUDGE, len(held) * 2 // 3))
    judge = _spread([_hardness(rows[i]) for i in held], judged)
    rest = [i for place, i in enumerate(held) if place not in set(judge)]
    search = _spread([_hardness(rows[i]) for i in rest], min(NUM_SEARCH, len(rest)))
    return TextWindows(rows[taken], rows[[rest[i] for i in search]], rows[[held[i] for i in judge]], tuple(notes))


def token_windows(token_ids: Sequence[int], num_sequences: int, seq_len: int) -> torch.Tensor:
    """`(sequences, seq_len)`: windows spread evenly over a text, not overlapping."""
    available = len(token_ids) // seq_len
    count = max(1, min(num_sequences, available))
    starts = [i * available // count * seq_len for i in range(count)]
    return torch.tensor([list(token_ids[start : start + seq_len]) for start in starts])


def _hardness(row: torch.Tensor) -> float:
    """Compressed bytes per token."""
    return len(zlib.compress(row.to(torch.int32).numpy().tobytes(), 9)) / len(row)


def _spread(values: Sequence[float], count: int) -> list[int]:
    """Places of `count` of the rising `values`, evenly from low to high by value, each place once."""
    trimmed = int(len(values) * _OUTLIERS)
    free = list(range(trimmed, len(values) - trimmed))
    low, high = values[free[0]], values[free[-1]]
    chosen = []
    for i in range(count):
        wanted = low + (high - low) * (i + 0.5) / count
        place = min(free, key=lambda p: abs(values[p] - wanted))
        free.remove(place)
        chosen.append(place)
    return sorted(chosen)
