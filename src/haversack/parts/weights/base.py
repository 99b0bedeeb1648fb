"""The whole contract of weight parts, and the option that composes them.

An option is a composition, one part per stage: transform -> select -> factor -> grid -> rounding -> correct; or one code
that keeps the matrix as it is, in fewer bytes.
The parts meet in a `WeightTask`, the working state of one site while it is packed: each transform rewrites the matrix
(and the second-order statistics with it), the rounding chooses codes on the grid, corrections store what the grid
left over. At run time the same parts compute `y = x W^T` from what they stored, each adding its contribution.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor, total_bytes
from haversack.parts.base import Part, part_from_dict

if TYPE_CHECKING:
    import torch

    from haversack.describe.stored_form import StoredCodes
    from haversack.kernels.format import PackedFormat, PlaneFormat
    from haversack.kernels.ir_superscales import SuperscaleCase


@dataclass
class WeightTask:
    """Working state of one site while it is packed; all in float32.

    Parts put other tensors in the place of these, and never write into them: many tasks share one `hessian`.
    `weight` is `(out_features, in_features)`: what remains to be represented. `hessian` is `(in, in)`, the mean of
    `x x^T` over calibration tokens (None without calibration). `row_importance` is `(out,)` or None. `notes` collects
    what had to be changed (damping raised, a group padded); they end up in the pack log, never silently. `stored` holds
    the integers that the checkpoint stores the matrix as, where it does. `attended` is `hessian` of tokens that count by the attention
    they get, where that was asked for.
    """

    weight: torch.Tensor
    hessian: torch.Tensor | None = None
    row_importance: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)
    stored: StoredCodes | None = None
    attended: torch.Tensor | None = None


class WeightPart(Part):
    """A part of the weights resident."""

    resident: ClassVar[str] = "weights"

    @abstractmethod
    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        """The tensors this part stores for a matrix of this shape; exact, and all of them."""


class Transform(WeightPart):
    """Rewrites the matrix before it is represented, and the input at run time, so that the product is unchanged."""

    stage: ClassVar[str] = "transform"

    @abstractmethod
    def apply(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        """Put others in place of `task.weight` and `task.hessian`; return what must be stored. `grid` comes after."""

    @abstractmethod
    def transform_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The input `(..., in_features)` in the transformed basis, in its own dtype."""

    @abstractmethod
    def restore_rows(self, rows: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rows `(n, in_features)` of the transformed matrix, float32, back in the matrix's own basis."""

    @abstractmethod
    def workspace_bytes(self, num_tokens: int, in_features: int, dtype: str) -> int:
        """The most bytes `transform_input` allocates, its result included."""


@dataclass(frozen=True)
class ScalarCodes:
    """What a grid of few values per group computes: code `q` from 0 to `num_codes - 1` stands for `(q - zero) * scale`.

    `scale` and `zero` are `(out, groups)` float32; column c belongs to group `c // group_columns`. The nearest code of
    `w` is `clamp(round(w / scale) + zero)`, and 0 with a scale of 0. With `values`, rising, place `p` stands for
    `values[p] * scale` instead, and the grid's code is `codes[p]`.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    num_codes: int
    group_columns: int
    values: tuple[float, ...] | None = None
    codes: torch.Tensor | None = None

    def steps(self, codes: torch.Tensor, group: int) -> torch.Tensor:
        """What codes `(out, columns)` of one group stand for at scale 1, float32."""
        import torch

        if self.values is None:
            return codes - self.zero[:, group : group + 1]
        table = torch.zeros(self.num_codes)
        places = torch.arange(len(self.values)) if self.codes is None else self.codes.int()
        table[places] = torch.tensor(self.values)
        return table[codes.int()]


class Grid(WeightPart):
    """The set of values a weight can take, and how codes and scales are stored.

    `fit` chooses scales for a block of columns; `quantize` and `dequantize` map values to codes and back under those
    scales; `pack` maps codes and scales to stored tensors. Codes are uint8 `(out, in)`. Columns that do not fill the
    last group are padded inside, stored and counted. `group_size` 0 is one group per row.
    """

    stage: ClassVar[str] = "grid"

    group_size: int
    activation_bits: int = 16
    """Of the input as the kernel multiplies it: 16 as it is, or 8."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def padded_to(self) -> int:
        """Of how many columns `padded_features` is a multiple."""
        return self.group_size

    @property
    def num_states(self) -> int:
        """In how many ways the codes before can bear on a code's value; 0 for grids without memory."""
        return 0

    def num_groups(self, in_features: int) -> int:
        """Groups of columns per row, the last one possibly padded."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def padded_features(self, in_features: int) -> int:
        """Columns that are stored: `in_features` rounded up to whole groups."""
        return self.num_groups(in_features) * self.group_size if self.group_size else in_features

    @abstractmethod
    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Scales (and zero points), one row per row of `weight` `(out, columns)`; `importance` is `(columns,)`."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        """Nearest codes, uint8, of columns `first_column ...` under the scales of the whole matrix."""

    @abstractmethod
    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        """Values, float32, of codes."""

    def branches(self, history: torch.Tensor, scales: Mapping[str, torch.Tensor], column: int) -> torch.Tensor:
        """The value of every code at a column, float32 `(rows, paths, codes)`, after paths `(rows, paths)` of codes.

        A path is an int64 with the newest code in its lowest bits. Grids without memory answer `(rows, 1, codes)`.
        """
        import torch

        codes = torch.arange(1 << self.bits, dtype=torch.uint8)
        values = [self.dequantize(code.expand(len(history), 1), scales, column) for code in codes]
        return torch.cat(values, 1)[:, None]

    def scalar_codes(self, scales: Mapping[str, torch.Tensor]) -> ScalarCodes | None:
        """What `quantize` and `dequantize` compute, for roundings in compiled code; None for other grids."""
        return None

    @abstractmethod
    def set_scale(self, scales: dict[str, torch.Tensor], group: int, scale: torch.Tensor) -> torch.Tensor:
        """Write the storable scales nearest to `scale` `(out,)` for one group; returns them, float32."""

    @abstractmethod
    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors, named and shaped as `stored` declares."""

    @abstractmethod
    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        """`x W^T` for `x` `(..., in_features)`, straight from the stored tensors."""

    @abstractmethod
    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """Rows of the matrix, `(len(index), in_features)` float32: an embedding lookup, or a tile for tests."""

    @abstractmethod
    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The most bytes `matmul` allocates beyond its output for `num_tokens` rows of input of `dtype`."""

    @abstractmethod
    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The most bytes `rows` allocates for so many rows, its result included."""

    @abstractmethod
    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        """The kernel that `matmul` runs through on this machine."""

    def kernel_format(self, in_features: int) -> PackedFormat | PlaneFormat | None:
        """The stored tensors in the kernels' words, and what the registry chooses a kernel by; None where rows are decoded."""
        return None

    def superscale_case(self, in_features: int) -> SuperscaleCase | None:
        """How scales must be written out before kernels read them; None where those read them as they are stored."""
        return None

    def scale_rows(self, in_features: int) -> int:
        """Rows whose scales are written out at once, where they are."""
        raise AssertionError(f"{self.id} has no scales to write out")

    def decode_seconds(self, num_weights: int) -> float:
        """What decoding so many weights takes one thread, beside reading them; nothing where a kernel multiplies as it
        reads."""
        return 0.0

    @property
    def float_scales(self) -> str | None:
        """The stored float16 tensor `(out, pieces)` that a row's values are proportional to, piece by piece; None for other
        grids."""
        return None

    def scale_columns(self, in_features: int) -> int:
        """Columns that share one of `float_scales`."""
        return in_features


class Rounding(WeightPart):
    """How codes are chosen on a grid. Stores nothing of its own."""

    stage: ClassVar[str] = "rounding"

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return ()

    @abstractmethod
    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Codes `(out, in)` and the grid's scales for `task.weight`."""


class Correction(WeightPart):
    """Stores and adds back part of the matrix: taken off before the grid sees it, or of what the grid left over."""

    stage: ClassVar[str] = "correct"

    before: ClassVar[bool] = False
    """Whether it is `take_off` that is called, or `correct`."""

    rounds: int = 1
    """How often rounding and `correct` take turns."""

    def take_off(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        """Store part of `task.weight`, which the grid then goes without."""
        raise AssertionError(f"{self.id} corrects what the grid left over")

    def correct(self, task: WeightTask, approximation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Store a correction of `task.weight - approximation`."""
        raise AssertionError(f"{self.id} is taken off before the grid")

    @abstractmethod
    def contribute(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        """What to add to the grid's product, `(..., out_features)`."""

    @abstractmethod
    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """What to add to the grid's rows, `(len(index), in_features)` float32."""

    @abstractmethod
    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The most bytes `rows` allocates, its result included."""

    @abstractmethod
    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The most bytes `contribute` allocates, its result included."""


class Stack(Correction):
    """A correction in blocks, the first of which are a shorter one to the bit: any number of them makes a matrix of its own.

    The tensors of block n are named `n.<name>`, from 0.
    """

    blocks: int

    @abstractmethod
    def shortened(self, blocks: int) -> Stack:
        """The first `blocks` of it."""


class Code(WeightPart):
    """Stores the whole matrix, in the checkpoint's own dtype, to the bit.

    How many bytes that takes depends on the values: a code sets room aside, so that its bytes are known, and holds the
    matrices that fit into it.
    """

    stage: ClassVar[str] = "code"
    lossless: ClassVar[bool] = True
    dtype: ClassVar[str]
    """The one dtype that it codes, by its name in safetensors."""

    @abstractmethod
    def needed_bits(self, weight: torch.Tensor) -> float:
        """What of the room set aside `weight` `(out, in)` would take, in bits per weight."""

    @abstractmethod
    def holds(self, weight: torch.Tensor) -> bool:
        """Whether `encode` has room for `weight` `(out, in)`."""

    @abstractmethod
    def encode(self, task: WeightTask) -> dict[str, torch.Tensor]:
        """The stored tensors. Raises CheckpointError for a matrix of another dtype, or one that there is no room for."""

    @abstractmethod
    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        """`x W^T` for `x` `(..., in_features)`, as torch computes it from the matrix."""

    @abstractmethod
    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """Rows `(len(index), in_features)` of the matrix, in its own dtype."""

    @abstractmethod
    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The most bytes `matmul` allocates beyond its result for `num_tokens` rows of input of `dtype`."""

    @abstractmethod
    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        """The kernel that `matmul` runs through on this machine."""

    @abstractmethod
    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The most bytes `rows` allocates for so many rows, its result included."""

    @abstractmethod
    def decode_seconds(self, num_weights: int) -> float:
        """What decoding so many weights takes one thread, beside reading them."""


@dataclass(frozen=True)
class WeightOption:
    """A composition of parts at a weight site, or a code alone. Without either it is *neutral*: the checkpoint's dtype,
    untouched."""

    grid: Grid | None = None
    rounding: Rounding | None = None
    transforms: tuple[Transform, ...] = ()
    corrections: tuple[Correction, ...] = ()
    code: Code | None = None

    def __post_init__(self) -> None:
        alone = self.grid is None and self.rounding is None and not self.transforms and not self.corrections
        if self.code is not None and not alone:
            raise UsageError(f"{self.code.id} keeps a matrix as it is; no other part goes with it.")

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        middle: tuple[WeightPart, ...] = tuple(p for p in (self.grid, self.rounding, self.code) if p is not None)
        return (*self.transforms, *middle, *self.corrections)

    @property
    def lossless(self) -> bool:
        """Whether everything that the checkpoint says of the matrix is kept."""
        return self.grid is None or self.keeps_codes

    @property
    def keeps_codes(self) -> bool:
        """Whether the checkpoint's own codes are kept on their grid: encoding needs them beside the matrix."""
        alone = not self.transforms and not self.corrections
        return alone and self.rounding is not None and self.rounding.lossless

    @property
    def is_neutral(self) -> bool:
        return not self.parts

    @property
    def activation_bits(self) -> int:
        """Of the input as it is multiplied: 16 as it is, or 8."""
        return 16 if self.grid is None else self.grid.activation_bits

    @property
    def stack(self) -> Stack | None:
        """The correction that comes in blocks, where there is one: the last."""
        last = self.corrections[-1] if self.corrections else None
        return last if isinstance(last, Stack) else None

    @property
    def least_blocks(self) -> int:
        """Blocks of the stack without which nothing is left of the matrix: none, or the first where the grid stores nothing."""
        return int(self.stack is not None and self.grid is not None and not self.grid.stored(1, 1))

    def shortened(self, blocks: int) -> WeightOption:
        """With the first `blocks` of its stack alone: it stores the same tensors without those of the other blocks."""
        assert self.stack is not None and self.least_blocks <= blocks <= self.stack.blocks
        kept = (self.stack.shortened(blocks),) if blocks else ()
        return dataclasses.replace(self, corrections=(*self.corrections[:-1], *kept))

    def block_of(self, name: str) -> int | None:
        """The stack's block that a stored tensor belongs to, None for what lies below the stack."""
        prefix = f"correct{len(self.corrections) - 1}."
        return int(name.removeprefix(prefix).split(".")[0]) if self.stack and name.startswith(prefix) else None

    @cached_property
    def label(self) -> str:
        """A few words for tables, unique among options."""
        return " + ".join(part.label for part in self.parts) or "as is"

    def stored(self, out_features: int, in_features: int, dtype: str) -> tuple[StoredTensor, ...]:
        """Declared tensors; names carry the stage's index where a stage may repeat (`correct0.up`)."""
        if self.code is not None:
            return self.code.stored(out_features, in_features)
        if self.grid is None:
            return (StoredTensor("weight", dtype, (out_features, in_features)),)
        declared: list[StoredTensor] = []
        for i, transform in enumerate(self.transforms):
            declared += [t.prefixed(f"transform{i}") for t in transform.stored(out_features, in_features)]
        declared += self.grid.stored(out_features, in_features)
        for i, correction in enumerate(self.corrections):
            declared += [t.prefixed(f"correct{i}") for t in correction.stored(out_features, in_features)]
        return tuple(declared)

    def stored_bytes(self, out_features: int, in_features: int, dtype: str) -> int:
        return total_bytes(self.stored(out_features, in_features, dtype))

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The most bytes `linear` allocates beyond its result for `num_tokens` rows of input of `dtype`."""
        if self.code is not None:
            return self.code.workspace_bytes(num_tokens, out_features, in_features, dtype)
        if self.grid is None:
            from haversack.kernels.ir_dense import workspace_bytes

            return workspace_bytes(num_tokens, in_features) if dtype == "BF16" else 0
        transformed = sum(t.workspace_bytes(num_tokens, in_features, dtype) for t in self.transforms)
        running = [self.grid.workspace_bytes(num_tokens, out_features, in_features, dtype)]
        running += [c.workspace_bytes(num_tokens, out_features, in_features, dtype) for c in self.corrections]
        return transformed + max(running)

    def rows_workspace_bytes(self, num_rows: int, in_features: int, dtype: str) -> int:
        """The most bytes that a lookup of rows allocates beyond its result of `dtype`: they are made in float32."""
        if self.code is not None:
            made = self.code.rows_bytes(num_rows, in_features)
            is_result = dtype == self.code.dtype
            return made - num_rows * in_features * DTYPE_BYTES[dtype] if is_result else made
        if self.grid is None:
            return 0
        result_bytes = 4 * num_rows * in_features
        after = [t.workspace_bytes(num_rows, in_features, "F32") for t in self.transforms]
        after += [c.rows_bytes(num_rows, in_features) for c in self.corrections]
        made = self.grid.rows_bytes(num_rows, in_features) + max(after, default=0)
        return made - result_bytes if dtype == "F32" else made

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        """The kernel that `linear` runs through on this machine."""
        if self.code is not None:
            return self.code.kernel_name(num_tokens, out_features, in_features, dtype)
        if self.grid is None:
            return "torch linear"
        return self.grid.kernel_name(num_tokens, out_features, in_features, dtype)

    def decode_seconds(self, num_weights: int) -> float:
        """What one thread takes to turn so many stored weights into numbers, where no kernel multiplies as it reads."""
        decoding = self.code or self.grid
        return decoding.decode_seconds(num_weights) if decoding is not None else 0.0

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.code is not None:
            data["code"] = self.code.to_dict()
        if self.transforms:
            data["transforms"] = [part.to_dict() for part in self.transforms]
        if self.grid is not None:
            data["grid"] = self.grid.to_dict()
        if self.rounding is not None:
            data["rounding"] = self.rounding.to_dict()
        if self.corrections:
            data["corrections"] = [part.to_dict() for part in self.corrections]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightOption:
        return cls(
            grid=part_from_dict(data["grid"]) if "grid" in data else None,  # type: ignore[arg-type]
            rounding=part_from_dict(data["rounding"]) if "rounding" in data else None,  # type: ignore[arg-type]
            transforms=tuple(part_from_dict(d) for d in data.get("transforms", ())),  # type: ignore[misc]
            corrections=tuple(part_from_dict(d) for d in data.get("corrections", ())),  # type: ignore[misc]
            code=part_from_dict(data["code"]) if "code" in data else None,  # type: ignore[arg-type]
        )

    def encode(self, task: WeightTask) -> dict[str, torch.Tensor]:
        """Pack `task.weight`: the stored tensors by declared name. `task` is consumed."""
        if self.code is not None:
            return self.code.encode(task)
        if self.grid is None:
            return {"weight": task.weight}
        in_features = task.weight.shape[1]
        padding = self.grid.padded_features(in_features) - in_features
        if padding:
            task.notes.append(f"{in_features} columns padded by {padding} to whole groups of {self.grid.padded_to}")
        assert self.rounding is not None, "a grid needs a rounding"
        tensors: dict[str, torch.Tensor] = {}
        for i, transform in enumerate(self.transforms):
            tensors |= {f"transform{i}.{k}": v for k, v in transform.apply(task, self.grid).items()}
        stored, corrections = self._corrected(task)
        for i, of_one in corrections.items():
            tensors |= {f"correct{i}.{k}": v for k, v in of_one.items()}
        return tensors | stored

    def _corrected(self, task: WeightTask) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
        """The grid's tensors, and each correction's: what goes first, then in turns with rounding what corrects the grid."""
        import torch

        assert self.grid is not None and self.rounding is not None
        every = torch.arange(len(task.weight))
        found: dict[int, dict[str, torch.Tensor]] = {}
        for i, correction in enumerate(self.corrections):
            if correction.before:
                found[i] = correction.take_off(task, self.grid)
                task.weight = task.weight - correction.rows(every, found[i], task.weight.shape[1])
        after = [i for i, correction in enumerate(self.corrections) if not correction.before]
        codes, scales = self.rounding.round(task, self.grid)
        for turn in range(max((self.corrections[i].rounds for i in after), default=0)):
            held = sum(self.corrections[i].rows(every, found[i], task.weight.shape[1]) for i in after if i in found)
            if turn:
                left = dataclasses.replace(task, weight=task.weight - held, notes=[])
                codes, scales = self.rounding.round(left, self.grid)
            approximation = self.grid.dequantize(codes, scales)
            for i in after:
                found[i] = self.corrections[i].correct(task, approximation)
                approximation = approximation + self.corrections[i].rows(every, found[i], task.weight.shape[1])
        return self.grid.pack(codes, scales), found

    def linear(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        """`x W^T` for `x` `(..., in_features)` from the stored tensors."""
        if self.code is not None:
            return self.code.matmul(x, tensors, out_features)
        if self.grid is None:
            import torch.nn.functional as F

            # As a matrix: from a strided (1, 1, in) input, as a model's last hidden state is, torch would clone the weight.
            rows = F.linear(x.reshape(-1, x.shape[-1]), tensors["weight"])
            return rows.view(*x.shape[:-1], out_features)
        for i, transform in enumerate(self.transforms):
            x = transform.transform_input(x, strip(tensors, f"transform{i}."))
        y = self.grid.matmul(x, tensors, out_features)
        for i, correction in enumerate(self.corrections):
            y += correction.contribute(x, strip(tensors, f"correct{i}."), out_features)
        return y

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """Rows `(len(index), in_features)`: float32 from a grid, the checkpoint's dtype if nothing is lost."""
        if self.code is not None:
            return self.code.rows(index, tensors, in_features)
        if self.grid is None:
            return tensors["weight"][index]
        rows = self.grid.rows(index, tensors, in_features)
        for i, correction in enumerate(self.corrections):
            rows += correction.rows(index, strip(tensors, f"correct{i}."), in_features)
        for i, transform in reversed(list(enumerate(self.transforms))):
            rows = transform.restore_rows(rows, strip(tensors, f"transform{i}."))
        return rows

    def dense(self, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> torch.Tensor:
        """The whole matrix that the stored tensors stand for, `(out, in)`, float32 unless nothing is lost."""
        import torch

        return self.rows(torch.arange(out_features), tensors, in_features)


def strip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
