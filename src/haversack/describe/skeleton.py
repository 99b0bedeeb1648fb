"""The module tree of a config, built without a byte of weights (on torch's meta device), or one sentence why not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from haversack.describe.quantized import check_quantization
from haversack.errors import MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_MAX_LAYERS = 4096
_MAX_COUNT = 2**40
"""Bounds of sense: a hostile or damaged config must not keep us building. The deepest models have some 200 layers."""


def build_skeleton(
    config: Mapping[str, Any], name: str, *, folder: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of a config, or an encoder-decoder, on the meta device.

    Raises UnsupportedModelError: unknown architecture, remote code not asked for, no language model, quantized already, or a
    config that contradicts itself. MissingDependencyError: a library of its own.
    """
    _check_numbers(config, name)
    check_quantization(config, name)
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # doubts about a config are told in our own words, or not at all
    try:
        parsed = _parse_config(config, name, folder, trust_remote_code)
    finally:
        logging.set_verbosity(verbosity)
    kind = AutoModelForSeq2SeqLM if getattr(parsed, "is_encoder_decoder", False) else AutoModelForCausalLM
    logging.set_verbosity_error()
    try:
        with (
            torch.device("meta"),
            warnings.catch_warnings(),
            no_init_weights(),
        ):  # which takes seconds on meta, for nothing
            warnings.simplefilter("ignore")
            model = kind.from_config(parsed, trust_remote_code=trust_remote_code, attn_implementation="eager")
        model.tie_weights()
        return model
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{name!r} is a {parsed.model_type!r} model ({_architecture(config)}), which has no causal language "
                "model in this version of transformers; choose a text-generating model."
            ) from None
        raise _contradiction(name, error) from None
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingDependencyError(f"{name!r} ({parsed.model_type}) can't be built here: {reason}") from None
    except Exception as error:  # whatever a modelling file trips over, the cause is the config
        raise _contradiction(name, error) from None
    finally:
        logging.set_verbosity(verbosity)


def to_loaded_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a skeleton's tensors the dtype that transformers loads them in: `dtype`, but for those of `kept_in_float32`."""
    model.to(dtype)  # type: ignore[arg-type]
    for name in kept_in_float32(model, dtype):
        tensor = model.get_parameter_or_buffer(name)
        tensor.data = tensor.data.float()


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Tensors that the family keeps in float32 where the model is loaded in 16 bits (gpt-oss its norms, in float16 alone)."""
    from transformers.core_model_loading import build_glob_alternation

    patterns = [name for name, wide in model._get_dtype_plan(dtype).items() if wide.itemsize == 4]
    if not patterns:
        return set()
    alternation = build_glob_alternation(patterns)[0]
    return {name for name, tensor in model.state_dict().items() if alternation.search(name)}


def _parse_config(
    config: Mapping[str, Any], name: str, folder: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if "auto_map" in config and not known:
        if not trust_remote_code:
            raise UnsupportedModelError(
                f"{name!r} needs code from its own repository ({_architecture(config)}), which would run on this "
                "machine; read that code, then ask for it with --trust-remote-code (trust_remote_code=True)."
            )
        if folder is None:
            raise UnsupportedModelError(f"{name!r} needs its own code, so name its folder or hub id, not its config.")
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=True)
        except Exception as error:  # it is somebody's code: it may be missing, or raise anything
            raise UnsupportedModelError(
                f"{name!r} brings code of its own, which fails here ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200].rstrip('.')}); check the folder, or choose another model."
            ) from None
    if not known:
        found = f"model_type {model_type!r}" if model_type is not None else "no model_type"
        raise UnsupportedModelError(
            f"{name!r} has {found}, which this version of transformers does not know; update transformers, or choose "
            "another model."
        )
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        return CONFIG_MAPPING[str(model_type)].from_dict(values)
    except Exception as error:  # configs validate themselves with many kinds of exception
        raise _contradiction(name, error) from None


def _check_numbers(config: Mapping[str, Any], name: str) -> None:
    """Counts must be counts, and heads must divide, before anything is built from them."""
    for scope in (config, config.get("text_config")):
        if not isinstance(scope, Mapping):
            continue
        for key, value in scope.items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            limit = _MAX_LAYERS if key in ("num_hidden_layers", "n_layer", "num_layers") else _MAX_COUNT
            is_count = key.startswith(("num_", "n_")) or key.endswith(("_size", "_dim"))
            if is_count and not 0 <= value <= limit:
                raise UnsupportedModelError(
                    f"The config of {name!r} says {key} is {value}, which is outside 0 to {limit}; check the config."
                )
        hidden = scope.get("hidden_size", scope.get("n_embd"))
        heads = scope.get("num_attention_heads", scope.get("n_head"))
        kv_heads = scope.get("num_key_value_heads")
        names_head_dim = any(key.endswith("head_dim") and value for key, value in scope.items())
        for label, count in (
            ("num_hidden_layers", scope.get("num_hidden_layers", scope.get("n_layer"))),
            ("vocab_size", scope.get("vocab_size")),
            ("hidden_size", hidden),
            ("num_attention_heads", heads),
        ):
            if count is not None and (isinstance(count, bool) or not isinstance(count, (int, list)) or count == 0):
                raise UnsupportedModelError(
                    f"The config of {name!r} says {label} is {count!r}, where a count above zero is due; check it."
                )
        if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads and not names_head_dim:
            raise UnsupportedModelError(
                f"The config of {name!r} contradicts itself: hidden_size {hidden} is no multiple of its {heads} heads, "
                "and it names no head_dim; check the config."
            )
        if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads == 0 or heads % kv_heads):
            raise UnsupportedModelError(
                f"The config of {name!r} contradicts itself: {heads} heads can't share {kv_heads} key-value heads; "
                "check the config."
            )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "unnamed architecture"))


def _contradiction(name: str, error: Exception) -> UnsupportedModelError:
    reason = " ".join(str(error).split())[:240] or type(error).__name__
    return UnsupportedModelError(f"No model can be built from the config of {name!r}: {reason}. Check the config.")
