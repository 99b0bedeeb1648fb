"""What transformers' own cache will hold, traced without memory, against the cache of a small real model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload
from haversack.engine.native_cache import trace_native_serving
from haversack.engine.training_trace import trace_training
from haversack.errors import UnsupportedModelError

_BASE: dict[str, Any] = {
    "vocab_size": 72, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "dtype": "float32",
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 72, "state_size": 8},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 72, "state_size": 8,
        "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 16,
    },
    "qwen3_next": {
        **_BASE, **_EXPERTS, "model_type": "qwen3_next", "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "bamba": {**_BASE, **_MAMBA, "model_type": "bamba", "attn_layer_indices": [1], "mamba_chunk_size": 16},
    "falcon_h1": {**_BASE, **_MAMBA, "model_type": "falcon_h1", "mamba_chunk_size": 16, "mamba_d_ssm": 64},
    "jamba": {
        **_BASE, "model_type": "jamba", "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 8,
        "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "lfm2": {**_BASE, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "conv"]},
}  # fmt: skip
for _family in ("llama4_text", "gemma3n_text", "deepseek_v3", "gemma2"):
    if _family in FAMILIES:
        CONFIGS[_family] = {**FAMILIES[_family], "dtype": "float32"}

PROMPT_TOKENS, STEPS = 20, 5


def held_bytes(values: Mapping[Any, Any]) -> Iterator[int]:
    for value in values.values():
        if isinstance(value, torch.Tensor):
            yield value.nbytes
        elif isinstance(value, dict):
            yield from held_bytes(value)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_cache_holds_what_was_traced(family: str) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIGS[family]
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config)).eval()
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    name = "cache_params" if "mamba" in family else "past_key_values"
    found = []
    with torch.no_grad():
        model(torch.zeros(2, PROMPT_TOKENS, dtype=torch.long), use_cache=True, **{name: cache})
        found.append([sum(held_bytes(vars(layer))) for layer in cache.layers])
        for _ in range(STEPS):
            model(torch.zeros(2, 1, dtype=torch.long), use_cache=True, **{name: cache})
        found.append([sum(held_bytes(vars(layer))) for layer in cache.layers])
    traced = trace_native_serving(describe_model(config), batch_size=2, prompt_tokens=PROMPT_TOKENS)
    assert [[layer.bytes_after(n) for layer in traced.layers] for n in (0, STEPS)] == found
    assert traced.cache_bytes(STEPS) > 0


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_keeps_the_prompt_and_its_own(family: str) -> None:
    """States of the encoder, keys and values of them in every decoder layer, and those of what was generated; weights are none of it."""
    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: dict[str, Any] = {
        "model_type": family, "is_encoder_decoder": True, "vocab_size": 5000, "d_model": 32, "dtype": "float32",
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": 2,
    }  # fmt: skip
    if family == "t5":
        config |= {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    else:
        config |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        config |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    described = describe_model(config)
    assert "encoder-decoder" in described.cache_problem
    model: Any = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[family].from_dict(config)).eval()
    kept = sum(buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict())
    assert described.num_parameters == model.num_parameters() + kept
    with torch.no_grad():
        states = model.get_encoder()(input_ids=torch.zeros(2, PROMPT_TOKENS, dtype=torch.long))
        cache = None
        for _ in range(1 + STEPS):
            out = model(decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), encoder_outputs=states,
                        past_key_values=cache, use_cache=True)  # fmt: skip
            cache = out.past_key_values
    halves = (cache.self_attention_cache, cache.cross_attention_cache)
    held = sum(sum(held_bytes(vars(layer))) for half in halves for layer in half.layers)
    traced = trace_native_serving(described, batch_size=2, prompt_tokens=PROMPT_TOKENS)
    assert traced.cache_bytes(STEPS) == held + states[0].nbytes
    assert traced.decode_bytes < described.num_bytes / 4
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        trace_training(described, TrainWorkload(1, 8))


def test_an_unknown_cache_is_said_by_name() -> None:
    model = describe_model({"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 72})
    with pytest.raises(UnsupportedModelError, match=r"rwkv.* is unknown"):
        trace_native_serving(model, batch_size=1, prompt_tokens=4)
