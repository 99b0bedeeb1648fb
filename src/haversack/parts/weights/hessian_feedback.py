"""Second-order feedback: columns are rounded one after another, and each absorbs the error of those before it.

With `H = R R^T`, `R` upper triangular, the output error is `tr(E H E^T) = sum_k R_kk^2 |q_k - t_k|^2`, where the
target of column k is `t_k = w_k - sum_{j<k} e_j R_jk / R_kk` and `e_j = q_j - w_j`. Rounding each target to nearest
is what GPTQ computes from the Cholesky factor of the inverse (Chee et al. 2023, arXiv 2307.13304, theorem 6); this
form needs one factorisation of `H` and no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Rounding, ScalarCodes, WeightTask
from haversack.parts.weights.damped_factor import damped_factor, required_hessian

if TYPE_CHECKING:
    import torch

_LEAST_GAIN = 0.01
"""Share of the error that a sweep must take off for another to follow."""

_ERROR_COLUMNS = 1024
"""Columns of an error product that are computed at once."""


@dataclass(frozen=True)
class HessianFeedback(Rounding):
    """Rounds with feedback through the second-order statistics (GPTQ): less output error at the same bytes.

    `damping` (0 to 1) times the mean diagonal is added to the diagonal, and raised tenfold until the matrix
    factorises (noted). `activation_order` visits columns by falling diagonal; scales come from groups of the original
    order, chosen up front (static groups), so that no permutation is stored. `block_size` columns (1 to 1024) are
    updated at once; the result does not depend on it beyond float rounding. At most `num_sweeps` (0 to 16) passes of
    coordinate descent follow, over codes and scales of the whole matrix, until one gains less than 1%. Rows for which
    nearest rounding under the first scales is better keep it, so that the output error never exceeds that of
    `NearestRounding`.

    Cost for `(out, in)`: `in^3 / 3 + (4 + 2 num_sweeps) out in^2` flops; workspace: three copies of `hessian`, five of
    `weight`, float32. Error: no bound beyond nearest rounding's; about 1.3 to 3 times less than it in the output norm on
    language models. Source: Frantar et al. 2022 (arXiv 2210.17323), section 3.3; differs in weighting the clipping
    search by the diagonal, in rounding (not zeroing) columns that no calibration token reaches, and in the fall-back
    per row. Sweeps over codes: Behdin et al. 2023 (QuantEase, arXiv 2309.01885), section 3; over scales: ours.
    """

    id: ClassVar[str] = "hessian-feedback"
    title: ClassVar[str] = "second-order feedback"
    source: ClassVar[Source | None] = Source(
        "Frantar, Ashkboos, Hoefler, Alistarh",
        2022,
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "2210.17323",
        "section 3.3",
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = 0.01
    activation_order: bool = True
    static_groups: bool = True
    block_size: int = 128
    num_sweeps: int = 4

    def __post_init__(self) -> None:
        check_range(self.id, "damping", self.damping, "above 0 and at most 1", 0 < self.damping <= 1)
        check_range(self.id, "block_size", self.block_size, "from 1 to 1024", 1 <= self.block_size <= 1024)
        check_range(self.id, "num_sweeps", self.num_sweeps, "from 0 to 16", 0 <= self.num_sweeps <= 16)
        check_range(
            self.id,
            "static_groups",
            self.static_groups,
            "true while activation_order is true, because scales are stored by the original order",
            self.static_groups or not self.activation_order,
        )

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        import torch

        weight, hessian = task.weight, required_hessian(task)
        importance = hessian.diagonal().clone()
        num_dead = int((importance <= 0).sum())
        if num_dead:
            task.notes.append(
                f"{num_dead} of {importance.numel()} inputs are never active; their columns round to nearest"
            )
        order = torch.argsort(importance, descending=True) if self.activation_order else torch.arange(len(importance))
        factor, added = damped_factor(hessian, self.damping, task.notes, order)
        fixed = grid.fit(weight, importance)
        codes, scales, error = self._feed_back(weight, importance, fixed, grid, order, factor)
        # Both errors in the norm of the undamped statistics: what damping added is taken off again.
        if self.num_sweeps:
            codes, error = self._sweep(weight, hessian, added, codes, scales, grid)
        error -= added * grid.dequantize(codes, scales).sub_(weight).square_().sum(1)
        nearest = grid.quantize(weight, fixed)
        change = grid.dequantize(nearest, fixed).sub_(weight)
        worse = error > _damped_error(change[:, order], factor) - added * change.square().sum(1)
        codes[worse] = nearest[worse]
        for name in scales:
            scales[name][worse] = fixed[name][worse]
        return codes, scales

    def _feed_back(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor,
        fixed: dict[str, torch.Tensor],
        grid: Grid,
        order: torch.Tensor,
        factor: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Codes `(out, in)` in the original order, scales, and the damped output error of each row `(out,)`."""
        import torch

        from haversack.kernels.feedback import padded_rows

        out_features, in_features = weight.shape
        scales = {name: tensor.clone() for name, tensor in fixed.items()}
        rows = padded_rows(out_features)
        original = torch.zeros(in_features, rows)  # a column of the matrix is contiguous
        torch.index_select(weight.T, 0, order, out=original[:, :out_features])
        target = original.clone()
        codes = torch.empty(in_features, out_features, dtype=torch.uint8)
        error = torch.zeros(rows)
        diagonal = factor.diagonal()
        block_size = self.block_size if self.static_groups else grid.group_size or in_features
        scalar = grid.scalar_codes(scales)
        for start in range(0, in_features, block_size):
            block = slice(start, min(start + block_size, in_features))
            if not self.static_groups:  # scales of this group from what feedback has made of its columns
                for name, fitted in grid.fit(target[block, :out_features].T, importance[block]).items():
                    scales[name][:, start // block_size] = fitted[:, 0]
                scalar = grid.scalar_codes(scales)
            feedback = (factor[block, block] / diagonal[block]).T.contiguous()  # R_jk / R_kk at [k, j]
            args = (target[block], original[block], feedback, diagonal[block].square(), order[block])
            if scalar is not None:
                found, change = _round_compiled(*args, scalar, error)
            else:
                found, change = _round_columns(*args, grid, scales, error, out_features)
            codes[order[block]] = found[:, :out_features]
            rest = slice(block.stop, in_features)
            if block.stop < in_features:
                target[rest].addmm_((factor[block, rest] / diagonal[rest]).T, change, alpha=-1)
        return codes.T.contiguous(), scales, error[:out_features]

    def _sweep(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        added: float,
        codes: torch.Tensor,
        scales: dict[str, torch.Tensor],
        grid: Grid,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Better codes `(out, in)` under `scales`, which are bettered in place, and the damped error of each row.

        With `G = E H`, column k is best at the code nearest to `w_k - (G_k - e_k H_kk) / H_kk`, and the scale of a
        group whose codes are `u` (zero taken off) is best moved by `-(u . G) / (u H u)`. Neither can raise the error.
        """
        import torch

        from haversack.kernels.feedback import padded_rows

        out_features, in_features = weight.shape
        rows = padded_rows(out_features)
        original, change = torch.zeros(in_features, rows), torch.zeros(in_features, rows)
        original[:, :out_features] = weight.T
        change[:, :out_features] = grid.dequantize(codes, scales).sub_(weight).T
        diagonal = hessian.diagonal() + added
        product = torch.addmm(change, hessian, change, beta=added)  # (H + added I) E^T
        unused = torch.zeros(rows)
        width = grid.group_size or self.block_size
        error = (change * product).sum(0)
        for _ in range(self.num_sweeps):
            for start in range(0, in_features, width):
                block = slice(start, min(start + width, in_features))
                before, among = change[block].clone(), hessian[block, block].float().clone()
                among.diagonal().add_(added)
                now, pull = before, product[block]
                if grid.group_size and (scalar := grid.scalar_codes(scales)) is not None:
                    now = before + self._rescale(grid, scales, scalar, start // width, codes[:, block], among, pull)
                    pull = pull + among @ (now - before)
                feedback = among / diagonal[block, None]
                target = original[block] - pull / diagonal[block, None] + now
                target.addmm_(feedback.tril(-1), now)
                columns = torch.arange(block.start, block.stop)
                args = (target, original[block], feedback, diagonal[block].contiguous(), columns)
                scalar = grid.scalar_codes(scales)
                if scalar is not None:
                    found, after = _round_compiled(*args, scalar, unused)
                else:
                    found, after = _round_columns(*args, grid, scales, unused, out_features)
                codes[:, block] = found[:, :out_features].T
                product.addmm_(hessian[:, block].float(), after - before)
                product[block] += added * (after - before)
                change[block] = after
            last, error = error, (change * product).sum(0)
            if float(error.sum()) > (1 - _LEAST_GAIN) * float(last.sum()):
                break
        return codes, error[:out_features]

    def _rescale(
        self,
        grid: Grid,
        scales: dict[str, torch.Tensor],
        scalar: ScalarCodes,
        group: int,
        codes: torch.Tensor,
        among: torch.Tensor,
        pull: torch.Tensor,
    ) -> torch.Tensor:
        """Write the best storable scales of one group under its codes `(out, columns)`; what that adds to its columns,
        `(columns, rows)`."""
        import torch

        scale = scalar.scale[:, group]
        steps = torch.zeros_like(pull)
        steps[:, : len(scale)] = scalar.steps(codes, group).T
        slope, curve = (steps * pull).sum(0)[: len(scale)], (steps * (among @ steps)).sum(0)[: len(scale)]
        wanted = scale - slope / curve.clamp_min(1e-30)
        by = grid.set_scale(scales, group, wanted) - scale
        worse = 2 * by * slope + by.square() * curve >= 0  # rounded to where it was, or past the best
        grid.set_scale(scales, group, torch.where(worse, scale, wanted))
        by[worse] = 0
        steps[:, : len(scale)] *= by
        return steps


def _damped_error(change: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`|change R|^2` of each row `(out,)`; what lies below R's diagonal is not multiplied."""
    import torch

    error = torch.zeros(change.shape[0])
    for start in range(0, change.shape[1], _ERROR_COLUMNS):
        stop = min(start + _ERROR_COLUMNS, change.shape[1])
        error += (change[:, :stop] @ factor[:stop, start:stop]).square_().sum(1)
    return error


def _round_compiled(
    target: torch.Tensor,
    original: torch.Tensor,
    feedback: torch.Tensor,
    square: torch.Tensor,
    columns: torch.Tensor,
    scalar: ScalarCodes,
    error: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and changes `(columns, rows)` of one block by compiled code, for few values per group."""
    import torch.nn.functional as F

    from haversack.kernels.feedback import round_block

    padding = (0, error.numel() - scalar.scale.shape[0])
    scale, zero = (F.pad(t.T, padding).contiguous() for t in (scalar.scale, scalar.zero))
    group = columns // scalar.group_columns
    args = (target, original, feedback, square, group, scale, zero, error, scalar.num_codes)
    places, change = round_block(*args, scalar.values)
    return (places if scalar.codes is None else scalar.codes[places.int()]), change


def _round_columns(
    target: torch.Tensor,
    original: torch.Tensor,
    feedback: torch.Tensor,
    square: torch.Tensor,
    columns: torch.Tensor,
    grid: Grid,
    scales: dict[str, torch.Tensor],
    error: torch.Tensor,
    out_features: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for any grid, by torch's operations on one column after another: some twenty times slower."""
    import torch

    codes = torch.empty(len(columns), out_features, dtype=torch.uint8)
    change = torch.zeros_like(target)  # e_j: what rounding added to the original column
    for k, column in enumerate(columns.tolist()):
        wanted = target[k, :out_features]
        if k:
            wanted = torch.addmv(wanted, change[:k, :out_features].T, feedback[k, :k], alpha=-1)
        code = grid.quantize(wanted[:, None], scales, column)
        value = grid.dequantize(code, scales, column)[:, 0]
        codes[k] = code[:, 0]
        torch.sub(value, original[k, :out_features], out=change[k, :out_features])
        error[:out_features].add_((value - wanted).square_(), alpha=square[k].item())
    return codes, change
