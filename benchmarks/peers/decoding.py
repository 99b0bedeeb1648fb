"""Seconds per decoding step and per prefill of anything that is called like a transformers model, turn by turn. Runs in the peers' environments."""

import time

CHUNK_TOKENS = 512


def turns(build):
    """A task "speed" that keeps what `build(request)` makes from the first request on: a function of nothing that gives one turn's
    `step_seconds` and `prefill_seconds`, and what else each answer says (`weight_bytes` among it)."""
    kept = []

    def speed(request):
        if not kept:
            kept.append(build(request))
        turn, facts = kept[0]
        return {**turn(), **facts}

    return speed


def timed_turns(model, new_cache, settings, vocab_size):
    """Turns of `tokens` steps with `context` tokens before the first of them in each of `batch` sequences, and one prefill of `prefill` tokens.

    `new_cache` makes an empty cache, or returns None where the model keeps its own: the context is then read again in every turn. Tokens are
    random; logits of the last position only.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    batch, context = settings["batch"], settings["context"]
    state = {"cache": None, "position": context}

    def tokens(num_sequences, length):
        return torch.randint(5, vocab_size, (num_sequences, length), generator=generator)

    def fill(num_sequences, length):
        cache = new_cache()
        for start in range(0, length, CHUNK_TOKENS):
            model(tokens(num_sequences, min(CHUNK_TOKENS, length - start)), cache, start)
        return cache

    def turn():
        prefill, steps = [], []
        with torch.inference_mode():
            if settings["prefill"]:
                started = time.perf_counter()
                fill(1, settings["prefill"])
                prefill.append(time.perf_counter() - started)
            if state["cache"] is None:
                state.update(cache=fill(batch, context), position=context)
            for _ in range(settings["tokens"]):
                ids = tokens(batch, 1)
                started = time.perf_counter()
                model(ids, state["cache"], state["position"])
                steps.append(time.perf_counter() - started)
                state["position"] += 1
        return {"step_seconds": steps, "prefill_seconds": prefill}

    return turn
