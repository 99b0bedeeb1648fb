"""Tiny configs of each family, with every feature of the real one that moves bytes: shared heads, explicit head
dimensions, windows, ties, biases, stacked experts."""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama"},
    "llama-tied": {**_BASE, "model_type": "llama", "tie_word_embeddings": True, "dtype": "float32"},
    "llama-bias": {**_BASE, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "dtype": "float16"},
    "qwen2": {**_BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_BASE, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "mistral": {**_BASE, "model_type": "mistral", "sliding_window": 16, "head_dim": 16},
    "gemma2": {**_BASE, "model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {
        **_BASE,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 16,
        "num_hidden_layers": 7,
        "sliding_window_pattern": 6,
    },
    "phi3": {**_BASE, "model_type": "phi3", "sliding_window": 16},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 72,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    },
    "olmo2": {**_BASE, "model_type": "olmo2"},
    "mixtral": {**_BASE, "model_type": "mixtral", "num_local_experts": 3, "sliding_window": None},
    "qwen3_moe": {
        **_BASE,
        "model_type": "qwen3_moe",
        "num_experts": 3,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        **_BASE,
        "model_type": "gpt_oss",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 16,
    },
}
