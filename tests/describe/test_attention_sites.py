"""Attention sites against the tensors that transformers' own cache holds after a forward pass."""

from __future__ import annotations

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.ledger import DTYPE_BYTES

_BASE = FAMILIES["llama"]

_NUM_TOKENS = 40  # past every window and chunk of 16


def facts(config: dict, name: str) -> list:
    return [getattr(site, name) for site in describe_model(config).attention]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bytes_per_token_are_what_the_cache_holds(family):
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {**FAMILIES[family], "dtype": "float32"}
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(config), attn_implementation="eager"
    ).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for token in range(_NUM_TOKENS):  # one at a time: a whole prefill keeps more than the window for a moment
            model(torch.tensor([[token]]), past_key_values=cache)
    sites = describe_model(config).attention
    assert len(sites) == len(cache.layers)
    for site, layer in zip(sites, cache.layers, strict=True):
        held = sum(t.nbytes for t in (layer.keys, layer.values) if t is not None) if layer.is_initialized else 0
        limit = site.window_tokens or site.chunk_tokens
        # transformers keeps one token less than the window: the query's own token is the last of it
        num_tokens = min(_NUM_TOKENS, limit - 1) if limit else _NUM_TOKENS
        assert held == num_tokens * site.bytes_per_token("F32"), (site, layer)
        if held:
            assert layer.keys.shape[-1] == site.key_head_dim and layer.values.shape[-1] == site.value_head_dim
            assert layer.keys.shape[1] == site.num_kv_heads


def test_grouped_heads_and_explicit_head_dim():
    (site, _) = describe_model(FAMILIES["qwen3"]).attention
    assert (site.num_heads, site.num_kv_heads, site.key_head_dim, site.value_head_dim) == (4, 2, 16, 16)
    assert site.bytes_per_token("BF16") == 2 * (16 + 16) * DTYPE_BYTES["BF16"]
    assert site.module == site.id == "model.layers.0.self_attn"


def test_windows_follow_layer_types():
    assert facts(FAMILIES["mistral"], "window_tokens") == [16, 16]
    assert facts(FAMILIES["gemma2"], "window_tokens") == [16, None]
    assert facts(FAMILIES["gemma3_text"], "window_tokens") == [16] * 5 + [None, 16]
    assert facts(FAMILIES["gpt_oss"], "window_tokens") == [16, None]
    assert facts(FAMILIES["qwen2-windows"], "window_tokens") == [None, None, 16, 16]
    assert facts(FAMILIES["llama"], "window_tokens") == [None, None]


def test_softcap_sinks_and_chunks():
    assert facts(FAMILIES["gemma2"], "softcap") == [50.0, 50.0]
    assert facts(FAMILIES["gemma3_text"], "softcap") == [None] * 7
    assert facts(FAMILIES["gpt_oss"], "has_sinks") == [True, True]
    assert facts(FAMILIES["llama"], "has_sinks") == [False, False]
    assert facts(FAMILIES["llama4_text"], "chunk_tokens") == [16, 16, 16, None]
    assert facts(FAMILIES["llama4_text"], "window_tokens") == [None] * 4


def test_shared_layers_store_nothing_and_name_the_layer_they_read():
    sites = describe_model(FAMILIES["gemma3n_text"]).attention
    assert [site.shares_with for site in sites] == [None, None, None, None, 2, 3]
    assert [site.bytes_per_token() > 0 for site in sites] == [True] * 4 + [False] * 2


def test_latent_attention_caches_one_latent_and_one_rotary_key():
    (site, _) = describe_model(FAMILIES["deepseek_v3"]).attention
    assert site.is_latent and not describe_model(FAMILIES["llama"]).attention[0].is_latent
    assert (site.num_heads, site.num_kv_heads, site.key_head_dim, site.value_head_dim) == (4, 1, 16, 8)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {**_BASE, "model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
            "linear_attention",
        ),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 72}, "mamba"),
    ],
)
def test_layers_with_another_state_have_no_sites_and_say_why(config, says):
    model = describe_model(config)
    assert not model.attention and says in f"{model.model_type} {model.cache_problem}"
