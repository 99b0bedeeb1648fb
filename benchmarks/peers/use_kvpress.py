"""kvpress: one of its presses compresses the cache while the context is read.

Task "kv": press (its class), bytes (what the cache may hold after a context: the press's ratio follows, per probe), probes. Bytes that are answered are
those of the keys and values that all layers hold afterwards. One model to a process.
"""

import contextlib
import functools
import json
from pathlib import Path

from cached_answers import compare, distinct_bytes
from exchange import serve


@functools.cache
def loaded(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def kv(request):
    import kvpress
    from transformers import DynamicCache

    settings = request["settings"]
    model = loaded(request["model"])
    press = getattr(kvpress, settings["press"])()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    probes = json.loads(Path(request["probes"]).read_text())

    def held(cache):
        return distinct_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))

    def compressing(num_tokens):
        kept = settings["bytes"] / per_token / num_tokens
        if kept >= 1:
            return contextlib.nullcontext()
        press.compression_ratio = 1 - kept
        return press(model)

    return compare(model, probes, lambda: DynamicCache(config=config), compressing, held, settings["bytes"])


serve({"kv": kv}, ["kvpress", "transformers", "torch"])
