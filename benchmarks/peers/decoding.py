"""Seconds per decoding step and per prefill of anything that is called like a transformers model. Runs in the peers' environments."""

import time


def seconds(model, new_cache, settings, vocab_size):
    """`step_seconds` with `context` tokens before them in each of `batch` sequences, `prefill_seconds` of `prefill` tokens.

    `new_cache` makes an empty cache, or None where the model keeps its own. Tokens are random; logits of the last position only.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    batch, context, chunk = settings["batch"], settings["context"], 512

    def tokens(num_sequences, length):
        return torch.randint(5, vocab_size, (num_sequences, length), generator=generator)

    def fill(cache, num_sequences, length):
        for start in range(0, length, chunk):
            model(tokens(num_sequences, min(chunk, length - start)), cache, start)
        return cache

    prefill, steps = [], []
    with torch.inference_mode():
        for _ in range(settings["repeats"] if settings["prefill"] else 0):
            cache = new_cache()
            started = time.perf_counter()
            fill(cache, 1, settings["prefill"])
            prefill.append(time.perf_counter() - started)
        cache = fill(new_cache(), batch, context)
        for step in range(settings["tokens"]):
            ids = tokens(batch, 1)
            started = time.perf_counter()
            model(ids, cache, context + step)
            steps.append(time.perf_counter() - started)
    return {"step_seconds": steps, "prefill_seconds": prefill}
