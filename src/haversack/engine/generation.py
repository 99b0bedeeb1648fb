"""Making plain `model.generate()` obey a KV plan, prefill included.

`generate` makes a DynamicCache and computes the whole prompt at once unless told otherwise. Both are decided in one
method, which is replaced on this one instance: the cache is the plan's, sized for this call, and the prompt is computed
in the plan's chunks.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from haversack.engine.attention import NAME, register
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.errors import UnsupportedModelError, UsageError

_FACTORY = "_prepare_cache_for_generation"


def install_kv_plan(model: PreTrainedModel, plan: KVPlan) -> None:
    """From now on `model.generate()` keeps its cache as planned, and refuses what would need more bytes.

    Sets the model's attention function, and clears a cache type that its generation config may ask for. A cache that
    the caller passes to `generate` itself, and `use_cache=False`, stay the caller's choice. Raises
    UnsupportedModelError where transformers won't let the attention function be chosen.
    """
    register()
    if not hasattr(model, _FACTORY):
        raise UnsupportedModelError(f"{type(model).__name__} can't generate, so there is no KV cache to plan.")
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(f"{type(model).__name__} does not let its attention function be chosen.")
    if model.generation_config is not None:
        model.generation_config.cache_implementation = None
    original = getattr(type(model), _FACTORY)

    def prepare_cache(
        self: PreTrainedModel,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise UsageError(
                f"cache_implementation={generation_config.cache_implementation!r} was asked, but this model's cache is "
                f"planned; leave it out, or pass past_key_values to step outside the plan."
            )
        cache = model_kwargs.get("past_key_values")
        if any(score.weighed for score in plan.selections):
            raise UsageError(
                "this model's cache keeps tokens by how much they surprise, which `generate` does not tell it; read through "
                "haversack.engine.sequence.PlannedSequence, or plan another cache."
            )
        if cache is None and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            ahead = _speculated_tokens(generation_config, generation_mode)
            cache = HaversackCache(plan, batch_size=rows, capacity_tokens=max_cache_length + ahead)
            model_kwargs["past_key_values"] = cache
        else:
            original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if isinstance(cache, HaversackCache):
            generation_config.prefill_chunk_size = _chunk_tokens(cache.plan, generation_config.prefill_chunk_size)

    setattr(model, _FACTORY, MethodType(prepare_cache, model))
    model.haversack_kv_plan = plan  # type: ignore[assignment]


def uninstall_kv_plan(model: PreTrainedModel, attn_implementation: str = "sdpa") -> None:
    """Give `generate` its own cache back, and the model another attention function."""
    model.__dict__.pop(_FACTORY, None)
    model.set_attn_implementation(attn_implementation)


def _speculated_tokens(generation_config: GenerationConfig, generation_mode: GenerationMode) -> int:
    """Tokens a speculative call may store beyond its last one, before it takes them back."""
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        return 0
    return generation_config.prompt_lookup_num_tokens or generation_config.num_assistant_tokens or 0


def _chunk_tokens(plan: KVPlan, asked: int | None) -> int | None:
    """The smaller of the plan's prefill chunk and the one this call asks for; None is a whole prompt."""
    chunks = [chunk for chunk in (plan.prefill_chunk_tokens, asked) if chunk is not None]
    return min(chunks, default=None)
