"""What litgpt's LoRA allocates in a step, from its own order of operations traced on tensors without memory.

Its decoder differs from transformers' in what it keeps for the backward pass: queries, keys and values come from one product, whose
result lives as long as the values do; low-rank updates of it are put in place by `index_copy`, which keeps its source
(`lit_gpt/lora.py`, `LoRAQKVLinear.zero_pad`); norms of root mean squares work in 32 bits (`lit_gpt/rmsnorm.py`). In 4 bits, bitsandbytes
keeps the input of every frozen product (`MatMul4Bit.forward`: `ctx.tensors = (A, B)`), and unpacks a matrix in float16, as Lightning
Fabric quantized it (`_Linear4bit.quantize`), before it is cast to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from haversack.engine.trace import LiveBytes
from haversack.errors import UsageError

RANK, DROPOUT = 8, 0.05
"""`finetune/lora.py`: low-rank updates of queries and values alone."""

VOCABULARY_MULTIPLE = 512
"""`lit_gpt/config.py` pads the vocabulary of families that say nothing else."""


@dataclass(frozen=True)
class Shape:
    """A model as litgpt builds it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rotary_dim: int
    is_llama: bool
    """Gated feed-forward, norms of root mean squares, no biases, one sublayer after the other."""
    shares_norm: bool
    """Attention and feed-forward read the same normalised input."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a config in transformers' words. Raises UsageError for a family that is not described here."""
        family, hidden = config["model_type"], config["hidden_size"]
        if family not in ("phi", "gpt_neox", "llama", "falcon"):
            raise UsageError(f"litgpt's {family} is not described here; these are: phi, gpt_neox, llama, falcon.")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", config.get("num_kv_heads", heads))
        if family == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
            kv_heads = 1
        head_dim = hidden // heads
        share = {"phi": 0.5, "gpt_neox": 0.25}.get(family, 1.0)
        vocabulary = config["vocab_size"]
        if family == "gpt_neox":
            vocabulary = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=config.get("intermediate_size", 4 * hidden),
            vocab_size=vocabulary,
            rotary_dim=int(head_dim * config.get("rotary_pct", config.get("partial_rotary_factor", share))),
            is_llama=family == "llama",
            shares_norm=family == "phi" or (family == "falcon" and not config.get("new_decoder_architecture")),
        )


def peak_bytes(
    config: Mapping[str, Any], *, batch_size: int, tokens: int, bytes_per_weight: float | None = None
) -> float:
    """The most bytes of a step's tensors with AdamW's states there, in bfloat16; of matrices `bytes_per_weight` where they are in 4 bits."""
    shape = Shape.of(config)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = _Model(shape, packed=bytes_per_weight is not None)
        finally:
            torch.set_default_dtype(torch.float32)
        trained = [p for p in model.parameters() if p.requires_grad]
        states = [torch.zeros_like(p) for p in trained for _ in range(2)]
        gradients = [torch.zeros_like(p) for p in trained]  # 128 samples make a step: those before are there
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64)
        logits = model(ids)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, shape.vocab_size), ids[:, 1:].reshape(-1))
        loss.backward()
        peak = live.peak_bytes
        del states
    return peak + (0.0 if bytes_per_weight is None else bytes_per_weight * model.num_packed_weights)


