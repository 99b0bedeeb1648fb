"""Attention sites: what each layer keeps of a token, read from modules and from the cache transformers would make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from haversack.describe.site import AttentionSite
from haversack.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_PLAIN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "dummy")


def attention_sites(model: PreTrainedModel, decoder: str, name: str) -> tuple[tuple[AttentionSite, ...], str]:
    """One site per decoder layer, and ""; none, and why, where a layer keeps something else than keys and values.

    Raises UnsupportedModelError where the config contradicts itself.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    if getattr(model.config, "is_encoder_decoder", False):
        return (), "it is an encoder-decoder, whose layers keep the prompt's keys and values beside their own"
    config = model.config.get_text_config(decoder=True)
    for fact in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(config, fact, None), int):
            raise UnsupportedModelError(
                f"{name!r} ({config.model_type}) names no single {fact}; this architecture is not supported."
            )
    try:
        kinds, arguments = get_layer_types_and_kwargs(config)
    except Exception as error:
        raise UnsupportedModelError(
            f"The config of {name!r} describes no cache ({' '.join(str(error).split())[:160]}); check the config."
        ) from None
    other = next((kind for kind in kinds if kind not in _PLAIN_LAYERS), None)
    if other is not None:
        return (), f"its {other} layers keep another state than keys and values"
    modules = _attention_modules(model, decoder)
    if len(kinds) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"The config of {name!r} contradicts itself: it has {config.num_hidden_layers} layers, but {len(kinds)} layer "
            "types; check the config."
        )
    if sorted(modules) != list(range(config.num_hidden_layers)):
        return (), f"it has attention in {len(modules)} of {config.num_hidden_layers} layers"
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(kinds)
    types = getattr(config, "layer_types", None) or kinds
    sites = []
    for layer in range(len(kinds)):
        path, module = modules[layer]
        shares = None
        if modes[layer] == "reuse":
            shares = max(i for i in range(layer) if modes[i] == "store" and types[i] == types[layer])
        window = arguments[layer].get("sliding_window")
        kind = types[layer]
        if shares is not None:
            window = config.sliding_window if kind == "sliding_attention" else None
        num_heads, num_kv_heads, key_dim, value_dim = _head_shapes(module, config, name)
        softcap = getattr(module, "attn_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None)
        sites.append(
            AttentionSite(
                id=path,
                layer=layer,
                module=path,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                key_head_dim=key_dim,
                value_head_dim=value_dim,
                window_tokens=window if kind != "chunked_attention" else None,
                chunk_tokens=window if kind == "chunked_attention" else None,
                softcap=softcap,
                has_sinks=getattr(module, "sinks", None) is not None,
                shares_with=shares,
                is_latent=_is_latent(module),
                rope_theta=_rope_theta(config, kind),
            )
        )
    return tuple(sites), ""


def _rope_theta(config: Any, kind: str) -> float | None:
    """The base of a plain rotary embedding; families may have one per type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    found = found.get(kind) or found
    plain = found.get("rope_type", "default") == "default" and found.get("partial_rotary_factor", 1.0) == 1.0
    theta = found.get("rope_theta")
    return float(theta) if plain and isinstance(theta, (int, float)) else None


def _attention_modules(model: PreTrainedModel, decoder: str) -> dict[int, tuple[str, nn.Module]]:
    """The outermost module of each layer that knows its layer index and projects to an output, by index."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if (
            not path.startswith(decoder)
            or not isinstance(index, int)
            or not type(module).__name__.endswith("Attention")
        ):
            continue
        found.setdefault(index, (path, module))
    return found


def _head_shapes(module: nn.Module, config: Any, name: str) -> tuple[int, int, int, int]:
    """(heads, key-value heads, key head dim, value head dim) as the cache stores them."""

    def fact(*names: str) -> Any:
        for owner in (module, config):
            for word in names:
                value = getattr(owner, word, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    num_heads = fact("num_heads", "num_attention_heads", "n_heads", "n_head")
    if _is_latent(module):
        return num_heads, 1, fact("kv_lora_rank"), fact("qk_rope_head_dim")
    if getattr(module, "kv_b_proj", None) is not None:  # latent in the weights, but cached as expanded
        return num_heads, num_heads, fact("qk_head_dim", "q_head_dim"), fact("v_head_dim")
    head_dim = fact("head_dim", "head_size")
    if head_dim is None and num_heads:
        head_dim = config.hidden_size // num_heads
    num_kv_heads = fact("num_key_value_heads", "num_kv_heads") or num_heads
    if not num_heads or not head_dim or not num_kv_heads or num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"The config of {name!r} contradicts itself: {num_heads} heads of {head_dim} can't share {num_kv_heads} "
            "key-value heads; check the config."
        )
    key, value = (_rows(module, word) for word in ("k_proj", "v_proj"))
    for rows in (key, value):
        if rows is not None and rows != num_kv_heads * head_dim:
            if rows % head_dim == 0 and num_heads % (rows // head_dim) == 0:
                num_kv_heads = rows // head_dim
            else:
                raise UnsupportedModelError(
                    f"{name!r} projects keys or values to {rows} numbers, where {num_kv_heads} heads of {head_dim} are "
                    "due; this attention is not understood."
                )
    return num_heads, num_kv_heads, head_dim, head_dim


def _is_latent(module: nn.Module) -> bool:
    """Whether the cache keeps latents: transformers' modules that do have a method that expands them after reading."""
    return hasattr(module, "expand_kv") and hasattr(module, "kv_lora_rank")


def _rows(module: nn.Module, projection: str) -> int | None:
    weight = getattr(getattr(module, projection, None), "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else None
