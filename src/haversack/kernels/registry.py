"""Which kernel computes from a packed matrix, for this shape, on this machine; and the contracts they all keep.

    packed_matmul   x (..., in) times a packed (out, in) matrix, transposed: (..., out)
    packed_rows     some rows of a packed matrix: an embedding lookup

A kernel declares what it supports and the workspace it allocates, and the first that supports a case computes it, in
the order fast to general, unless a measurement on this machine has chosen another (`choices.py`). `kernel_name` tells
which; nothing falls back without that name changing. Matrices of bit planes have kernels of their own. The operators
themselves (`torch.ops.haversack.*`) are registered when first used, so that asking for names and bytes stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from haversack.errors import UsageError
from haversack.kernels.format import PackedFormat, PlaneFormat

if TYPE_CHECKING:
    import torch

    from haversack.kernels.choices import Choice
    from haversack.kernels.planes import CompiledPlanes, CompiledPlaneTiles


class PackedKernel(Protocol):
    """An object, or a module, with these names is a kernel; `x` is `(tokens, in)` and contiguous."""

    @property
    def NAME(self) -> str: ...

    @property
    def activation_bits(self) -> int:
        """What its dot products take: 16 (floats) or 8 (int8)."""

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool: ...

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int: ...

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor: ...


def packed_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    activation_bits: int = 16,
    table: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """`x W^T`, `(..., out)` in x's dtype, from packed codes uint8 `(out, row_bytes)` in layout `rows-v1`.

    `scales` is `(out, groups)`, float16, or uint8 exponents e of 2^(e - 127), where 0 stands for 0; `zeros` uint8
    `(out, groups)`, or None for a symmetric grid. With a `table` of 2^bits values (2 to 4 bits) a code stands for its
    value there. `group_size` 0 means one group per row. `activation_bits` 16 computes with the activations as they are (at most rounded to
    bfloat16 on long inputs); 8 quantizes them to int8 per group of columns, which is faster and has a damage of its
    own. Allocates at most `workspace_bytes` beyond its result.
    """
    import haversack.kernels.operators as operators

    return operators.packed_matmul(x, codes, scales, zeros, bits, group_size, in_features, activation_bits, table)


def packed_rows(
    index: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    table: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """Rows `index` (integers, any shape) of the packed matrix: float32 `(*index.shape, in)`."""
    import haversack.kernels.operators as operators

    return operators.packed_rows(index, codes, scales, zeros, bits, group_size, in_features, table)


def kernel_name(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    activation_bits: int = 16,
    dtype: torch.dtype | None = None,
    table: tuple[float, ...] | None = None,
    scales: str = "f16",
) -> str:
    """Name of the kernel that computes this case here. `dtype` is that of the activations, float32 if not given."""
    import torch

    fmt = PackedFormat(bits, group_size, in_features, symmetric, table, scales)
    return choose(fmt, num_tokens, out_features, dtype or torch.float32, activation_bits).name


def workspace_bytes(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    activation_bits: int = 16,
    dtype: torch.dtype | None = None,
    table: tuple[float, ...] | None = None,
    scales: str = "f16",
) -> int:
    """The most bytes `packed_matmul` allocates beyond its result for `num_tokens` rows of input."""
    import torch

    dtype = dtype or torch.float32
    fmt = PackedFormat(bits, group_size, in_features, symmetric, table, scales)
    kernel = choose_kernel(fmt, num_tokens, dtype, activation_bits)  # a measured one takes no more
    return kernel.workspace_bytes(fmt, num_tokens, out_features, dtype, activation_bits)


def rows_bytes(
    num_rows: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    table: tuple[float, ...] | None = None,
    scales: str = "f16",
) -> int:
    """The most bytes `packed_rows` allocates for so many rows, its float32 result included."""
    from haversack.kernels import generic, ir_dequantize

    fmt = PackedFormat(bits, group_size, in_features, symmetric, table, scales)
    if ir_dequantize.supports(fmt):
        return 4 * num_rows * fmt.unit_columns
    return 4 * num_rows * in_features + generic.rows_workspace_bytes(fmt, num_rows)


@dataclass(frozen=True)
class Chosen:
    """A kernel, the most threads it should take (None: all), and whether a measurement on this machine chose them."""

    kernel: Any
    threads: int | None = None
    measured: bool = False

    @property
    def name(self) -> str:
        """For `verify` and tables: a measured choice says so."""
        if not self.measured:
            return str(self.kernel.NAME)
        return f"{self.kernel.NAME} (measured{f', at most {self.threads} threads' if self.threads else ''})"


def choose_kernel(
    fmt: PackedFormat | PlaneFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int, device_type: str = "cpu"
) -> Any:
    """The kernel of `choose`, for a matrix of whatever number of rows: no measurement is asked. A `PackedKernel`, or one of
    `planes.py`."""
    return choose(fmt, num_tokens, None, dtype, activation_bits, device_type).kernel


@lru_cache(maxsize=4096)
def choose(
    fmt: PackedFormat | PlaneFormat,
    num_tokens: int,
    out_features: int | None,
    dtype: torch.dtype,
    activation_bits: int,
    device_type: str = "cpu",
) -> Chosen:
    """The first kernel, fast to general, that supports the case; or the one that a measurement on this machine chose
    (`choices.py`), unless it would take more workspace than the first. Compiled kernels are for the CPU.

    For 8-bit activations a kernel with int8 dot products comes before those that round and multiply floats.
    """
    able = _contenders(fmt, num_tokens, dtype, activation_bits, device_type)
    first = able[0]
    if device_type != "cpu" or out_features is None:
        return Chosen(first)
    from haversack.kernels import choices

    kept = choices.kept(choices.case_key(fmt, num_tokens, _name(dtype), activation_bits))
    if kept is None:
        return Chosen(first)
    most = first.workspace_bytes(fmt, num_tokens, out_features, dtype, activation_bits)
    for kernel in (*able, *_widened(fmt, num_tokens, dtype, activation_bits)):
        bytes_ = kernel.workspace_bytes(fmt, num_tokens, out_features, dtype, activation_bits)
        if kept.kernel == kernel.NAME and bytes_ <= most:
            return Chosen(kernel, kept.threads, True)
    return Chosen(first)


def measure_choice(
    fmt: PackedFormat | PlaneFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
) -> tuple[str, Choice]:
    """Time the contenders of a case on random weights; its key and the choice, for `choices.keep`.

    Weights are pieces of the matrix, of `MEASURED_BYTES` at most, in copies that rotate over `ROTATED_BYTES`: so much is
    allocated, and freed.
    """
    import torch

    from haversack.kernels import choices
    from haversack.kernels.threads import at_most

    contest = _contest(fmt, out_features)
    x = torch.randn(num_tokens, fmt.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    able = _contenders(fmt, num_tokens, dtype, activation_bits, "cpu")
    able += _widened(fmt, num_tokens, dtype, activation_bits)
    sizes = [k.workspace_bytes(fmt, num_tokens, contest.num_rows, dtype, activation_bits) for k in able]
    by_name = {k.NAME: k for k, size in zip(able, sizes, strict=True) if size <= sizes[0]}

    def run(name: str, threads: int, copy: int) -> None:
        with at_most(threads):
            contest.run(by_name[name], x, copy, activation_bits)

    found = choices.fastest(list(by_name), run, contest.num_copies, torch.get_num_threads())
    return choices.case_key(fmt, num_tokens, _name(dtype), activation_bits), found


def forget_choices() -> None:
    """Ask the file of measured choices again: it was written, or the cache's folder is another."""
    from haversack.kernels import choices

    choices.forget()
    choose.cache_clear()


