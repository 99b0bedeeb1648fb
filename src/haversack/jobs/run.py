"""Running a packed folder: load it as planned, and generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.errors import DoesNotFitError, PlanError, UnsupportedModelError, UsageError
from haversack.formats.packed_folder import PLAN_NAME, PackedFolder, is_packed
from haversack.jobs import memory
from haversack.jobs.answer import Ends, answer
from haversack.jobs.interrupt import stoppable
from haversack.plan.schema import Plan
from haversack.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from haversack.engine.choice import Choice
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

    from haversack.engine.sampling import read_generation_config

    read_generation_config(path)  # or transformers would fail on it with a traceback
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
    choice: Choice | None = None,
    cap_bytes: int | None = None,
    on_text: Callable[[str], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt within the plan; the text, why it ended, counts, times, the loop that ran, and the process's
    private peak.

    `choice` says how tokens are chosen, on top of the model's generation config. `on_stage` is told what is done before
    the first token, and "" when it is there. With `cap_bytes` this process is put
    under a hard limit first. Raises UsageError for an empty prompt or a senseless count, PlanError for a folder that is
    not packed, DoesNotFitError for a prompt beyond the plan or a cap that is hit.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty; give --prompt or pipe a text in.")
    check_new_tokens(max_new_tokens)
    with within(folder, cap_bytes) as sampler:
        return _generate(folder, prompt, max_new_tokens, choice, on_text, on_stage or (lambda what: None)) | {
            "peak_private_bytes": sampler.finish(),
            "cap_bytes": cap_bytes,
        }


def check_new_tokens(max_new_tokens: int | None) -> None:
    """Raise UsageError for a senseless count."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}, but must be at least 1.")


@contextmanager
def within(folder: str | Path, cap_bytes: int | None) -> Iterator[memory.PeakSampler]:
    """Watch this process's private memory, under a hard limit if there is one; where memory runs out, say so.

    Raises PlanError for a folder that is not packed, UsageError for a cap that what is loaded passes already,
    DoesNotFitError when the limit is hit.
    """
    packed = check_packed(folder)
    memory.return_freed_memory()
    if cap_bytes is not None:
        import_runtime()  # libraries that meet the limit while they load end the process, or wait for ever
        memory.set_cap(cap_bytes, needed_bytes=_bytes_at_load(packed))
    with memory.PeakSampler() as sampler:
        try:
            yield sampler
        except DoesNotFitError:
            raise
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            if not memory.is_out_of_memory(error):
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
    choice: Choice | None,
    on_text: Callable[[str], None] | None,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    from haversack.engine.sampling import Sampler, end_strings, end_tokens
    from haversack.engine.sequence import PlannedSequence

    started = time.perf_counter()
    on_stage("loading the model")
    model, tokenizer = load(folder), open_tokenizer(folder)
    ids = list(tokenizer(prompt)["input_ids"])
    check_prompt(ids, model, folder)
    plan = model.haversack.kv_plan
    room = plan.capacity_tokens + 1 - len(ids)  # the last token is never stored
    new_tokens = min(max_new_tokens or room, room)
    sampler = Sampler(model.generation_config, choice)
    on_stage("compiling a decode step")
    decoder, refusal = open_decoder(model)
    on_stage("reading the prompt")
    ready = time.perf_counter()

    def show(piece: str) -> None:
        on_stage("")
        if on_text is not None:
            on_text(piece)

    with stoppable() as stopped:
        given = answer(
            PlannedSequence(model, plan, len(ids) + new_tokens - 1, decoder),
            ids,
            sampler,
            tokenizer,
            max_new_tokens=new_tokens,
            ends=Ends(end_tokens(model.generation_config, tokenizer), end_strings(model.generation_config)),
            on_text=show,
            stopped=stopped,
        )
    return {
        "text": given.text,
        "finish": given.finish,
        "prompt_tokens": len(ids),
        "new_tokens": len(given.tokens),
        "seconds_to_load": ready - started,
        "seconds_to_first_token": given.seconds_to_first_token,
        "tokens_per_second": given.tokens_per_second,
        "loop": loop_name(decoder),
        "loop_reason": refusal,
        "sampling": sampler.settings,
        "notes": [*sampler.notes, *_cut_short(given.finish, max_new_tokens, new_tokens, plan.capacity_tokens)],
    }


def _cut_short(finish: str, asked: int | None, possible: int, capacity_tokens: int) -> list[str]:
    """What to say where the answer ends because the plan holds no more, though more was asked."""
    if finish != "length" or asked is None or asked <= possible:
        return []
    return [
        f"{asked} new tokens were asked, but the plan's context of {capacity_tokens + 1} tokens was full after {possible}; pack with a longer "
        "--context for more"
    ]


def open_decoder(model: Any) -> tuple[Decoder | None, str | None]:
    """A decoder of compiled steps for a packed model; None where it can have none, with the reason by name."""
    from haversack.engine.decoder.attach import attach_decoder

    try:
        return attach_decoder(model), None
    except UnsupportedModelError as error:
        return None, str(error)


def loop_name(decoder: Decoder | None) -> str:
    """Which decode loop runs: compiled steps, or transformers' own."""
    from haversack.engine.decoder.loop import LOOP

    return "transformers" if decoder is None else LOOP


def check_prompt(ids: Sequence[int], model: Any, folder: str | Path) -> None:
    """Raise DoesNotFitError for more tokens than planned, and PlanError where the tokenizer is not the model's own."""
    num_tokens, capacity = len(ids), model.haversack.kv_plan.capacity_tokens
    if num_tokens == 0:
        raise UsageError("the prompt gives no tokens; write some words.")
    if num_tokens > capacity:
        raise DoesNotFitError(
            f"the prompt has {num_tokens} tokens, but the plan holds {capacity} per user; "
            "shorten it, or pack with a longer --context."
        )
    if (highest := max(ids)) >= model.haversack.described.vocab_size:
        raise PlanError(
            f"the tokenizer in {folder} gives token {highest}, but the model has {model.haversack.described.vocab_size}; "
            "copy the model's own tokenizer there."
        )
