"""Watching matrix products as they happen: which parameter met which input, and what came out.

A torch function mode sees every product with a watched parameter, however the model writes it: a linear, a transposed
Conv1D, one expert of a stack. A parameter is recognised by its storage, an expert by its place in it. Products that
read the same input (query, key and value) share one second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_INPUT_FIRST = {F.linear: 0, torch.matmul: 0, torch.mm: 0, torch.Tensor.matmul: 0, torch.Tensor.__matmul__: 0,
                torch.Tensor.mm: 0, torch.addmm: 1}  # fmt: skip
"""Position of the input among the arguments; the matrix follows it."""

_BLOCK_COLUMNS = 1024
"""Columns per block of a second moment: only blocks on and above the diagonal are computed."""


@dataclass(frozen=True, order=True)
class ProductKey:
    """A watched parameter by name, and the expert where it is a stack."""

    parameter: str
    expert: int = -1


class StopForwardError(Exception):
    """Raised by a callback to end a forward that has shown what was wanted."""


class ProductObserver(TorchFunctionMode):
    """Calls `on_input(key, x)` before and `on_output(key, x, y)` after each product with a watched parameter.

    `x` is `(tokens, in)` and `y` has the product's own shape `(..., out)`. Lookups in a watched embedding call
    `on_lookup(key, index, rows)`, which returns the rows to go on with.
    """

    def __init__(
        self,
        watched: Mapping[str, torch.Tensor],
        *,
        on_input: Callable[[ProductKey, torch.Tensor], None] | None = None,
        on_output: Callable[[ProductKey, torch.Tensor, torch.Tensor], None] | None = None,
        on_lookup: Callable[[ProductKey, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): (name, p) for name, p in watched.items()}
        self._on_input, self._on_output, self._on_lookup = on_input, on_output, on_lookup

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INPUT_FIRST:
            at = _INPUT_FIRST[func]
            x = args[at] if len(args) > at else kwargs.get("input")
            matrix = args[at + 1] if len(args) > at + 1 else kwargs.get("weight")
            key = self._key(matrix)
            if key is not None and x is not None:
                rows = x.detach().reshape(-1, x.shape[-1])
                if self._on_input is not None:
                    self._on_input(key, rows)
                output = func(*args, **kwargs)
                if self._on_output is not None:
                    self._on_output(key, rows, output)
                return output
        elif func is F.embedding and self._on_lookup is not None:
            index = args[0] if args else kwargs["input"]
            key = self._key(args[1] if len(args) > 1 else kwargs["weight"])
            if key is not None:
                return self._on_lookup(key, index, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _key(self, matrix: Any) -> ProductKey | None:
        if not isinstance(matrix, torch.Tensor) or matrix.device.type == "meta":
            return None
        found = self._names.get(matrix.untyped_storage().data_ptr())
        if found is None:
            return None
        name, parameter = found
        if parameter.ndim < 3:
            return ProductKey(name)
        return ProductKey(name, (matrix.storage_offset() - parameter.storage_offset()) // parameter.stride(0))


class SecondMoment:
    """Sum of `x x^T` over tokens in float32, and their number. Bytes: `4 in^2`."""

    def __init__(self, in_features: int):
        self.sum = torch.zeros(in_features, in_features)
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """`x` is `(tokens, in)`, any dtype; products are computed in float32."""
        with _exact_bfloat16_products(x.dtype):
            x = x.float()
            self.num_tokens += x.shape[0]
            for start in range(0, x.shape[1], _BLOCK_COLUMNS):
                stop = start + _BLOCK_COLUMNS
                self.sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def mean(self) -> torch.Tensor:
        """The mean, `(in, in)`, with the blocks below the diagonal filled in; zeros without tokens. In place: call
        once."""
        for start in range(0, self.sum.shape[0], _BLOCK_COLUMNS):
            stop = start + _BLOCK_COLUMNS
            self.sum[stop:, start:stop] = self.sum[start:stop, stop:].T
        return self.sum.div_(max(1, self.num_tokens))


def _exact_bfloat16_products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """`products_in_bfloat16` where that rounds nothing: values that came as bfloat16."""
    return products_in_bfloat16() if dtype == torch.bfloat16 else nullcontext()


@contextmanager
def products_in_bfloat16() -> Iterator[None]:
    """Lets oneDNN multiply float32 matrices as bfloat16 with float32 sums, twice as fast (measured with AVX-512 BF16)."""
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class GradientMoment:
    """Squared gradients at a product's output, per output, and how the tokens of a sequence act together.

    A change of the matrix moves all tokens of a sequence at once, and where they meet again (values under attention)
    their effects add before they are squared. For a change without a preferred direction the exact expectation, for
    output o, is `|sum_s g_so x_s|^2` per sequence; independent tokens would give `sum_s g_so^2 mean_s |x_s|^2`. The
    quotient of the two corrects `mean g^2` (weight sharing in Kronecker factors: Eschenhagen et al. 2023, arXiv
    2311.00636, section 3.2; the quotient is ours). Bytes: 8 per output.
    """

    def __init__(self, out_features: int):
        self._squares = torch.zeros(out_features)
        self._together = torch.zeros(out_features)
        self._input_squares = 0.0
        self._num_rows = 0

    def add(self, x: torch.Tensor, gradient: torch.Tensor, num_tokens: int) -> None:
        """`x` `(rows, in)` and `gradient` `(rows, out)`; rows are whole sequences of `num_tokens`, or tokens of any."""
        self._squares += gradient.float().square().sum(0)
        self._input_squares += x.float().square().sum().item()
        self._num_rows += x.shape[0]
        step = num_tokens if x.shape[0] % num_tokens == 0 else x.shape[0]
        for start in range(
            0, x.shape[0], max(1, step)
        ):  # labels are independent: sequences never add up in expectation
            together = gradient[start : start + step].T @ x[start : start + step].to(gradient.dtype)
            self._together += together.float().square_().sum(1)

    def means(self, num_tokens: int) -> torch.Tensor:
        """`(2, out)`, per token of all `num_tokens` that were run: `g^2`, and what it would have to be for tokens that
        act together to be independent."""
        mean_input_squares = max(self._input_squares / max(1, self._num_rows), 1e-30)
        return torch.stack([self._squares, self._together / mean_input_squares]) / num_tokens


@dataclass
class InputSharing:
    """Which watched parameters read the same input, in the order in which they are used: owner -> members."""

    members: dict[str, list[str]] = field(default_factory=dict)
    in_features: dict[str, int] = field(default_factory=dict)
    _owner_by_input: dict[tuple, str] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)  # an address means an input only while it lives

    def see(self, key: ProductKey, x: torch.Tensor) -> None:
        if any(key.parameter in names for names in self.members.values()):
            return
        self._alive.append(x)
        identity = (x.data_ptr(), x._version, tuple(x.shape), x.stride())
        owner = self._owner_by_input.setdefault(identity, key.parameter)
        self.members.setdefault(owner, []).append(key.parameter)
        self.in_features[owner] = x.shape[1]

    def forget_inputs(self) -> None:
        """Free the inputs once the forward is over."""
        self._owner_by_input.clear()
        self._alive.clear()
