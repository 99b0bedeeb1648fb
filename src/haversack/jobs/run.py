"""Running a packed folder: load it as planned, and generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.errors import DoesNotFitError, PlanError, UsageError
from haversack.jobs import memory
from haversack.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(folder: str | Path) -> Any:
    """The packed model, through transformers' own `from_pretrained`. Raises PlanError for a folder that isn't packed."""
    from haversack.formats.packed_folder import is_packed

    path = Path(folder)
    if not path.is_dir():
        raise PlanError(f"there is no folder {str(folder)!r}; name one that `haversack pack` wrote.")
    if not is_packed(path):
        raise PlanError(f"{folder} is not packed; run `haversack pack {folder} --budget ... -o OUT` first.")
    from transformers import AutoModelForCausalLM

    from haversack.engine.quiet import quiet_transformers

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises PlanError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    cap_bytes: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt within the plan; the text, token counts, times and the process's private peak.

    With `cap_bytes` this process is put under a hard limit first. Raises DoesNotFitError for a prompt beyond the plan, or
    when the cap is hit.
    """
    if not prompt:
        raise UsageError("the prompt is empty; give --prompt or pipe a text in.")
    memory.return_freed_memory()
    if cap_bytes is not None:
        memory.set_cap(cap_bytes)
    import torch

    with memory.PeakSampler() as sampler:
        try:
            model, tokenizer = load(folder), open_tokenizer(folder)
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            plan = model.haversack.kv_plan
            room = plan.capacity_tokens + 1 - ids.shape[1]  # the last token is never stored
            if room < 1:
                raise DoesNotFitError(
                    f"the prompt has {ids.shape[1]} tokens, but the plan holds {plan.capacity_tokens} per user; "
                    "shorten it, or pack with a longer --context."
                )
            streamer = _Streamer(tokenizer, on_text)
            started = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(max_new_tokens or room, room),
                    streamer=streamer,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                )
            seconds = time.perf_counter() - started
        except (MemoryError, RuntimeError) as error:
            if cap_bytes is None or not _is_out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"the run hit its cap of {format_bytes(cap_bytes)} at {format_bytes(sampler.peak_bytes)} of private memory; "
                "allow more, or pack for a smaller budget.",
                budget_bytes=cap_bytes,
            ) from None
    new_tokens = out.shape[1] - ids.shape[1]
    first = streamer.first_token_seconds - started if streamer.first_token_seconds else seconds
    return {
        "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "seconds_to_first_token": first,
        "tokens_per_second": (new_tokens - 1) / (seconds - first) if new_tokens > 1 and seconds > first else 0.0,
        "peak_private_bytes": sampler.peak_bytes,
        "cap_bytes": cap_bytes,
    }


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "alloc" in str(error).lower() or "memory" in str(error).lower()


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
