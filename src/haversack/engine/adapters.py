"""Low-rank adapters beside frozen matrices, whose base is as it is or packed in 4 bits and unpacked for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.packed_tensor import PackedTensor
from haversack.parts.weights.base import WeightTask
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.low_rank import LowRankCorrection, finds_every_direction

ATTENTION_ROLES = ("query", "key", "value", "output", "qkv")
LINEAR_ROLES = (*ATTENTION_ROLES, "gate", "up", "down")
TARGETS = {"query-value": ("query", "value", "qkv"), "attention": ATTENTION_ROLES, "linear": LINEAR_ROLES}

BASE_GRID = IntegerGrid(bits=4, group_size=64, search=False)
"""The packed base of QLoRA here: integers per group, 4.25 bits per weight."""

UNPACK_ELEMENTS = 2**20
"""Elements unpacked at a time in float32: 4 MiB of workspace beside the unpacked matrix in the input's dtype."""

DECOMPOSE_ROUNDS = 8
"""Turns of rounding and of the product that takes up its error, at most; they end where the error no longer falls."""

DECOMPOSE_BYTES_PER_ELEMENT, EVERY_DIRECTION_BYTES = {"F32": 19, "BF16": 23}, 11
"""What they hold beside matrix and stored tensors, by the matrix's dtype: 17.7 to 18.6 and 21.7 to 22.6 were counted on
matrices of 0.07 to 0.8 million elements; of smaller ones, all of whose singular vectors are found, up to 11 more."""

PACK_ELEMENTS = 2**18
"""Elements rounded at a time."""

PACK_BYTES_PER_ELEMENT = {"F32": 9, "BF16": 13}
"""What rounding holds for each of them beside matrix and stored tensors, by the matrix's dtype: 8.5 to 9.1 and 12.5 to 13.1
were counted on matrices of 0.07 to 2.4 million elements."""


ReadMatrix = Callable[[str], torch.Tensor]
"""A parameter's values by its name, for those that were left unread."""