MEASURED_BYTES, ROTATED_BYTES = 4 << 20, 48 << 20
"""Of one matrix that contenders are timed on, and of all its copies: more than the caches of common machines hold."""


class _Contest(NamedTuple):
    num_rows: int
    num_copies: int
    run: Callable[[Any, torch.Tensor, int, int], object]


def _contest(fmt: PackedFormat | PlaneFormat, out_features: int) -> _Contest:
    """Random weights of a format, and how a kernel computes from a copy of them."""
    import torch

    def random_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    if isinstance(fmt, PlaneFormat):
        num_blocks = max(1, min(-(-out_features // 16), MEASURED_BYTES // fmt.block_bytes))
        copies = max(1, ROTATED_BYTES // (num_blocks * fmt.block_bytes))
        codes = random_bytes(copies, num_blocks, fmt.block_bytes)
        scales = torch.full((num_blocks, fmt.num_groups, fmt.scales_per_group, 16), 0.01, dtype=torch.float16)
        rows = 16 * num_blocks
        return _Contest(rows, copies, lambda k, x, i, bits: k.matmul(x, codes[i], scales, rows, fmt, bits))
    rows = max(1, min(out_features, MEASURED_BYTES // fmt.row_bytes))
    copies = max(1, ROTATED_BYTES // (rows * fmt.row_bytes))
    codes = random_bytes(copies, rows, fmt.row_bytes)
    groups = (rows, fmt.num_groups)
    scales = torch.full(groups, 0.01, dtype=torch.float16)
    zeros = None if fmt.symmetric else torch.full(groups, 1, dtype=torch.uint8)
    if fmt.scales == "e8m0":
        scales = torch.full(groups, 120, dtype=torch.uint8)
    return _Contest(rows, copies, lambda k, x, i, bits: k.matmul(x, codes[i], scales, zeros, fmt, bits))


def _widened(fmt: PackedFormat | PlaneFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> list[Any]:
    """Kernels for few tokens that could compute more than they are taken for without a measurement."""
    case = (fmt, num_tokens, dtype, activation_bits)
    few = [k for k in _every(fmt) if hasattr(k, "widened") and not k.supports(*case)]
    return [wider for wider in [k.widened() for k in few] if wider.supports(*case)]


def _every(fmt: PackedFormat | PlaneFormat, device_type: str = "cpu") -> tuple[Any, ...]:
    return plane_kernels() if isinstance(fmt, PlaneFormat) else kernels(device_type)


def _contenders(
    fmt: PackedFormat | PlaneFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int, device_type: str
) -> list[Any]:
    """Kernels that support the case, the one to take without a measurement first."""
    if activation_bits not in (8, 16):
        raise UsageError(f"activation_bits is 16 (as they are) or 8 (quantized per group), got {activation_bits}")
    able = [k for k in _every(fmt, device_type) if k.supports(fmt, num_tokens, dtype, activation_bits)]
    return sorted(able, key=lambda k: k.activation_bits != activation_bits)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def kernels(device_type: str = "cpu") -> tuple[PackedKernel, ...]:
    """All kernels of packed matrices for a device of this machine, fast to general."""
    from haversack.kernels import compiled, generic
    from haversack.kernels.llvm import host_target
    from haversack.kernels.torch_packed import TorchTiles

    if device_type != "cpu":
        return (*(triton_kernels() if device_type == "cuda" else ()), generic)
    target = host_target()
    own = (*compiled.matvecs(target), compiled.CompiledTiles(target))
    return (*own, *(TorchTiles(bits) for bits in (8, 4)), generic)


@cache
def triton_kernels() -> tuple[PackedKernel, ...]:
    """Triton's, fast to general; none where it is not installed (`pip install 'haversack[gpu]'`)."""
    if not has_triton():
        return ()
    from haversack.kernels.triton_matmul import TritonKernel

    return (TritonKernel(tiles=False), TritonKernel(tiles=True))


@cache
def has_triton() -> bool:
    """Whether triton can be imported. On a CPU its kernels run in its interpreter alone, to be tested."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


@cache
def plane_kernels() -> tuple[CompiledPlanes | CompiledPlaneTiles, ...]:
    """All kernels of bit planes for this machine's CPU, fast to general."""
    from haversack.kernels import planes
    from haversack.kernels.llvm import host_target

    return planes.plane_kernels(host_target())
