"""Running a packed folder: load it as planned, and generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.errors import DoesNotFitError, PlanError, UnsupportedModelError, UsageError
from haversack.formats.packed_folder import PLAN_NAME, PackedFolder, is_packed
from haversack.jobs import memory
from haversack.plan.schema import Plan
from haversack.units import format_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from haversack.engine.decoder.loop import Decoder


def check_packed(folder: str | Path) -> PackedFolder:
    """A packed folder after the cheap check. Raises PlanError for what isn't one, or was edited."""
    path = Path(folder)
    if not path.is_dir():
        raise PlanError(f"there is no folder {str(folder)!r}; name one that `haversack pack` wrote.")
    if not (path / "config.json").is_file():
        raise PlanError(f"{folder} has no config.json, so it is no model; name a folder that `haversack pack` wrote.")
    if not is_packed(path):
        raise PlanError(f"{folder} is not packed; run `haversack pack {folder} --budget ... -o OUT` first.")
    return PackedFolder.open(path)


def load(folder: str | Path) -> Any:
    """The packed model, through transformers' own `from_pretrained`. Raises PlanError for a folder that isn't packed."""
    path = check_packed(folder).path
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises PlanError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise PlanError(
            f"{folder} has no usable tokenizer ({type(error).__name__}: {reason}); copy tokenizer.json and "
            "tokenizer_config.json there from the model's source."
        ) from None


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    cap_bytes: int | None = None,
    on_text: Callable[[str], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt within the plan; the text, token counts, times, the loop that ran and the process's private peak.

    `on_stage` is told what is done before the first token.

    With `cap_bytes` this process is put under a hard limit first. Raises UsageError for an empty prompt or a senseless
    count, PlanError for a folder that is not packed, DoesNotFitError for a prompt beyond the plan or a cap that is hit.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty; give --prompt or pipe a text in.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}, but must be at least 1.")
    packed = check_packed(folder)
    memory.return_freed_memory()
    if cap_bytes is not None:
        import_runtime()  # libraries that meet the limit while they load end the process, or wait for ever
        memory.set_cap(cap_bytes, needed_bytes=_bytes_at_load(packed))
    with memory.PeakSampler() as sampler:
        try:
            return _generate(folder, prompt, max_new_tokens, on_text, on_stage or (lambda what: None)) | {
                "peak_private_bytes": sampler.finish(),
                "cap_bytes": cap_bytes,
            }
        except DoesNotFitError:
            raise
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            if not _is_out_of_memory(error):
                raise
            limit = "this machine's memory" if cap_bytes is None else f"its cap of {format_bytes(cap_bytes)}"
            raise DoesNotFitError(
                f"the run hit {limit} at {format_bytes(sampler.peak_bytes)} of private memory; "
                "allow more, or pack for a smaller budget.",
                budget_bytes=cap_bytes or 0,
            ) from None


def import_runtime() -> None:
    """What loading a packed folder imports."""
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto  # noqa: F401

    import haversack.engine.load  # noqa: F401


def _bytes_at_load(packed: PackedFolder) -> int:
    """Private bytes of the plan's tensors when the model is loaded, the least any run takes beside the runtime."""
    plan = Plan.from_json(packed.plan_text, str(packed.path / PLAN_NAME))
    return sum(n for owner, n in plan.ledger.owners_at("load").items() if owner != "runtime")


