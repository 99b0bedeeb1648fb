"""The clipping search of grids of few values, compiled: rows spread over the thread team."""

from __future__ import annotations

from functools import cache

import torch

from haversack.kernels.ir_scale_search import JOB, LANES, scale_search_text, unit_vectors
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import run_record


def best_offers(
    weight: torch.Tensor,
    importance: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    num_codes: int,
    table: tuple[float, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which offer of `(scale, zero)` represents each group best, and the refit under it.

    `weight` `(rows, groups, width)` and `importance` `(groups, width)` are float32, `scale` and `zero` `(offers, rows,
    groups)`. Returns, all `(rows, groups)`: the first offer with the least `importance`-weighted squared error (int64),
    and the sums `importance q w` and `importance q q` under its codes `q` (`zero` taken off), or under the values of a rising
    `table`, for which `zero` is not read. Workspace: 16 bytes per group, and a copy of `weight` where its width isn't 16, 32
    or whole units of 64.
    """
    rows, groups, width = weight.shape
    unit_columns = LANES * unit_vectors(width)
    padding = -width % unit_columns
    if padding:  # zeros: nothing is lost there, and they weigh nothing
        weight, importance = (torch.nn.functional.pad(t, (0, padding)) for t in (weight, importance))
    best = torch.empty(rows, groups, dtype=torch.int64)
    products, squares = torch.empty(rows, groups), torch.empty(rows, groups)
    tensors = {
        "weight": weight.contiguous(),
        "importance": importance.contiguous(),
        "scale": scale.contiguous(),
        "zero": zero.contiguous(),
        "best": best,
        "products": products,
        "squares": squares,
    }
    units = (width + padding) // unit_columns
    numbers = {"rows": rows, "groups": groups, "units": units, "offers": scale.shape[0]}
    words = [tensors[name].data_ptr() if name in tensors else numbers[name] for name in JOB]
    run_record(_module(num_codes, unit_columns // LANES, table), words, torch.get_num_threads())
    return best, products, squares


@cache
def _module(num_codes: int, num_vectors: int, table: tuple[float, ...] | None) -> CompiledModule:
    return compile_text(scale_search_text(num_codes, num_vectors, table), host_target())
