"""auto-round: rounding and clipping learned layer by layer, saved in its own format, read back and dequantized.

Settings: bits, group_size, symmetric, iterations, batch_size.
"""

import json
import shutil
from pathlib import Path

from exchange import file_bytes, serve, tensor_bytes


def weights(request):
    import torch
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = request["settings"]
    ids = json.loads(Path(request["calibration"]).read_text())
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16)
    tuned = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request["model"]),
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        iters=settings["iterations"],
        batch_size=settings["batch_size"],
        nsamples=len(ids),
        seqlen=len(ids[0]),
        dataset=[{"input_ids": torch.tensor([row])} for row in ids],
        device_map="cpu",
        enable_torch_compile=False,
    )
    out = Path(request["out"])
    shutil.rmtree(out, ignore_errors=True)
    tuned.quantize_and_save(str(out), format="auto_round")
    folder = next(path.parent for path in out.rglob("*.safetensors"))
    dense = out.with_suffix(".dense.safetensors")
    save_file(dequantized(folder), dense)
    return {"dense": str(dense), "tensor_bytes": tensor_bytes(folder), "file_bytes": file_bytes(folder)}


def dequantized(folder):
    """Checkpoint name -> float32 matrix, from the stored codes, zeros and scales (the GPTQ layout, or AWQ's, which has 4 bits)."""
    import torch
    from safetensors import safe_open

    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, layout = config["bits"], config.get("packing_format", "")
    dense = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            scales = stored[f"{module}.scales"].float()  # (groups, out)
            zeros = unpacked(stored[f"{module}.qzeros"], bits)[:, : scales.shape[1]]
            if "awq" in layout:
                codes, zeros = in_order(unpacked(tensor, bits)), in_order(zeros)
            else:
                codes = unpacked(tensor.T, bits).T  # (in, out)
            if "gptq" in layout and "v2" not in layout:
                zeros = zeros + 1
            group = codes.shape[0] // scales.shape[0]
            spread = scales.repeat_interleave(group, 0), zeros.repeat_interleave(group, 0)
            dense[f"{module}.weight"] = ((codes - spread[1]) * spread[0]).T.contiguous()
        elif not name.endswith((".scales", ".qzeros", ".g_idx")):
            dense[name] = tensor.to(torch.float32).contiguous()
    return dense


def in_order(codes):
    """AWQ's words hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight."""
    eights = codes.reshape(codes.shape[0], -1, 8)
    return eights[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(codes.shape)


def unpacked(words, bits):
    """`(rows, words)` int32 to `(rows, codes)`: consecutive fields of `bits`, crossing words where 32 is no multiple."""
    import torch

    as_bits = (words.contiguous()[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    fields = as_bits.reshape(words.shape[0], -1, bits)
    return (fields << torch.arange(bits, dtype=torch.int32)).sum(-1).float()


serve({"weights": weights}, ["auto-round", "transformers", "torch"])
