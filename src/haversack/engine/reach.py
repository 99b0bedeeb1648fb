"""Can a family's attention be reached? A small random copy of its config runs both ways, past its windows.

Nothing here knows an architecture by name. If the copy's logits differ between transformers' own attention and cache
and ours, chunked, padded and token by token, the family is refused by name: shared keys and values, latent attention,
masks that only the mask knows, all show up as a difference.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from haversack.describe.site import AttentionSite
from haversack.engine.attention import NAME, haversack_attention, register, registered
from haversack.engine.kv_cache import DTYPE_NAMES, HaversackCache, KVPlan
from haversack.errors import HaversackError, UnsupportedModelError
from haversack.parts.kv.base import KVOption

WINDOW_TOKENS = 8
"""Windows of the small copy: the probe's 37 tokens go well past them."""

STEPS = (13, 16, 1, 1, 1, 4, 1)
"""Tokens per forward pass: two chunks of different length, single steps, a few at once."""

PADDING_TOKENS = 5
TOLERANCE = 4e-5
"""Largest difference of logits over their largest magnitude, in float32: ten times what another order of sums gave over
eleven families (4e-6); leaving out a softcap of 50 gives 8e-4, padding or sinks 0.1 and more."""

_OBSERVER = "haversack-observer"


def check_reach(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError, naming the family and what differed, unless its attention can be reached."""
    family = config.model_type
    way_out = "choose a family whose layers call transformers' attention functions"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a copy with other sizes draws warnings that mean nothing for the model itself
    try:
        difference = _largest_difference(small_copy(config))
    except HaversackError as error:
        raise UnsupportedModelError(f"{family}: its attention can't be reached ({error}); {way_out}.") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{family}: a small copy does not run with the haversack attention function "
            f"({type(error).__name__}: {error}); {way_out}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{family}: its attention can't be reached; a small copy's logits differ by {difference:.2g} of their "
            f"largest (at most {TOLERANCE:.0e} is rounding), as with shared or latent keys and values; {way_out}."
        )


def small_copy(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of the same family: few layers of every kind, narrow, with short windows.

    Head widths stay (rotary tables depend on them). Weights are drawn wide enough for softcaps and windows to matter.
    """
    small = copy.deepcopy(config)
    small.__dict__.pop("quantization_config", None)
    text = small.get_text_config(decoder=True)
    _shrink(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def observe_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """The attention sites of a model as they run: what every layer hands to the attention function for two tokens."""
    seen: dict[int, AttentionSite] = {}
    names = {module: name for name, module in model.named_modules()}

    def observe(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        layer = len(seen) if layer is None else int(layer)
        seen[layer] = AttentionSite(
            id=names[module],
            layer=layer,
            module=names[module],
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_head_dim=key.shape[3],
            value_head_dim=value.shape[3],
            window_tokens=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            has_sinks=kwargs.get("s_aux") is not None,
        )
        return haversack_attention(module, query, key, value, *args, **kwargs)

    with registered(model, _OBSERVER, observe), torch.no_grad():
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    if not seen:
        raise UnsupportedModelError(f"{type(model).__name__} never calls the attention function that was set")
    return tuple(seen[layer] for layer in sorted(seen))


def neutral_plan(model: PreTrainedModel, *, batch_size: int, capacity_tokens: int) -> KVPlan:
    """Every token in the model's dtype at the sites that `observe_sites` finds."""
    sites = observe_sites(model)
    return KVPlan(sites, (KVOption(),) * len(sites), batch_size, capacity_tokens, DTYPE_NAMES[model.dtype])


@torch.no_grad()
def _largest_difference(model: PreTrainedModel) -> float:
    """Of the logits of real tokens, over the largest magnitude; infinite if one is not a number."""
    length = sum(STEPS)
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(0, vocab_size, (2, length), generator=generator)
    real = torch.ones_like(tokens)
    real[1, :PADDING_TOKENS] = 0
    expected = model(input_ids=tokens, attention_mask=real, use_cache=False).logits
    register()
    cache = HaversackCache(neutral_plan(model, batch_size=2, capacity_tokens=length))
    model.set_attn_implementation(NAME)
    pieces, done = [], 0
    for step in STEPS:
        chunk = slice(done, done + step)
        done += step
        output = model(input_ids=tokens[:, chunk], attention_mask=real[:, :done], past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
    difference = (torch.cat(pieces, dim=1) - expected).abs().amax(-1)[real.bool()].max() / expected.abs().max()
    return float(difference) if difference.isfinite() else float("inf")


def _shrink(config: PretrainedConfig) -> None:
    """Make a decoder's config small in place, keeping every kind of layer, the grouping of heads and the head width."""
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    keep = _layers_to_keep(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, [value[i] for i in keep])
        elif isinstance(value, int) and not isinstance(value, bool) and "intermediate_size" in name:
            setattr(config, name, min(value, 64))
        elif name in ("num_local_experts", "num_experts", "n_routed_experts") and isinstance(value, int):
            setattr(config, name, min(value, 4))
        elif name == "num_experts_per_tok" and isinstance(value, int):
            setattr(config, name, min(value, 2))
        elif name in ("sliding_window", "attention_chunk_size") and value is not None:
            setattr(config, name, WINDOW_TOKENS)
        elif name.endswith("_token_id"):
            setattr(config, name, None)
    config.num_hidden_layers = len(keep)
    kv_heads = min(num_kv_heads, 2)
    heads = kv_heads * min(num_heads // num_kv_heads, 2)
    config.num_attention_heads = heads
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = kv_heads
    config.hidden_size = heads * head_dim
    config.vocab_size = 64


def _layers_to_keep(config: PretrainedConfig) -> list[int]:
    """The first two layers of each kind, in order."""
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    keep: list[int] = []
    for kind in dict.fromkeys(kinds):
        keep += [i for i, other in enumerate(kinds) if other == kind][:2]
    return sorted(keep)
