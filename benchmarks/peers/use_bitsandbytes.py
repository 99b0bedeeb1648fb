"""bitsandbytes: fixed 4-bit formats and int8, without calibration.

Settings: format ("nf4", "fp4" or "int8"), double (scales quantized too).
"""

import shutil
from pathlib import Path

from exchange import file_bytes, serve, tensor_bytes


def weights(request):
    import bitsandbytes as bnb
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = request["settings"]
    if settings["format"] == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings["format"],
            bnb_4bit_use_double_quant=settings["double"],
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    ).eval()
    out = Path(request["out"])
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            dense[f"{name}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight
            scale = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
            dense[f"{name}.weight"] = weight.data.float() * (scale.float()[:, None] / 127.0)
    for name, parameter in model.named_parameters():
        if name not in dense:
            dense[name] = parameter.detach().float()
    path = out.with_suffix(".dense.safetensors")
    save_file({name: tensor.contiguous().clone() for name, tensor in dense.items()}, path)
    return {"dense": str(path), "tensor_bytes": tensor_bytes(out), "file_bytes": file_bytes(out)}


serve({"weights": weights}, ["bitsandbytes", "transformers", "torch"])
