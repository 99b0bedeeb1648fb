"""Sparse outliers: the weights that a grid would serve worst are taken off it and kept in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.scale_codings import SUPERBLOCK_COLUMNS
from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Correction, Grid, WeightTask

if TYPE_CHECKING:
    import torch

_DAMPING = 0.01
_MAX_COLUMNS = 2**15
_TILE_BYTES = 1 << 20
_ROWS_AT_ONCE = 16
_TURNS = 8
_TOGETHER = (1, 2, 4)
"""Extremes of a group that are tried together: of two alike, one alone changes nothing."""


@dataclass(frozen=True)
class SparseOutliers(Correction):
    """Keeps a `share` (above 0, to 0.1) of the weights in float16 with their columns: stores 4 bytes for each, and 4 per row.

    Taken off before the grid sees the matrix: those without which the scale of their group serves the others better. The
    error of a group is that of nearest codes, each weighed by `1 / (H^-1)_cc` (all alike without statistics): what it costs
    the output after all other columns have made up for it as well as they can. Rows of up to 32,768 columns.

    Error: that of the grid on what is left; the outliers' own is float16's. Source: Dettmers et al. 2023 (arXiv
    2306.03078, section 4); differs in trying only the extreme weight of each group at a time, in a few turns, before the
    feedback instead of within it, and in a number of outliers that is fixed, so that bytes are known.
    """

    id: ClassVar[str] = "outliers"
    title: ClassVar[str] = "sparse outliers in 16 bits"
    source: ClassVar[Source | None] = Source(
        "Dettmers, Svirschevski, Egiazarian, Kuznedelev, Frantar, Ashkboos, Borzunov, Hoefler, Alistarh",
        2023,
        "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
        "2306.03078",
        "section 4",
    )
    before: ClassVar[bool] = True

    share: float = 0.01

    def __post_init__(self) -> None:
        check_range(self.id, "share", self.share, "above 0 and at most 0.1", 0 < self.share <= 0.1)

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        if in_features > _MAX_COLUMNS:
            raise UsageError(f"{self.id}: {in_features} columns are more than {_MAX_COLUMNS}, which 16 bits number.")
        number = self._number(out_features, in_features)
        return (
            StoredTensor("starts", "I32", (out_features + 1,)),
            StoredTensor("columns", "I16", (number,)),
            StoredTensor("values", "F16", (number,)),
        )

    def take_off(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        import torch

        from haversack.parts.weights.damped_factor import damped_factor

        weight = task.weight
        importance = torch.ones(weight.shape[1])
        if task.hessian is not None:
            factor, _ = damped_factor(task.hessian, _DAMPING, [])
            inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)), upper=True)
            importance = 1 / inverse.square().sum(0)  # over the diagonal of (R R^T)^-1
        number, rest = self._number(*weight.shape), weight.clone()
        offers = _Offers(rest, importance, grid)
        for turn in range(_TURNS):
            offers.take((turn + 1) * number // _TURNS - turn * number // _TURNS)
        left = (rest != weight).flatten().nonzero()[:, 0]
        chosen = torch.cat([left, (rest == weight).flatten().nonzero()[: number - len(left), 0]]).sort().values
        counts = torch.bincount(chosen // weight.shape[1], minlength=weight.shape[0])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        limit = torch.finfo(torch.float16).max
        return {
            "starts": starts.to(torch.int32),
            "columns": (chosen % weight.shape[1]).to(torch.int16),
            "values": weight.flatten()[chosen].clamp(-limit, limit).half(),
        }

    def contribute(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        import torch

        values = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(values), out_features)
        step = self._tile_rows(x.shape[-1])
        for first in range(0, out_features, step):
            index = torch.arange(first, min(first + step, out_features))
            out[:, first : first + step] = values @ self.rows(index, tensors, x.shape[-1]).to(x.dtype).t()
        return out.view(*x.shape[:-1], out_features)

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        import torch

        out = torch.zeros(len(index), in_features)
        for some, wanted in zip(out.split(_ROWS_AT_ONCE), index.long().split(_ROWS_AT_ONCE), strict=True):
            first, last = tensors["starts"][wanted].long(), tensors["starts"][wanted + 1].long()
            row = torch.arange(len(wanted)).repeat_interleave(last - first)
            place = torch.arange(len(row)) + (first - ((last - first).cumsum(0) - (last - first)))[row]
            some[row, tensors["columns"][place].long()] = tensors["values"][place].float()
        return out

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The result; and the places of the outliers of some rows, which all weights there may be."""
        return 4 * num_rows * in_features + min(num_rows, _ROWS_AT_ONCE) * (48 * in_features + 64)

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The result, a tile of rows (float32, then in the input's dtype) with its product and row numbers."""
        rows, size = min(out_features, self._tile_rows(in_features)), DTYPE_BYTES[dtype]
        tile = self.rows_bytes(rows, in_features) + rows * (size * (in_features + num_tokens) + 8)
        return num_tokens * out_features * size + tile

    def _number(self, out_features: int, in_features: int) -> int:
        return max(1, round(self.share * out_features * in_features))

    def _tile_rows(self, in_features: int) -> int:
        return max(16, _TILE_BYTES // (4 * in_features))


class _Offers:
    """What taking the extreme weights off each group would gain, kept from turn to turn: only where weights were taken since
    are scales fitted again.

    `rest` `(out, in)` is changed in place. Groups that share a second-level scale are fitted together: columns come in spans of
    whole superblocks where they divide the row, else in whole rows.
    """

    def __init__(self, rest: torch.Tensor, importance: torch.Tensor, grid: Grid):
        import torch

        self.rest, self.importance, self.grid = rest, importance, grid
        out_features, in_features = rest.shape
        self.width = grid.group_size or in_features
        self.span = SUPERBLOCK_COLUMNS if grid.group_size and in_features % SUPERBLOCK_COLUMNS == 0 else in_features
        groups = -(-in_features // self.width)
        self.gain = torch.empty(out_features, groups)
        self.together = torch.empty(out_features, groups, dtype=torch.int64)
        self.columns = torch.empty(out_features, groups, min(max(_TOGETHER), self.width), dtype=torch.int64)
        for first in range(0, in_features, self.span):
            self._weigh(torch.arange(out_features), first)

    def take(self, number: int) -> None:
        """Set to 0 up to `number` weights: those whose group's error falls the most for each that is taken."""
        import torch

        order = self.gain.flatten().argsort(descending=True)
        chosen = order[self.together.flatten()[order].cumsum(0) <= number]
        is_chosen = torch.zeros(self.gain.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(self.gain.shape)
        places = is_chosen.unsqueeze(-1) & (torch.arange(self.columns.shape[2]) < self.together.unsqueeze(-1))
        rows = torch.arange(len(self.rest))[:, None, None].expand_as(self.columns)
        self.rest[rows[places], self.columns[places]] = 0.0
        for first in range(0, self.rest.shape[1], self.span):
            touched = is_chosen[:, self._groups(first)].any(1).nonzero()[:, 0]
            if len(touched):
                self._weigh(touched, first)

    def _weigh(self, rows: torch.Tensor, first: int) -> None:
        """The offers of one span of columns, in some rows."""
        import torch
        import torch.nn.functional as F

        rest, importance = self.rest[rows, first : first + self.span], self.importance[first : first + self.span]
        num_columns, most = rest.shape[1], self.columns.shape[2]
        groups = -(-num_columns // self.width)

        def grouped(values: torch.Tensor) -> torch.Tensor:
            return F.pad(values, (0, groups * self.width - num_columns)).view(len(rest), groups, self.width)

        def error(weight: torch.Tensor) -> torch.Tensor:
            scales = self.grid.fit(weight, importance)
            change = self.grid.dequantize(self.grid.quantize(weight, scales), scales).sub_(weight)
            return grouped(change.square_() * importance).sum(2)

        columns = grouped(rest.abs()).topk(most, 2).indices + torch.arange(groups)[:, None] * self.width
        columns = columns.clamp_max(num_columns - 1)
        before, gains = error(rest), torch.full((len(_TOGETHER), len(rest), groups), -torch.inf)
        for i, together in enumerate(n for n in _TOGETHER if n <= most):
            without = rest.scatter(1, columns[:, :, :together].flatten(1), 0.0)
            gains[i] = (before - error(without)) / together
        gain, way = gains.max(0)
        place = self._groups(first)
        self.gain[rows, place] = gain
        self.together[rows, place] = torch.tensor(_TOGETHER)[way]
        self.columns[rows, place] = columns + first

    def _groups(self, first: int) -> slice:
        """The groups of the span that begins at a column."""
        return slice(first // self.width, -(-(first + self.span) // self.width))
