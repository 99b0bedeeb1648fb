"""Sites: the places in a model where a choice is made.

A weight site is one matrix `(out_features, in_features)` in the sense of `y = x W^T`, wherever its numbers lie in the
checkpoint: a whole linear, one expert of a stacked tensor, one part of a fused projection, a transposed Conv1D, an
embedding (whose rows are looked up). An attention site is one layer's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from haversack.ledger import DTYPE_BYTES

ROLES = (
    "embedding", "position", "head",
    "query", "key", "value", "output", "qkv",
    "gate", "up", "down", "router", "other",
)  # fmt: skip
"""What a matrix does. Hugging Face names are translated into these once, in `describe`, and nowhere else."""


@dataclass(frozen=True)
class TensorSlice:
    """Where a site's numbers lie in the checkpoint: `tensor[index]`, transposed if `transposed`.

    `index` holds one `(start, stop)` per leading dimension that is cut; a leading dimension cut to length one that is
    dropped (an expert of a stack) is written `(e, e + 1)` with `squeeze` set. `row_step` 2 takes every second row,
    from the start of the row range (interleaved gate and up rows). After slicing, squeezing and transposing the result
    is `(rows, in_features)`.
    """

    tensor: str
    index: tuple[tuple[int, int], ...] = ()
    squeeze: bool = False
    transposed: bool = False
    row_step: int = 1


@dataclass(frozen=True)
class WeightSite:
    """One matrix to choose an option for.

    `id` is unique and stable: the module's path, with `#part` for a part of a fused or stacked parameter
    (`...qkv_proj#query`, `...experts#3.gate`). `module` and `parameter` say who uses it in the transformers model;
    `module_slice` cuts that parameter. `pieces` say where the rows lie in the checkpoint, concatenated in order.
    `tied_modules` read the same storage (a tied head). `layer` is None outside the layers.
    """

    id: str
    role: str
    layer: int | None
    out_features: int
    in_features: int
    dtype: str
    module: str
    parameter: str
    pieces: tuple[TensorSlice, ...]
    module_slice: TensorSlice
    bias: bool = False
    tied_modules: tuple[str, ...] = ()
    expert: int | None = None

    @property
    def num_parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def num_bytes(self) -> int:
        """Bytes in the checkpoint's own dtype."""
        return self.num_parameters * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class AttentionSite:
    """One layer's keys and values.

    `window_tokens` is the sliding window or None; `chunk_tokens` the chunked-attention length or None; `softcap` the
    logit cap or None; `has_sinks` learned sink logits; `shares_with` the layer whose keys and values are reused.
    `is_latent` says that the cache keeps one compressed latent per token (as its one head of keys) and one rotary key
    (as its values), from which every head's keys and values are expanded. `rope_theta` is the base of a rotary embedding of
    whole heads without scaling; None for any other, and where there is none.
    """

    id: str
    layer: int
    module: str
    num_heads: int
    num_kv_heads: int
    key_head_dim: int
    value_head_dim: int
    window_tokens: int | None = None
    chunk_tokens: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    shares_with: int | None = None
    is_latent: bool = False
    rope_theta: float | None = None

    def bytes_per_token(self, dtype: str = "BF16") -> int:
        """Keys and values of one token in a 16-bit cache; 0 where another layer's are reused."""
        if self.shares_with is not None:
            return 0
        return self.num_kv_heads * (self.key_head_dim + self.value_head_dim) * DTYPE_BYTES[dtype]
