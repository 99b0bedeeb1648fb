"""Beam search with second-order feedback: several roundings of each row are kept until the columns after them have spoken.

The output error of a row, `sum_k R_kk^2 |q_k - t_k|^2` with targets that depend on the errors before them (see
`hessian_feedback.py`), is a tree search; nearest rounding of each target (GPTQ) keeps one path. A beam keeps the best few.
It is what makes codes with memory (trellises) work with feedback, and it lowers the error of any grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Rounding, WeightTask
from haversack.parts.weights.damped_factor import damped_factor, required_hessian

if TYPE_CHECKING:
    import torch

SEARCHED_AT_ONCE = 2**14
"""Codes weighed together, over rows and paths: temporaries stay within a core's cache, and below the size from which the
allocator maps fresh pages for each (which took seven times as long)."""

_HISTORY_BITS = 60
"""Codes of a path that are not settled yet lie in one int64."""


@dataclass(frozen=True)
class BeamFeedback(Rounding):
    """Rounds along rows with feedback through the second-order statistics, keeping the best `beams` paths of each row.

    `damping` (0 to 1) times the mean diagonal is added to the diagonal, and raised tenfold until the matrix
    factorises (noted). Columns are visited in their own order; a code is settled `delay` (1 to 30) columns later, at
    most as many as 60 bits hold, by the best path then. `beams` 1 is nearest rounding with feedback; grids with memory
    keep one path per state instead, whatever `beams` says. After the search the scales of each row are multiplied by the factor of least output
    error.

    Cost for `(out, in)`: about `out in beams (delay + 2^bits)` operations beside `in^3 / 3 + 4 out in^2` flops;
    workspace: two copies of `hessian`, three of `weight`, float32. Error: none known beyond that of one beam. Source:
    the M-algorithm (Anderson and Mohan 1984, IEEE Transactions on Communications 32(2)) on the targets of Frantar et
    al. 2022 (arXiv 2210.17323).
    """

    id: ClassVar[str] = "beam-feedback"
    title: ClassVar[str] = "beam search with second-order feedback"
    source: ClassVar[Source | None] = Source(
        "Anderson, Mohan", 1984, "Sequential Coding Algorithms: A Survey and Cost Analysis", None, "section III"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    beams: int = 32
    damping: float = 0.01
    delay: int = 24

    def __post_init__(self) -> None:
        check_range(self.id, "beams", self.beams, "from 1 to 256", 1 <= self.beams <= 256)
        check_range(self.id, "damping", self.damping, "above 0 and at most 1", 0 < self.damping <= 1)
        check_range(self.id, "delay", self.delay, "from 1 to 30", 1 <= self.delay <= 30)

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hessian = required_hessian(task)
        factor, _ = damped_factor(hessian, self.damping, task.notes)
        scales = grid.fit(task.weight, hessian.diagonal())
        codes = self.search(task.weight, grid, scales, factor)
        return codes, _rescaled(task.weight, hessian, grid, codes, scales)

    def search(
        self, weight: torch.Tensor, grid: Grid, scales: Mapping[str, torch.Tensor], factor: torch.Tensor
    ) -> torch.Tensor:
        """Codes uint8 `(out, in)` of little `|(values - weight) factor|`, for an upper triangular factor `(in, in)`."""
        import torch

        feedback = factor / factor.diagonal()  # R_jk / R_kk
        weights = factor.diagonal().square()
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        step = max(16, SEARCHED_AT_ONCE // ((grid.num_states or self.beams) << grid.bits))
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            own = {name: state[rows] for name, state in scales.items()}
            codes[rows] = self._search_rows(weight[rows], grid, own, feedback, weights)
        return codes

    def _search_rows(
        self,
        weight: torch.Tensor,
        grid: Grid,
        scales: Mapping[str, torch.Tensor],
        feedback: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """A path is its last `delay` codes, newest in the lowest bits of `history`, and what they changed: column k in
        slot `k % delay` of `change`.

        What is settled is taken off the targets: of the columns of one block at once, of other columns when their
        block begins.
        """
        import torch

        rows, in_features = weight.shape
        delay = min(self.delay, _HISTORY_BITS // grid.bits)
        keep = (1 << (grid.bits * delay)) - 1
        codes = torch.empty(in_features, rows, dtype=torch.uint8)
        settled = torch.zeros(in_features, rows)  # what settled codes changed, column by column
        weight = weight.T.contiguous()
        target = weight.clone()
        block_end = 0
        paths = grid.num_states or self.beams
        cost = torch.full((rows, paths), float("inf"))
        cost[:, 0] = 0
        history = torch.zeros(rows, paths, dtype=torch.int64)
        change, chosen_change = torch.zeros(2, delay, rows, paths)
        for k in range(in_features):
            slot, oldest = k % delay, k - delay
            if k == block_end:
                block_end = min(k + _BLOCK_COLUMNS, in_features)
                first = max(0, oldest)
                target[k:block_end].addmm_(feedback[:first, k:block_end].T, settled[:first], alpha=-1)
            recent = torch.zeros(delay)
            recent[torch.arange(max(0, oldest), k) % delay] = feedback[max(0, oldest) : k, k]
            wanted = target[k][:, None] - (recent @ change.view(delay, -1)).view(rows, -1)  # (rows, paths)
            values = grid.branches(history, scales, k)  # (rows, paths or 1, codes)
            metric = (values - wanted[..., None]).square_().mul_(weights[k]).add_(cost[..., None]).flatten(1)
            cost, best = self._survivors(metric, grid)
            parent, code = best >> grid.bits, best & ((1 << grid.bits) - 1)
            chosen = values.flatten(1).gather(1, best if values.shape[1] > 1 else code)
            history = history.gather(1, parent)
            torch.gather(change, 2, parent.expand(delay, -1, -1), out=chosen_change)
            change, chosen_change = chosen_change, change
            if oldest >= 0:  # the oldest code is settled by the best path; paths that differ in it end here
                leader = cost.argmin(1, keepdim=True)
                code_then = history >> (grid.bits * (delay - 1))
                agreed = code_then.gather(1, leader)
                codes[oldest] = agreed[:, 0]
                settled[oldest] = change[slot].gather(1, leader)[:, 0]
                cost.masked_fill_(code_then != agreed, float("inf"))
                if k + 1 < block_end:
                    target[k + 1 : block_end].addr_(feedback[oldest, k + 1 : block_end], settled[oldest], alpha=-1)
            history = (history << grid.bits | code) & keep
            torch.sub(chosen, weight[k][:, None], out=change[slot])
        last = history.gather(1, cost.argmin(1, keepdim=True))[:, 0]
        for back in range(min(delay, in_features)):
            codes[in_features - 1 - back] = last >> (grid.bits * back) & ((1 << grid.bits) - 1)
        return codes.T.contiguous()

    def _survivors(self, metric: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """The paths to go on with: their costs, and where in `metric` `(rows, paths * codes)` they stand.

        In a grid with memory, paths whose last codes are the same have the same future: of each such state the best one
        survives (Viterbi's rule), path s being in state s. Without memory the best `beams` do.
        """
        import torch

        if not grid.num_states:
            return metric.topk(self.beams, dim=1, largest=False)
        num_codes = 1 << grid.bits
        cost, high = metric.view(len(metric), num_codes, grid.num_states).min(1)
        return cost, high * grid.num_states + torch.arange(grid.num_states)


_BLOCK_COLUMNS = 128


def _rescaled(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor, scales: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The scales with each row's times the factor of least output error under its codes."""
    import torch

    name = grid.float_scales
    if name is None:
        return scales
    values = grid.dequantize(codes, scales)
    product = values @ hessian.float()
    size = (values * product).sum(1)
    factor = torch.where(size > 0, (weight * product).sum(1) / size.clamp_min(1e-30), 1.0)
    return {**scales, name: (scales[name].float() * factor[:, None]).half()}


def nearest_path(weight: torch.Tensor, grid: Grid, scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Codes of a grid with memory that are near the weights on their own, without statistics."""
    import torch

    return BeamFeedback().search(weight.float(), grid, scales, torch.eye(weight.shape[1]))
