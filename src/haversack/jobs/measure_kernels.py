"""Which kernels are fastest for a packed folder's matrices on this machine: timed on random weights, kept for later runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haversack.kernels.format import PackedFormat, PlaneFormat
    from haversack.parts.weights.base import Grid

MOST_TOKENS = 512
"""Tokens measured: 1, 2, 4 and so on up to so many."""

Progress = Callable[[str, int, int], None]


def measure_kernels(folder: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Time the contenders of every form of matrix in a packed folder, by numbers of tokens, and keep the fastest.

    Reads no weights. Takes some 0.2 s per form and number, and 50 MB; best on an idle machine. Returns the file and one row
    per case. Raises PlanError for a folder that is not packed.
    """
    from haversack.describe.checkpoint import torch_dtype
    from haversack.engine.load import open_packed
    from haversack.jobs.run import check_packed
    from haversack.kernels import choices, registry

    packed = open_packed(check_packed(folder).path)
    forms: dict[tuple[PackedFormat | PlaneFormat, int], tuple[Grid, int]] = {}
    for site in packed.described.weights:
        grid = packed.option(site.id).grid
        fmt = None if grid is None else grid.kernel_format(site.in_features)
        if grid is None or fmt is None:
            continue
        rows = forms.get((fmt, grid.activation_bits), (grid, 0))[1]
        forms[fmt, grid.activation_bits] = (grid, max(rows, site.out_features))
    dtype = torch_dtype(packed.described.dtype)
    numbers = [1 << i for i in range(MOST_TOKENS.bit_length())]
    cases = [(form, tokens) for form in forms for tokens in numbers]
    found: dict[str, choices.Choice] = {}
    table: list[dict[str, Any]] = []
    for done, ((fmt, bits), tokens) in enumerate(cases):
        grid, rows = forms[fmt, bits]
        if progress is not None:
            progress("timing kernels", done, len(cases))
        first = registry.choose_kernel(fmt, tokens, dtype, bits).NAME
        key, choice = registry.measure_choice(fmt, tokens, rows, dtype, bits)
        found[key] = choice
        form = {"form": grid.label, "columns": fmt.in_features, "tokens": tokens, "kernel": choice.kernel}
        table.append(form | {"threads": choice.threads, "unmeasured": first, "microseconds": dict(choice.microseconds)})
    path = choices.keep(found)
    registry.forget_choices()
    if progress is not None:
        progress("timing kernels", len(cases), len(cases))
    return {"file": str(path), "cases": table}
