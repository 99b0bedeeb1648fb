"""The whole contract of optimizer parts, and the option that composes them.

An option is a composition, one part per stage: rule -> subspace -> state -> residual. The *rule* (AdamW, Muon, SGD with
momentum) turns a gradient and its moments into a direction. The *subspace* says which share of a matrix's gradient has
moments at all (none: all of it), the *state* how moments are stored (none: in the weight's own dtype), the *residual* what
becomes of the rest of the gradient (none: it is dropped). Every option builds one ordinary `torch.optim.Optimizer`
(`engine/composed_optimizer.py`), whose state holds the declared tensors and nothing else.

A subspace is for matrices inside the layers. Embeddings, the head and vectors keep all of their moments, under AdamW where
the rule is for matrices alone. Matrices are seen with their shorter side first: `(short, long)`.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.errors import UsageError
from haversack.ledger import StoredTensor, total_bytes
from haversack.parts.base import Part, check_range, part_from_dict

if TYPE_CHECKING:
    import torch

STEP = StoredTensor("step", "F32", ())
"""Steps of one tensor so far, counted in a float32 scalar on the host as torch does."""

BASIS = "basis"
"""The name under which a subspace's basis is kept."""

PIECE_ELEMENTS = 2**17
"""Elements updated at a time where numbers don't depend on each other: their moments, gradient and weight stay in a core's cache,
and workspace does not grow with the tensor."""


class OptimizerPart(Part):
    """A part of the optimizer's state."""

    resident: ClassVar[str] = "optimizer"


@dataclass(frozen=True)
class Moment:
    """A tensor that a rule keeps of a weight's history. `signed` says whether it can be negative; one that is not `coded`
    stays as it is whatever the state's precision."""

    name: str
    shape: tuple[int, ...]
    signed: bool
    coded: bool = True


@dataclass(frozen=True)
class Update:
    """What a rule wants subtracted: `step_size * numerator / denominator` (no denominator: 1)."""

    numerator: torch.Tensor
    denominator: torch.Tensor | None
    step_size: float

    def apply(self, weight: torch.Tensor) -> None:
        """Subtract from `weight`, in place and in its own dtype's arithmetic if dtypes agree, else in the update's."""
        target = weight if weight.dtype == self.numerator.dtype else weight.to(self.numerator.dtype)
        if self.denominator is None:
            target.add_(self.numerator, alpha=-self.step_size)
        else:
            target.addcdiv_(self.numerator, self.denominator, value=-self.step_size)
        if target is not weight:
            weight.copy_(target)

    def direction(self) -> torch.Tensor:
        """The update per unit of step size."""
        return self.numerator if self.denominator is None else self.numerator / self.denominator


