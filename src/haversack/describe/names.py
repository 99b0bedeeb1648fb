"""The one place where Hugging Face names become roles.

A role only says what a matrix does, so that options can be offered and labelled; bytes, shapes and positions never come
from here but from the module tree and the checkpoint. A name that is missing gets the role `other` and is packed all
the same.
"""

from __future__ import annotations

import re

# Tails of module paths, first match wins. A context (`attn`, `mlp`) is named where the last word alone says too little.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(wpe|embed_positions|position_embeddings?)$", "position"),
    (r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)$", "embedding"),
    (r"(^|\.)(lm_head|embed_out)$", "head"),
    (r"\.(q_proj|q_a_proj|q_b_proj|wq|q_lin|query)$", "query"),
    (r"\.(k_proj|wk|k_lin|key)$", "key"),
    (r"\.(v_proj|wv|v_lin|value)$", "value"),
    (r"\.(qkv_proj|c_attn|Wqkv|query_key_value|qkv)$", "qkv"),
    (r"\.(o_proj|wo|out_lin)$", "output"),
    (r"attn[^.]*\.(c_proj|out_proj|dense|proj)$|attention\.(dense|out_proj)$", "output"),
    (r"\.(gate_proj|w1)$", "gate"),
    (r"\.(up_proj|w3|c_fc|fc1|fc_in|dense_h_to_4h)$", "up"),
    (r"\.(down_proj|w2|fc2|fc_out|dense_4h_to_h)$|mlp\.(c_proj|proj)$", "down"),
)
_PATTERNS = tuple((re.compile(pattern), role) for pattern, role in _ROLES)

_FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("query", "key", "value"),
    "c_attn": ("query", "key", "value"),
    "Wqkv": ("query", "key", "value"),
    "gate_up_proj": ("gate", "up"),
}
"""Roles of the parts of fused projections that are blocks of rows, in order. Those that interleave heads stay whole."""

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
"""Modules that choose experts: tiny, and everything behind them depends on them, so they are never packed."""


def role_of(module: str) -> str:
    """The role of the matrix of this module (or stacked parameter) path."""
    return next((role for pattern, role in _PATTERNS if pattern.search(module)), "other")


def fused_roles(module: str) -> tuple[str, ...]:
    """The role of each block of rows of a fused projection, in order; () where it is not fused."""
    return _FUSED.get(module.rpartition(".")[2], ())


def is_router(module: str) -> bool:
    """Whether this module chooses experts."""
    return bool(_ROUTER.search(module))
