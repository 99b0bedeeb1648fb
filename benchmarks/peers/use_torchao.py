"""torchao: weights in 4 or 8 bits inside a transformers model, on a CPU.

Task "speed": format ("int4", its prototype for CPUs, groups of 128 with bfloat16 activations, or "int8"); batch, context, prefill, tokens.
"""

from decoding import timed_turns, turns
from exchange import serve


def prepare(request):
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(request["num_threads"])
    settings = request["settings"]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16).eval()
    if settings["format"] == "int4":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=128))
    else:
        quantize_(model, Int8WeightOnlyConfig())

    def step(ids, cache, start):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    turn = timed_turns(step, lambda: DynamicCache(config=model.config), settings, model.config.vocab_size)
    return turn, {"weight_bytes": sum(map(stored_bytes, model.parameters()))}


def stored_bytes(tensor):
    """Bytes inside a torchao tensor: of all tensors that it is made of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    return sum(stored_bytes(getattr(tensor, name)) for name in names) if names else tensor.nbytes


serve({"speed": turns(prepare)}, ["torchao", "transformers", "torch"])
