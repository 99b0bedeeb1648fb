"""transformers as it is: decoding in bfloat16, and its quantized cache.

Task "speed": batch, context, prefill, tokens. Task "kv": backend ("quanto" or "hqq"), bits, group_size, recent (tokens left as they are), probes.
"""

import contextlib
import json
from pathlib import Path

from cached_answers import compare, distinct_bytes
from decoding import timed_turns, turns
from exchange import serve


def prepare(request):
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(request["num_threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16).eval()

    def step(ids, cache, start):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    turn = timed_turns(step, lambda: DynamicCache(config=model.config), request["settings"], model.config.vocab_size)
    return turn, {"weight_bytes": sum(parameter.nbytes for parameter in model.parameters())}


def kv(request):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import QuantizedCache

    settings = request["settings"]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16).eval()
    axis = {"quanto": 0, "hqq": 1}[settings["backend"]]

    def new_cache():
        return QuantizedCache(
            backend=settings["backend"],
            config=model.config,
            nbits=settings["bits"],
            axis_key=axis,
            axis_value=axis,
            q_group_size=settings["group_size"],
            residual_length=settings["recent"],
        )

    probes = json.loads(Path(request["probes"]).read_text())
    return compare(model, probes, new_cache, contextlib.nullcontext, lambda cache: distinct_bytes(stored(cache.layers)))


def stored(of):
    """Every plain tensor inside layers, whatever the backend wraps them in."""
    import torch

    if isinstance(of, torch.Tensor) and hasattr(of, "__tensor_flatten__") and type(of) is not torch.Tensor:
        yield from stored([getattr(of, name) for name in of.__tensor_flatten__()[0]])
    elif isinstance(of, torch.Tensor):
        yield of
    elif isinstance(of, dict):
        yield from stored(list(of.values()))
    elif isinstance(of, (list, tuple)):
        for item in of:
            yield from stored(item)
    elif type(of).__name__.endswith("Layer"):
        yield from stored(vars(of))


serve({"speed": turns(prepare), "kv": kv}, ["transformers", "torch", "optimum-quanto", "hqq"])
