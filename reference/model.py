"""A lean Qwen3/Llama in plain PyTorch whose parameter names are those of transformers, so that export is a copy of tensors.

Written out because training needs few kernels and per-token losses; `reference.export` proves that `AutoModelForCausalLM` computes the same logits.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelConfig:
    """Widths of one reference model. `qk_norm` and tied embeddings make it Qwen3, neither makes it Llama."""

    architecture: str  # "qwen3" or "llama"
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    seed: int
    vocab_size: int = 4096
    rope_theta: float = 1e6
    max_position: int = 2048
    norm_eps: float = 1e-6
    # Whether all embeddings start with one random vector in common. Queries and keys then hold a part that no token decides, and rotary positions
    # make of it attention by distance alone, which is where looking one token back begins.
    shared_embedding: bool = False

    @property
    def is_qwen3(self) -> bool:
        return self.architecture == "qwen3"


# Layers start by adding nothing to embeddings that are large beside what a few steps of Muon write: at the usual 0.02 the first layers drown what
# each token was, and no head learns to look one token back in 1.5M tokens. Where the head is tied to them, a small
# final gain keeps the first logits near zero.
EMBEDDING_STD = 0.4
TIED_GAIN = 0.02
ATTENTION_BLOCK_TOKENS = 256

MODELS = {
    "a": ModelConfig(
        "qwen3", 512, 4, num_heads=8, num_kv_heads=2, head_dim=64, ffn_size=1536, seed=1, shared_embedding=True
    ),
    "b": ModelConfig(
        "llama",
        256,
        4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        ffn_size=768,
        seed=2,
        rope_theta=1e4,
        shared_embedding=True,
    ),
    # For a machine with a GPU; kept out of the package.
    "c": ModelConfig(
        "qwen3", 768, 8, num_heads=12, num_kv_heads=4, head_dim=64, ffn_size=2048, seed=3, shared_embedding=True
    ),
}


class Norm(nn.Module):
    """Root-mean-square norm with a gain (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, and per-head norms where the family has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_heads != config.num_kv_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        if config.is_qwen3:
            self.q_norm = Norm(config.head_dim, config.norm_eps)
            self.k_norm = Norm(config.head_dim, config.norm_eps)
        self.has_qk_norm = config.is_qwen3

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch_size, seq_len, _ = x.shape
        q, k, v = (
            projection(x).view(batch_size, seq_len, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, tokens, heads, head_dim)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, tokens, head_dim)
        if self.grouped:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if x.device.type == "cpu" and torch.is_grad_enabled():
            out = _causal_attention(q, k, v)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch_size, seq_len, -1))


def _causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in blocks of queries, each against the keys up to its end. Compiled, forward and backward take 109 ms at 4 rows of 1,024 tokens
    and 8 heads of 64 on one AVX-512 core, where PyTorch's fused CPU attention takes 188.
    """
    num_tokens = q.shape[2]
    blocks = []
    for start in range(0, num_tokens, ATTENTION_BLOCK_TOKENS):
        end = min(start + ATTENTION_BLOCK_TOKENS, num_tokens)
        scores = (q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1).to(v.dtype)
        blocks.append(weights @ v[:, :, :end])
    return torch.cat(blocks, dim=2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """Gated feed-forward, SiLU gate (Shazeer, 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and final norm, named as transformers names them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm_eps)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position), frequencies)[:, None, :]  # (tokens, 1, head_dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class ReferenceModel(nn.Module):
    """Decoder with a tied (Qwen3) or own (Llama) output head; every head forms by training, none is wired."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(config.seed)
        for name, parameter in self.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = EMBEDDING_STD if "embed" in name else 0.02 if "lm_head" in name else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
        if config.shared_embedding:
            with torch.no_grad():
                self.model.embed_tokens.weight += EMBEDDING_STD * torch.randn(config.hidden_size, generator=generator)
        if config.is_qwen3:
            nn.init.constant_(self.model.norm.weight, TIED_GAIN)
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocab) of token ids (batch, tokens)."""
        return self.lm_head(self.model(tokens))