def _generate(
    folder: str | Path,
    prompt: str,
    max_new_tokens: int | None,
    on_text: Callable[[str], None] | None,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    import torch

    on_stage("loading the model")
    model, tokenizer = load(folder), open_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    _check_prompt(ids, model, folder)
    room = model.haversack.kv_plan.capacity_tokens + 1 - ids.shape[1]  # the last token is never stored
    streamer = _Streamer(tokenizer, on_text)
    on_stage("making its decoder")
    decoder, refusal = open_decoder(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    on_stage("reading the prompt")
    started = time.perf_counter()
    with torch.inference_mode():
        out = generate_greedily(
            model, decoder, ids, min(max_new_tokens or room, room), pad_token_id=pad, streamer=streamer
        )
    seconds = time.perf_counter() - started
    new_tokens = out.shape[1] - ids.shape[1]
    first = streamer.first_token_seconds - started if streamer.first_token_seconds else seconds
    return {
        "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "seconds_to_first_token": first,
        "tokens_per_second": (new_tokens - 1) / (seconds - first) if new_tokens > 1 and seconds > first else 0.0,
        "loop": loop_name(decoder),
        "loop_reason": refusal,
    }


def open_decoder(model: Any) -> tuple[Decoder | None, str | None]:
    """A decoder of compiled steps for a packed model; None where it has none, with the reason by name."""
    from haversack.engine.decoder.attach import attach_decoder

    if asked := _asked_of_generation(model.generation_config):
        return None, f"the model's generation config asks for {', '.join(asked)}; transformers' own loop decodes it."
    try:
        return attach_decoder(model), None
    except UnsupportedModelError as error:
        return None, str(error)


def loop_name(decoder: Decoder | None) -> str:
    """Which decode loop runs: compiled steps, or transformers' own."""
    from haversack.engine.decoder.loop import LOOP

    return "transformers" if decoder is None else LOOP


def generate_greedily(
    model: Any,
    decoder: Decoder | None,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    pad_token_id: int | None,
    streamer: Any = None,
) -> torch.Tensor:
    """Prompt and greedy tokens, `(batch, prompt + new)`, by a decoder's steps or by `model.generate`."""
    import torch

    mask = torch.ones_like(ids)
    if decoder is None:
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            do_sample=False,
            pad_token_id=pad_token_id,
        )
    ends = model.generation_config.eos_token_id
    if streamer is not None:
        streamer.put(ids)
    out, _ = decoder.generate(
        ids,
        mask,
        max_new_tokens,
        eos_token_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
        pad_token_id=pad_token_id or 0,
        on_tokens=None if streamer is None else streamer.put,
    )
    if streamer is not None:
        streamer.end()
    return out


_PLAIN_GENERATION = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "use_cache", "num_beams",
    "_from_model_config", "cache_implementation", "prefill_chunk_size",
}  # fmt: skip
"""What a generation config may set without changing greedy tokens."""


def _asked_of_generation(config: Any) -> list[str]:
    """What a model's generation config asks for that compiled steps do not do (penalties, forced tokens, beams)."""
    asked = {} if config is None else config.to_diff_dict()
    extra = [name for name, value in asked.items() if name not in _PLAIN_GENERATION and value not in (None, False)]
    return extra + (["num_beams"] if (asked.get("num_beams") or 1) > 1 else [])


def _check_prompt(ids: torch.Tensor, model: Any, folder: str | Path) -> None:
    """Raise DoesNotFitError for more tokens than planned, and where the tokenizer is not the model's own."""
    num_tokens, capacity = ids.shape[1], model.haversack.kv_plan.capacity_tokens
    if num_tokens == 0:
        raise UsageError("the prompt gives no tokens; write some words.")
    if num_tokens > capacity:
        raise DoesNotFitError(
            f"the prompt has {num_tokens} tokens, but the plan holds {capacity} per user; "
            "shorten it, or pack with a longer --context."
        )
    if (highest := int(ids.max())) >= model.haversack.described.vocab_size:
        raise PlanError(
            f"the tokenizer in {folder} gives token {highest}, but the model has {model.haversack.described.vocab_size}; "
            "copy the model's own tokenizer there."
        )


_SIGNS_OF_EXHAUSTION = ("alloc", "memory", "failed to map", "start new thread")
"""Words of torch's allocator, the dynamic loader and Python's threads when a limit is hit."""


def _is_out_of_memory(error: BaseException) -> bool:
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in _SIGNS_OF_EXHAUSTION)


class _Streamer:
    """Receives tokens from `generate` and passes decoded text on, whole words at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None):
        from transformers import TextStreamer

        class Text(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if on_text is not None:
                    on_text(text)

        self.first_token_seconds = 0.0
        self._inner = Text(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        if self._seen_prompt and not self.first_token_seconds:
            self.first_token_seconds = time.perf_counter()
        self._seen_prompt = True
        self._inner.put(value)

    def end(self) -> None:
        self._inner.end()
