"""This project's own decoding and prefill of the packed 1.1B Llama shape, turn by turn, asked as peers are (`benchmarks.decode_peers`).

Task "speed": packed (the folder, which says how many bits activations have), cache ("16", or the bits of keys and values behind a recent window), batch, context, prefill, tokens, turns.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding import turns
from exchange import serve


def prepare(request: dict[str, Any]) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    import torch

    from benchmarks.decode import fill, held_bytes, one_cache, weight_bytes
    from haversack.engine.decoder.loop import Decoder
    from haversack.engine.kv_cache import HaversackCache
    from haversack.jobs.run import load

    torch.set_num_threads(request["num_threads"])
    settings = request["settings"]
    batch, context, tokens = settings["batch"], settings["context"], settings["tokens"]
    model = load(Path(request["packed"]))
    vocab_size = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    capacity = max(context, settings["prefill"]) + (settings["turns"] + 1) * tokens
    plan = one_cache(model, batch, capacity, settings["cache"])
    cache = HaversackCache(plan)
    fill(cache, context, generator)
    steps = Decoder(model).steps(cache, torch.randint(vocab_size, (batch,), generator=generator))

    def turn() -> dict[str, Any]:
        prefill, seconds = [], []
        with torch.inference_mode():
            if settings["prefill"]:
                ids = torch.randint(5, vocab_size, (1, settings["prefill"]), generator=generator)
                started = time.perf_counter()
                model(input_ids=ids, past_key_values=HaversackCache(plan), use_cache=True, logits_to_keep=1)
                prefill.append(time.perf_counter() - started)
            for _ in range(tokens):
                ids = torch.randint(5, vocab_size, (batch,), generator=generator)
                started = time.perf_counter()
                steps.next_tokens(ids)
                seconds.append(time.perf_counter() - started)
        return {"step_seconds": seconds, "prefill_seconds": prefill, "cache_bytes": held_bytes(cache)}

    return turn, {"weight_bytes": weight_bytes(model, batch)}


if __name__ == "__main__":
    serve({"speed": turns(prepare)}, ["torch", "transformers", "llvmlite"])