class Rule(OptimizerPart):
    """How a gradient and its moments become a direction. Its fields are the defaults of the parameter groups."""

    stage: ClassVar[str] = "rule"
    elementwise: ClassVar[bool] = True
    """Whether each number depends on its own history alone, so that tensors can be updated piece by piece."""
    matrices_only: ClassVar[bool] = False
    """Whether it is for matrices inside the layers; all else is AdamW's."""
    in_subspaces: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of float32 scalars that it keeps of each tensor."""

    lr: float
    weight_decay: float

    def defaults(self) -> dict[str, Any]:
        """Hyper-parameters of a parameter group."""
        return dataclasses.asdict(self)

    @abstractmethod
    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """The moments of a gradient of this shape."""

    def begin(
        self,
        grad: torch.Tensor,
        scalars: Mapping[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
        parameter: torch.Tensor,
    ) -> Any:
        """Whatever of one step concerns a whole tensor; passed to `update` for each piece. `step` counts from 1."""
        return step

    @abstractmethod
    def update(
        self, grad: torch.Tensor, moments: Mapping[str, torch.Tensor], begun: Any, group: Mapping[str, Any]
    ) -> Update:
        """Change the moments in place and say what to subtract. Nothing else is changed."""


class Subspace(OptimizerPart):
    """The share of a matrix's gradient that has moments: `(rank, long)` of `(short, long)`.

    `rank` is a whole number, or below 1 a share of the shorter side. The basis is made anew every `refresh_steps` steps.
    """

    stage: ClassVar[str] = "subspace"
    resets_moments: ClassVar[bool] = False
    """Whether moments begin again when the basis is made anew."""
    keeps_basis: ClassVar[bool] = False
    """Whether the basis is kept, since it can't be made again; otherwise it is made at each step."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of float32 scalars that it keeps of each tensor."""

    rank: float
    refresh_steps: int

    def __post_init__(self) -> None:
        check_range(self.id, "rank", self.rank, "a whole number, or a share below 1", _is_rank(self.rank))
        check_range(self.id, "refresh_steps", self.refresh_steps, "1 or more", self.refresh_steps >= 1)

    def rank_of(self, short: int) -> int:
        """Rows of the reduced gradient."""
        return min(short, ceil(self.rank * short) if self.rank < 1 else int(self.rank))

    def refreshes(self, step: int, scalars: Mapping[str, torch.Tensor]) -> bool:
        """Whether the basis is made anew at this step."""
        return (step - 1) % self.refresh_steps == 0

    def refreshed(
        self, step: int, scalars: Mapping[str, torch.Tensor], before: torch.Tensor, made: torch.Tensor
    ) -> None:
        """Told each basis that was made anew, and the one `before` it, of subspaces that have `scalars`."""

    def basis_precision(self, state: StatePrecision | None) -> StatePrecision | None:
        """How the basis is stored, where moments are stored as `state`."""
        return state

    def basis_moment(self, short: int) -> Moment | None:
        """What is kept of the basis, as moments are kept; None where a seed brings it back."""
        return Moment(BASIS, (short, self.rank_of(short)), signed=True) if self.keeps_basis else None

    @abstractmethod
    def basis(self, grad: torch.Tensor, step: int, seed: int) -> torch.Tensor:
        """A basis made for a gradient `(short, long)` at this step: float32, or whole numbers that name rows."""

    @abstractmethod
    def reduce(self, grad: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """`(rank, long)` of `(short, long)`."""

    @abstractmethod
    def expand(self, reduced: torch.Tensor, basis: torch.Tensor, short: int) -> torch.Tensor:
        """`(short, long)` of `(rank, long)`."""


class StatePrecision(OptimizerPart):
    """How a moment is stored: read and written in pieces, as float32."""

    stage: ClassVar[str] = "state"

    @abstractmethod
    def stored(self, moment: Moment) -> tuple[StoredTensor, ...]:
        """The tensors of one moment; exact, and all of them. Zeros stand for zeros."""

    def shared(self) -> dict[str, torch.Tensor]:
        """Tables that all moments share; made once for an optimizer, and never changed."""
        return {}

    @abstractmethod
    def read(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        """A piece of the flattened moment, a new float32 tensor. Pieces begin at multiples of `PIECE_ELEMENTS`."""

    @abstractmethod
    def write(
        self,
        stored: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        moment: Moment,
        piece: slice,
        values: torch.Tensor,
    ) -> None:
        """Store a piece; `values` are left as they are."""


@dataclass(frozen=True)
class Reduced:
    """One step of a matrix in its subspace: the gradient `(short, long)`, its reduced form and the rule's direction there
    `(rank, long)`."""

    subspace: Subspace
    basis: torch.Tensor
    grad: torch.Tensor
    reduced: torch.Tensor
    direction: torch.Tensor

    def expand(self, reduced: torch.Tensor) -> torch.Tensor:
        return self.subspace.expand(reduced, self.basis, self.grad.shape[0])


class Residual(OptimizerPart):
    """What becomes of the gradient outside the subspace."""

    stage: ClassVar[str] = "residual"
    scalars: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def combine(self, step: Reduced, scalars: Mapping[str, torch.Tensor], lr_per_step_size: float) -> torch.Tensor:
        """The direction of the whole matrix `(short, long)`, a new tensor. What is to be scaled by the learning rate alone
        is multiplied by `lr_per_step_size`."""


@dataclass(frozen=True)
class OptimizerOption:
    """A composition of parts. With a rule alone it is *neutral*: the rule as torch has it, states in the weight's dtype."""

    rule: Rule
    subspace: Subspace | None = None
    state: StatePrecision | None = None
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if self.subspace is not None and not self.rule.in_subspaces:
            raise UsageError(f"{self.rule.id} needs whole gradients, so it takes no subspace ({self.subspace.id}).")
        if self.residual is not None and self.subspace is None:
            raise UsageError(f"{self.residual.id} is about what a subspace leaves out, but there is no subspace.")

    @property
    def parts(self) -> tuple[OptimizerPart, ...]:
        return tuple(p for p in (self.rule, self.subspace, self.state, self.residual) if p is not None)

    @property
    def is_neutral(self) -> bool:
        return self.parts == (self.rule,)

    @property
    def label(self) -> str:
        return " + ".join(part.label for part in self.parts)

    def at(self, shape: tuple[int, ...], *, inner: bool) -> OptimizerOption:
        """What is done with one tensor: this for matrices inside the layers (`inner`); elsewhere without a subspace."""
        if inner and len(shape) == 2:
            return self
        rule = self.rule
        if rule.matrices_only:
            from haversack.parts.optimizer.adamw import AdamW

            rule = AdamW()
        return OptimizerOption(rule, state=self.state)

    def kept(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """The moments of one tensor that has all of this option, and the basis where it is kept."""
        basis = None if self.subspace is None else self.subspace.basis_moment(min(shape))
        return (*(() if basis is None else (basis,)), *self.rule.moments(self.reduced_shape(shape)))

    def precision_of(self, moment: Moment) -> StatePrecision | None:
        """How one of `kept` is stored; None in a float's width."""
        if moment.name == BASIS and self.subspace is not None:
            return self.subspace.basis_precision(self.state)
        return self.state if moment.coded else None

    def reduced_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that moments have."""
        if self.subspace is None:
            return shape
        return (self.subspace.rank_of(min(shape)), max(shape))

    def stored(self, shape: tuple[int, ...], dtype: str, *, inner: bool) -> tuple[StoredTensor, ...]:
        """The states of one tensor whose copy in the optimizer has `dtype`; exact, and all of them."""
        option = self.at(shape, inner=inner)
        rule, subspace, state, residual = option.rule, option.subspace, option.state, option.residual
        declared = [STEP] if rule.counts_steps or subspace is not None else []
        for moment in option.kept(shape):
            precision = option.precision_of(moment)
            if precision is not None:
                declared += precision.stored(moment)
            else:
                declared.append(StoredTensor(moment.name, dtype if state is None else "F32", moment.shape))
        names = rule.scalars + (residual.scalars if residual is not None else ())
        names += subspace.scalars if subspace is not None else ()
        return (*declared, *(StoredTensor(name, "F32", ()) for name in names))

    def stored_bytes(self, shape: tuple[int, ...], dtype: str, *, inner: bool) -> int:
        return total_bytes(self.stored(shape, dtype, inner=inner))

    @property
    def shared_bytes(self) -> int:
        """Bytes of the tables that all tensors share."""
        return 0 if self.state is None else sum(t.nbytes for t in self.state.shared().values())

    def to_dict(self) -> dict[str, Any]:
        return {part.stage: part.to_dict() for part in self.parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OptimizerOption:
        parts = {stage: part_from_dict(fields) for stage, fields in data.items()}
        return cls(**parts)  # type: ignore[arg-type]


def _is_rank(rank: float) -> bool:
    return not isinstance(rank, bool) and rank > 0 and (rank < 1 or rank == int(rank))
