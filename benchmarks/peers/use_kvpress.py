"""kvpress: one of its presses compresses the cache while the context is read.

Task "kv": press (its class), ratio (the nominal share that is dropped), probes. Bytes are those of the keys and values that all layers hold afterwards.
"""

import json
from pathlib import Path

from cached_answers import compare, distinct_bytes
from exchange import serve


def kv(request):
    import kvpress
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    settings = request["settings"]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16).eval()
    press = getattr(kvpress, settings["press"])(compression_ratio=settings["ratio"])
    probes = json.loads(Path(request["probes"]).read_text())

    def held(cache):
        return distinct_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))

    return compare(model, probes, lambda: DynamicCache(config=model.config), lambda: press(model), held)


serve({"kv": kv}, ["kvpress", "transformers", "torch"])
