"""Low-rank adapters beside frozen matrices, whose base is as it is or packed in 4 bits and unpacked for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.connections import PartialConnections
from haversack.engine.packed_tensor import PackedTensor
from haversack.parts.weights.integer import IntegerGrid

ATTENTION_ROLES = ("query", "key", "value", "output", "qkv")
LINEAR_ROLES = (*ATTENTION_ROLES, "gate", "up", "down")
TARGETS = {"query-value": ("query", "value", "qkv"), "attention": ATTENTION_ROLES, "linear": LINEAR_ROLES}

BASE_GRID = IntegerGrid(bits=4, group_size=64, search=False)
"""The packed base of QLoRA here: integers per group, 4.25 bits per weight."""

UNPACK_ELEMENTS = 2**20
"""Elements unpacked at a time in float32: 4 MiB of workspace beside the unpacked matrix in the input's dtype."""

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
    kind: type[LowRankAdapter] | type[PartialConnections] = LowRankAdapter,
    dropout: float = 0.0,
    read: ReadMatrix | None = None,
) -> None:
    """Freeze `model` and put an adapter beside each whole linear of its layers, or another `kind` of what is trained of them; with
    `packed`, pack those linears that are not packed yet. Matrices that were left on meta are read by `read`, one at a time.

    `targets` names the adapted roles (`TARGETS`). Stacked experts stay frozen as they are.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    roles = TARGETS[targets]
    for site, module in whole_linears(model, described):
        wanted = site.role in roles
        if not (wanted or packed):
            continue
        base = _pack(module, site, read) if packed and not isinstance(module.weight, PackedTensor) else module
        if wanted:
            base = kind(base, site_out(module), site_in(module), rank, dtype)
            if isinstance(base, LowRankAdapter):
                base.dropout = dropout
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


def _pack(module: nn.Module, site: WeightSite, read: ReadMatrix | None = None) -> PackedLinear:
    """Round a linear to the grid's nearest codes, a block of rows at a time."""
    out_features, in_features = site_out(module), site_in(module)
    weight: Any = module.weight if read is None else read(f"{site.module}.weight")
    declared = {t.name: t for t in BASE_GRID.stored(out_features, in_features)}
    codes = torch.empty(declared["codes"].shape, dtype=torch.uint8)
    scales = torch.empty(declared["scales"].shape, dtype=torch.float16)
    if weight.device.type != "meta":
        matrix = weight.detach().T if hasattr(module, "nf") else weight.detach()
        pack_rows(matrix, codes, scales)
    bias: Any = module.bias
    return PackedLinear(codes, scales, in_features, bias)


def pack_rows(matrix: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Round a matrix `(out, in)` into its stored tensors."""
    rows = max(1, PACK_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        block = matrix[start : start + rows].float()
        fitted = BASE_GRID.fit(block)
        packed = BASE_GRID.pack(BASE_GRID.quantize(block, fitted), fitted)
        codes[start : start + rows], scales[start : start + rows] = packed["codes"], packed["scales"]
