"""Optimizers and adapters of other tools in one environment: torch, bitsandbytes, torchao, galore-torch, apollo-torch, peft.

Tasks "train" and "measure" (`training.py`). Settings: optimizer, method ("full", "lora", "qlora"), lora_rank, recompute, micro_batch.
"""

from exchange import serve
from training import Step, measure, train

DECAY = 0.01
"""Weight decay of everybody, as torch's AdamW has it."""


def make(request):
    settings = request["settings"]
    model = open_model(request)
    if settings["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if settings["method"] != "full":
        model = with_adapters(model, settings)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in n]
    return Step(model, [OPTIMIZERS[settings["optimizer"]](trained, inner, request["rate"])], settings["micro_batch"])


def open_model(request):
    """In 32 bits, or with the matrices of its layers in nf4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    if request["init"] == "random":
        config = AutoConfig.from_pretrained(request["model"])
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    packed = None
    if request["settings"]["method"] == "qlora":
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32, quantization_config=packed)


def with_adapters(model, settings):
    from peft import LoraConfig, get_peft_model

    if settings["recompute"]:
        model.enable_input_require_grads()
    rank = settings["lora_rank"]
    asked = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, asked)


def torch_adamw(trained, inner, rate):
    import torch

    return torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY)


def bitsandbytes_8bit(trained, inner, rate):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trained, lr=rate, weight_decay=DECAY)


def torchao_8bit(trained, inner, rate):
    from torchao.optim import AdamW8bit

    return AdamW8bit(trained, lr=rate, weight_decay=DECAY)


def torchao_4bit(trained, inner, rate):
    from torchao.optim import AdamW4bit

    return AdamW4bit(trained, lr=rate, weight_decay=DECAY)


def galore(trained, inner, rate):
    """A quarter of the narrower side, scale and interval as its README has them (the interval shorter, for runs this short)."""
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(projected(trained, inner, update_proj_gap=50, scale=0.25), lr=rate, weight_decay=DECAY)


def apollo(trained, inner, rate):
    """A quarter of the narrower side, gradients scaled by channel."""
    from apollo_torch import APOLLOAdamW

    settings = {"proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 50}
    return APOLLOAdamW(projected(trained, inner, **settings), lr=rate, weight_decay=DECAY)


def projected(trained, inner, **settings):
    """Groups: what keeps whole states, and the layers' matrices."""
    own = {id(parameter) for parameter in inner}
    rank = min(min(parameter.shape) for parameter in inner) // 4
    rest = [parameter for parameter in trained if id(parameter) not in own]
    return [{"params": rest}, {"params": inner, "rank": rank, "proj_type": "std", **settings}]


OPTIMIZERS = {
    "torch AdamW": torch_adamw,
    "bitsandbytes 8-bit AdamW": bitsandbytes_8bit,
    "torchao 8-bit AdamW": torchao_8bit,
    "torchao 4-bit AdamW": torchao_4bit,
    "galore-torch": galore,
    "apollo-torch": apollo,
}

if __name__ == "__main__":
    packages = ["torch", "transformers", "bitsandbytes", "torchao", "galore-torch", "apollo-torch", "peft"]
    serve({"train": train(make), "measure": measure(make)}, packages)