class _Packed(nn.Module):
    """A frozen product in 4 bits, whose codes are counted by the caller."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__()
        self.shape = (out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _KeepsInput.apply(x, self.shape, self.bias)


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None) -> torch.Tensor:
        ctx.kept, ctx.shape = x, shape
        return F.linear(x, _unpacked(shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ _unpacked(ctx.shape, grad.dtype), None, None


def _unpacked(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16).to(dtype)


class _Model(nn.Module):
    def __init__(self, shape: Shape, *, packed: bool):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape, packed=packed) for _ in range(shape.num_layers))
        self.norm = _norm(shape)
        self.head = _linear(shape.hidden_size, shape.vocab_size, packed=packed, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("low_rank" in name)

    @property
    def num_packed_weights(self) -> int:
        return sum(prod(m.shape) for m in self.modules() if isinstance(m, _Packed))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class _Layer(nn.Module):
    def __init__(self, shape: Shape, *, packed: bool):
        super().__init__()
        hidden, inner, has_bias = shape.hidden_size, shape.intermediate_size, not shape.is_llama
        self.shape = shape
        self.widths = [n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
        self.norm_1 = _norm(shape)
        self.norm_2 = None if shape.shares_norm else _norm(shape)
        self.fused = _linear(hidden, sum(self.widths), packed=packed, bias=has_bias)
        self.out = _linear(hidden, hidden, packed=packed, bias=has_bias)
        self.up = _linear(hidden, inner, packed=packed, bias=has_bias)
        self.gate = _linear(hidden, inner, packed=packed, bias=False) if shape.is_llama else None
        self.down = _linear(inner, hidden, packed=packed, bias=has_bias)
        self.low_rank_a = nn.Parameter(torch.empty(2 * RANK, hidden))
        self.low_rank_b = nn.Parameter(torch.empty(self.widths[0] + self.widths[2], RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.norm_1(x)
        attended = self.attend(first)
        if self.shape.is_llama:
            x = attended + x
            return self.feed(self.norm_2(x)) + x  # type: ignore[misc]
        second = first if self.norm_2 is None else self.norm_2(x)
        return self.feed(second) + attended + x

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        fused = (self.fused(x) + self.update(x)).view(
            batch, tokens, kv_heads, heads // kv_heads + 2, self.shape.head_dim
        )
        q, k, v = fused.permute(0, 2, 3, 1, 4).split((heads // kv_heads, 1, 1), dim=2)
        if kv_heads != heads:
            k, v = k.expand(-1, -1, heads // kv_heads, -1, -1), v.expand(-1, -1, heads // kv_heads, -1, -1)
        q, k, v = (part.reshape(batch, heads, tokens, self.shape.head_dim) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, -1))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """The low-rank update of queries and values, with zeros for the keys between them."""
        batch, tokens, _ = x.shape
        dropped, _ = torch.native_dropout(x, DROPOUT, True)  # as on a GPU: a byte each is kept
        reduced = F.linear(dropped, self.low_rank_a).transpose(1, 2)
        parts = zip(reduced.chunk(2, dim=1), self.low_rank_b.split([self.widths[0], self.widths[2]]), strict=True)
        grown = torch.cat([F.conv1d(part, rows.unsqueeze(-1)) for part, rows in parts], dim=1)
        source = grown.transpose(1, 2).reshape(batch * tokens, -1)
        trained = [*range(self.widths[0]), *range(sum(self.widths[:2]), sum(self.widths))]
        update = x.new_zeros(batch * tokens, sum(self.widths))
        return update.index_copy(1, torch.zeros(len(trained), dtype=torch.int64), source).view(batch, tokens, -1) * 2.0

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        turning = x[..., : self.shape.rotary_dim]
        table = x.new_empty(x.shape[2], self.shape.rotary_dim)
        half = self.shape.rotary_dim // 2
        turned = turning * table + torch.cat((-turning[..., half:], turning[..., :half]), dim=-1) * table
        return torch.cat((turned, x[..., self.shape.rotary_dim :]), dim=-1)


class _RootMeanSquare(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)
        return (self.weight * (wide * scale)).to(x.dtype)


def _norm(shape: Shape) -> nn.Module:
    return _RootMeanSquare(shape.hidden_size) if shape.is_llama else nn.LayerNorm(shape.hidden_size)


def _linear(in_features: int, out_features: int, *, packed: bool, bias: bool) -> nn.Module:
    if packed:
        return _Packed(in_features, out_features, bias=bias)
    return nn.Linear(in_features, out_features, bias=bias)
