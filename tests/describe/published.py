"""Configs as they were published, cut to the fields that move bytes, with the number of parameters that the model's own
card or its safetensors files on the hub state."""

from __future__ import annotations

from typing import Any


def config(
    architecture: str, model_type: str, hidden: int, width: int, layers: int, heads: str, vocab: int, **more: Any
):
    """`heads` is "heads/key-value heads/head_dim"."""
    num_heads, num_kv_heads, head_dim = map(int, heads.split("/"))
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "dtype": "bfloat16",
        **more,
    }


def _gemma3(parameters_of_text: dict[str, Any]) -> dict[str, Any]:
    """As google/gemma-3-*-it: the text model in `text_config`, with only what differs from its defaults."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "dtype": "bfloat16",
        "text_config": {"model_type": "gemma3_text", "sliding_window": 1024, **parameters_of_text},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


_ROPE_8 = {"rope_type": "linear", "factor": 8.0}
_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
_OSS = {"num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True, "max_position_embeddings": 131072}
_OSS_ARGS = ("GptOssForCausalLM", "gpt_oss", 2880, 2880)

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
         "n_ctx": 1024, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "llama-3.1-8b": (config("LlamaForCausalLM", "llama", 4096, 14336, 32, "32/8/128", 128256), 8_030_261_248),
    "qwen2.5-7b": (config("Qwen2ForCausalLM", "qwen2", 3584, 18944, 28, "28/4/128", 152064), 7_615_616_512),
    "qwen3-8b": (config("Qwen3ForCausalLM", "qwen3", 4096, 12288, 36, "32/8/128", 151936), 8_190_735_360),
    "mistral-7b-v0.3": (config("MistralForCausalLM", "mistral", 4096, 14336, 32, "32/8/128", 32768), 7_248_023_552),
    "gemma-2-9b": (
        config("Gemma2ForCausalLM", "gemma2", 3584, 14336, 42, "16/8/256", 256000, sliding_window=4096,
               query_pre_attn_scalar=256),
        9_241_705_984,
    ),
    "phi-3-mini": (
        config("Phi3ForCausalLM", "phi3", 3072, 8192, 32, "32/32/96", 32064, pad_token_id=32000), 3_821_079_552
    ),
    "olmo-2-7b": (config("Olmo2ForCausalLM", "olmo2", 4096, 11008, 32, "32/32/128", 100352), 7_298_617_344),
    "olmo-2-13b": (config("Olmo2ForCausalLM", "olmo2", 5120, 13824, 40, "40/40/128", 100352), 13_716_198_400),
    "mixtral-8x7b": (
        config("MixtralForCausalLM", "mixtral", 4096, 14336, 32, "32/8/128", 32000, num_local_experts=8,
               num_experts_per_tok=2),
        46_702_792_704,
    ),
    "mixtral-8x22b-instruct": (
        config("MixtralForCausalLM", "mixtral", 6144, 16384, 56, "48/8/128", 32768, num_local_experts=8,
               num_experts_per_tok=2),
        140_630_071_296,
    ),
    "gemma-3-4b-it": (
        _gemma3({"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "rope_scaling": _ROPE_8}),
        4_300_079_472,
    ),
    "gemma-3-27b-it": (
        _gemma3({"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
                 "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "rope_scaling": _ROPE_8}),
        27_432_406_640,
    ),
    "gpt-oss-20b": (
        config(*_OSS_ARGS, 24, "64/8/64", 201088, num_local_experts=32, quantization_config=_MXFP4, **_OSS),
        20_914_757_184,
    ),
    "gpt-oss-120b": (
        config(*_OSS_ARGS, 36, "64/8/64", 201088, num_local_experts=128, quantization_config=_MXFP4, **_OSS),
        116_829_156_672,
    ),
}  # fmt: skip