class LowRankAdapter(nn.Module):
    """`y = base(x) + scale * (x A^T) B^T` with `A` `(rank, in)` and `B` `(out, rank)`; the base is frozen. While training, the share `dropout` of
    the numbers that `A` meets is dropped, which keeps them and a byte each for the backward pass.

    Adds `rank * (in + out)` trained weights, which may be kept in more bits than activations have: they are rounded where they meet
    them. Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    first_up: torch.Tensor
    first_down: torch.Tensor

    def __init__(
        self, base: nn.Module, out_features: int, in_features: int, rank: int, dtype: torch.dtype, dropout: float = 0.0
    ):
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.scale = 1.0
        self.down = nn.Parameter(torch.empty(rank, in_features, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype))
        with torch.no_grad():
            self.down.normal_(std=in_features**-0.5)

    def start_from(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Begin at a product that is not zero, which is kept: the adapter of the base as it was is this one less where it began."""
        with torch.no_grad():
            self.up.copy_(up)
            self.down.copy_(down)
        self.register_buffer("first_up", self.up.detach().clone(), persistent=False)
        self.register_buffer("first_down", self.down.detach().clone(), persistent=False)

    def change(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(up, down) of what was added since it began: of twice the rank where it did not begin at zero."""
        up, down = self.up.detach(), self.down.detach()
        if not hasattr(self, "first_up"):
            return up, down
        return torch.cat([up, -self.first_up], 1), torch.cat([down, self.first_down])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.dropout and self.training:
            x, _ = torch.native_dropout(x, self.dropout, True)
        z = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y + (z if self.scale == 1.0 else z * self.scale)


class PackedLinear(nn.Module):
    """A frozen matrix on the grid `BASE_GRID`, with a backward pass to its input: each product unpacks the matrix, uses
    it and drops it, so that neither pass keeps it."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, in_features: int, bias: nn.Parameter | None):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.in_features = in_features
        self.bias = bias

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix `(out, in)`."""
        out_features = self.codes.shape[0]
        weight = torch.empty(out_features, self.in_features, dtype=dtype, device=self.codes.device)
        rows = max(1, UNPACK_ELEMENTS // self.in_features)
        stored = {"codes": self.codes, "scales": self.scales}
        for start in range(0, out_features, rows):
            index = torch.arange(start, min(start + rows, out_features), device=self.codes.device)
            weight[start : start + rows] = BASE_GRID.rows(index, stored, self.in_features)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: PackedLinear) -> torch.Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.unpack(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.matrix.unpack(grad.dtype), None


def reads_one_by_one(model: Model) -> bool:
    """Whether matrices that will be packed need never be there together: stacked experts stay as they are, and such models are loaded whole."""
    return not any(site.expert is not None for site in model.weights) and not any(
        site.shares_with is not None for site in model.attention
    )


def adapt(
    model: nn.Module,
    described: Model,
    *,
    rank: int,
    targets: str,
    packed: bool,
    dtype: torch.dtype,
    kind: Callable[..., nn.Module] = LowRankAdapter,
    dropout: float = 0.0,
    decomposed: bool = False,
    read: ReadMatrix | None = None,
) -> None:
    """Freeze `model` and put an adapter beside each whole linear of its layers, or another `kind` of what is trained of them; with
    `packed`, pack those linears that are not packed yet. Matrices that were left on meta are read by `read`, one at a time.

    `targets` names the adapted roles (`TARGETS`). Stacked experts stay frozen as they are. With `decomposed`, matrices are packed so that what
    adapters begin with takes up the error (`decompose`).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    roles = TARGETS[targets]
    for site, module in whole_linears(model, described):
        wanted = site.role in roles
        if not (wanted or packed):
            continue
        is_packed = isinstance(module.weight, PackedTensor)
        matrix = None if is_packed else matrix_of(module, site, read if packed else None)
        start = decompose(module, matrix, rank) if decomposed and wanted and matrix is not None else None
        if start is not None:
            base: nn.Module = start[0]
        else:
            base = _packed_linear(module, matrix) if packed and matrix is not None else module
        del matrix
        if wanted:
            base = kind(base, site_out(module), site_in(module), rank, dtype)
            if isinstance(base, LowRankAdapter):
                base.dropout = dropout
                if start is not None:
                    base.start_from(*start[1:])
        parent, _, name = site.module.rpartition(".")
        setattr(model.get_submodule(parent), name, base)


def whole_linears(model: nn.Module, described: Model) -> Iterator[tuple[WeightSite, nn.Module]]:
    """Each linear of the layers that `model` still has, once, with the first of its sites."""
    seen = set()
    for site in described.weights:
        if site.layer is None or site.role not in LINEAR_ROLES or site.expert is not None or site.module in seen:
            continue
        try:
            module = model.get_submodule(site.module)
        except AttributeError:
            continue  # the layer was left out
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            seen.add(site.module)
            yield site, module


def site_out(module: nn.Module) -> int:
    """Rows of a linear, or of a transposed Conv1D."""
    return module.get_parameter("weight").shape[1 if hasattr(module, "nf") else 0]


def site_in(module: nn.Module) -> int:
    """Columns of a linear, or of a transposed Conv1D."""
    return module.get_parameter("weight").shape[0 if hasattr(module, "nf") else 1]


def matrix_of(module: nn.Module, site: WeightSite, read: ReadMatrix | None) -> torch.Tensor:
    """`(out, in)` as it lies, or read."""
    weight: Any = module.weight if read is None else read(f"{site.module}.weight")
    return weight.detach().T if hasattr(module, "nf") else weight.detach()


def _packed_linear(module: nn.Module, matrix: torch.Tensor) -> PackedLinear:
    """The module's linear with `matrix` on the grid in place of its own, rounded a block of rows at a time."""
    out_features, in_features = matrix.shape
    declared = {t.name: t for t in BASE_GRID.stored(out_features, in_features)}
    codes = torch.empty(declared["codes"].shape, dtype=torch.uint8)
    scales = torch.empty(declared["scales"].shape, dtype=torch.float16)
    if matrix.device.type != "meta":
        pack_rows(matrix, codes, scales)
    bias: Any = module.bias
    return PackedLinear(codes, scales, in_features, bias)


def decompose_bytes(out_features: int, in_features: int, rank: int, dtype: str) -> int:
    """What `decompose` holds at most beside a matrix of `dtype` and its stored tensors."""
    found = EVERY_DIRECTION_BYTES if finds_every_direction(out_features, in_features, rank) else 0
    return (DECOMPOSE_BYTES_PER_ELEMENT[dtype] + found) * out_features * in_features


def decompose(module: nn.Module, weight: torch.Tensor, rank: int) -> tuple[PackedLinear, torch.Tensor, torch.Tensor]:
    """A linear as a packed matrix and a product `up` `(out, rank)`, `down` `(rank, in)` that takes up its error, found in turns: round what the product
    leaves, then take the leading singular directions of what rounding leaves; the best turn's. Its error is never more than rounding's alone, beyond the
    factors' rounding to float16. Source: Guo et al. 2023, arXiv 2311.12023, algorithm 1, without weights."""
    rank = min(rank, *weight.shape)
    best = _packed_linear(module, weight)
    up, down = (torch.zeros(shape) for shape in ((weight.shape[0], rank), (rank, weight.shape[1])))
    if weight.device.type == "meta":
        return best, up, down
    matrix = weight.float()
    least, packed, result = float("inf"), best, (best, up, down)
    for _ in range(DECOMPOSE_ROUNDS):
        factors = LowRankCorrection(rank).correct(WeightTask(matrix), packed.unpack(torch.float32))
        product = factors["up"].float() @ factors["down"].float()
        error = float((matrix - product).sub_(packed.unpack(torch.float32)).norm())
        if error >= least:
            break
        least, result = error, (packed, factors["up"], factors["down"])
        packed = _packed_linear(module, matrix - product)
    return result


def pack_rows(matrix: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Round a matrix `(out, in)` into its stored tensors."""
    rows = max(1, PACK_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        block = matrix[start : start + rows].float()
        fitted = BASE_GRID.fit(block)
        packed = BASE_GRID.pack(BASE_GRID.quantize(block, fitted), fitted)
        codes[start : start + rows], scales[start : start + rows] = packed["codes"], packed["scales"]
