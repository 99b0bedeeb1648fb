"""llama.cpp's names and settings and transformers', for the families whose tensors differ in nothing but names and the order of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haversack.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """An architecture as GGUF names it, and the `model_type` that transformers reads it as. `pairs` says that rows of queries
    and keys lie in pairs for the rotation, where transformers has halves."""

    architecture: str
    model_type: str
    class_name: str
    pairs: bool = False


FAMILIES = (
    Family("llama", "llama", "LlamaForCausalLM", pairs=True),
    Family("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM"),
)

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

_SETTINGS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def family_of(architecture: object, name: str) -> Family:
    """The family that a file's `general.architecture` names. Raises UnsupportedModelError."""
    for family in FAMILIES:
        if family.architecture == architecture:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UnsupportedModelError(
        f"{name!r} is a GGUF file of architecture {architecture!r}, but {known} are read; name the model's folder instead."
    )


def family_for(config: Mapping[str, Any], name: str) -> Family:
    """The family of a transformers config, where all that it says can be said in GGUF. Raises UnsupportedModelError."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    model_type = config.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None and model_type == "mistral" and not config.get("sliding_window"):
        family = FAMILIES[0]
    known = ", ".join(each.model_type for each in FAMILIES)
    if family is None:
        raise UnsupportedModelError(
            f"{name!r} is a {model_type!r} model, but {known} are written as GGUF; export compressed-tensors instead."
        )
    refused = {
        "rope type": kind if kind != "default" else None,
        "sliding window": config.get("sliding_window") if config.get("use_sliding_window") else None,
        "activation": config.get("hidden_act") if config.get("hidden_act", "silu") != "silu" else None,
        "bias in the feed-forward layers": config.get("mlp_bias") or None,
    }
    if found := {what: value for what, value in refused.items() if value is not None}:
        what, value = next(iter(found.items()))
        raise UnsupportedModelError(
            f"{name!r} has {what} {value!r}, which is not written as GGUF; export compressed-tensors instead."
        )
    return family


def checkpoint_name(name: str) -> str | None:
    """transformers' name of a file's tensor, or None for one that no parameter is made of."""
    base, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if base in _OUTSIDE:
        return f"{_OUTSIDE[base]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
    if found is None or found[2] not in _INSIDE:
        return None
    return f"model.layers.{found[1]}.{_INSIDE[found[2]]}.{kind}"


def file_name(name: str) -> str | None:
    """GGUF's name of a tensor that transformers calls `name`; the inverse of `checkpoint_name`."""
    base, _, kind = name.rpartition(".")
    for ours, theirs in _OUTSIDE.items():
        if base == theirs:
            return f"{ours}.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", base)
    inside = {theirs: ours for ours, theirs in _INSIDE.items()}
    return f"blk.{found[1]}.{inside[found[2]]}.{kind}" if found is not None and found[2] in inside else None


def is_rotated(name: str) -> bool:
    """Whether the rows of a file's tensor are rotated, and so lie in pairs where the family has them so."""
    return ".attn_q." in name or ".attn_k." in name


def config_from(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    """transformers' config of a file's metadata and the shapes of its tensors. Raises UnsupportedModelError."""
    family = family_of(metadata.get("general.architecture"), name)
    prefix = f"{family.architecture}."

    def setting(key: str) -> Any:
        return metadata.get(prefix + key)

    refused = setting("rope.scaling.type")
    if refused not in (None, "none") or "rope_freqs.weight" in tensors or setting("expert_count"):
        what = "several experts" if setting("expert_count") else f"scaled rotations ({refused or 'rope_freqs'})"
        raise UnsupportedModelError(
            f"{name!r} has {what}, which is not read from GGUF; name the model's folder instead."
        )
    config = {word: setting(key) for key, word in _SETTINGS.items()}
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    if missing := [key for key, word in _SETTINGS.items() if not isinstance(config[word], (int, float))]:
        raise UnsupportedModelError(f"{name!r} does not say its {missing[0]}; convert the model again.")
    head_dim = setting("attention.key_length") or config["hidden_size"] // max(1, config["num_attention_heads"])
    if setting("attention.value_length") not in (None, head_dim) or setting("rope.dimension_count") not in (
        None,
        head_dim,
    ):
        raise UnsupportedModelError(
            f"{name!r} has keys, values or rotations of different widths, which is not read from GGUF."
        )
    biases = {"attention_bias": True} if "blk.0.attn_q.bias" in tensors and family.model_type != "qwen2" else {}
    tokens = {f"{word}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for word, key in _TOKENS}
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **config,
        **biases,
        **{word: number for word, number in tokens.items() if isinstance(number, int)},
        "head_dim": head_dim,
        "vocab_size": tensors[EMBEDDING][0] if EMBEDDING in tensors else 0,
        "rope_parameters": {"rope_theta": setting("rope.freq_base") or 10000.0, "rope_type": "default"},
        "tie_word_embeddings": HEAD not in tensors,
    }


_TOKENS = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))


def metadata_from(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A file's metadata of a transformers config, the tokenizer's aside."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    settings = {key: config[word] for key, word in _SETTINGS.items() if word != "num_key_value_heads"}
    settings["attention.head_count_kv"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    settings |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    settings["rope.freq_base"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    settings["vocab_size"] = config["vocab_size"]
    return {
        "general.architecture": family.architecture,
        **{f"{family.architecture}.{key}": value for key, value in settings.items()},
    }
