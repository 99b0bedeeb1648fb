"""llmcompressor: GPTQ or nearest rounding, saved packed, read back and decompressed.

Settings: bits, group_size, symmetric, method ("gptq" or "nearest"), actorder, observer, embeddings (also quantize embedding and head).
"""

import shutil
from pathlib import Path

from exchange import file_bytes, serve, tensor_bytes


def weights(request):
    import json

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    settings = request["settings"]
    ids = json.loads(Path(request["calibration"]).read_text())
    scheme = {
        "num_bits": settings["bits"],
        "type": "int",
        "symmetric": settings["symmetric"],
        "strategy": "group",
        "group_size": settings["group_size"],
        "observer": settings["observer"],
    }
    linear = {"linears": {"targets": ["Linear"], "weights": dict(scheme)}}
    ignored = ["lm_head"]
    if settings["method"] == "gptq":
        linear["linears"]["weights"]["actorder"] = settings["actorder"]
        recipe = [GPTQModifier(config_groups=linear, ignore=ignored)]
    else:
        recipe = [QuantizationModifier(config_groups=linear, ignore=ignored)]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    rows = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    model.to(torch.bfloat16)  # what isn't quantized is stored as in the checkpoint
    out = Path(request["out"])
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, save_compressed=True)
    back = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        back(input_ids=torch.tensor([ids[0][:4]]))  # the first pass decompresses
    dense = out.with_suffix(".dense.safetensors")
    tied = back.config.tie_word_embeddings
    matrices = {
        name: tensor.detach().to(torch.float32).contiguous().clone()
        for name, tensor in back.state_dict().items()
        if name.endswith(".weight") and not (tied and name == "lm_head.weight")
    }
    save_file(matrices, dense)
    return {"dense": str(dense), "tensor_bytes": tensor_bytes(out), "file_bytes": file_bytes(out)}


serve({"weights": weights}, ["llmcompressor", "compressed-tensors", "transformers", "torch"])
