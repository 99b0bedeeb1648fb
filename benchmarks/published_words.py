"""A published row's own words as a setting that can be predicted, or the reason why not, by name.

Rows that `published.toml` does not know are read here, so that a file with other rows is scored as far as its words go. A
rule reads only what a source prints; what it leaves out and no default of its own fills is a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, str]

SHORT_PROMPT_TOKENS, NEW_TOKENS = 16, 256
"""litgpt's `generate` by default answers in 256 tokens; of short prompts nobody prints the length, which moves a peak by megabytes."""

UNITS = {
    "bytes": 1.0,
    "b": 1.0,
    "kib": 2.0**10,
    "mib": 2.0**20,
    "gib": 2.0**30,
    "tib": 2.0**40,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
}

OTHER_ENGINES = {
    "liger": "Liger's Triton kernels", "unsloth": "unsloth's kernels", "vllm": "vLLM", "sglang": "SGLang", "tensorrt": "TensorRT-LLM",
    "llama.cpp": "llama.cpp", "llama-bench": "llama.cpp", "gguf": "llama.cpp", "ollama": "llama.cpp", "exllama": "exllamav3", "mlx": "MLX", "ktransformers": "KTransformers",
    "cut cross-entropy": "a cut cross-entropy kernel", "cut-cross-entropy": "a cut cross-entropy kernel", "megatron": "Megatron's fused kernels",
    "lmdeploy": "LMDeploy", "tgi": "text-generation-inference", "mlc": "MLC",
}  # fmt: skip
"""Engines with kernels and allocators of their own: reported, never scored."""


class NotScoredError(Exception):
    """Why a row can't be scored, as the table shows it."""


def read_setting(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The setting of a row: `kind`, and `run` with its fields and `value` (bytes) where it is scored, else `why`."""
    try:
        for wanted, rule in _RULES:
            if wanted(row):
                return rule(row, models)
        _refuse_engine(row)
        raise NotScoredError(f"no rule reads the task {row.get('task', '')!r} of {row.get('source', '')[:60]!r}")
    except NotScoredError as why:
        engine = _engine(row)
        return {"kind": "other" if engine is not None and str(why) == engine else "dropped", "why": str(why)}


def number_of_bytes(value: str, unit: str) -> tuple[float, int]:
    """A printed number in its unit as bytes, and how many digits it has. Raises NotScoredError for several numbers, none, or a unit
    that is unclear."""
    numbers = re.findall(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?", value.lower())
    if len(numbers) != 1:
        raise NotScoredError(f"the value {value!r} is not one number")
    printed = numbers[0].replace(",", "")
    figures = re.sub(r"e.*|\D", "", printed).lstrip("0")
    digits = len(figures if "." in printed else figures.rstrip("0"))
    return float(round(float(printed) * bytes_of_unit(unit))), max(1, digits)


def bytes_of_unit(unit: str) -> float:
    """Bytes of one unit as a source prints it; `printed GB = GiB` counts in what it equals. Raises NotScoredError where unclear."""
    words = unit.lower()
    if any(doubt in words for doubt in ("uncertain", "not stated", "mixed", "?")):
        raise NotScoredError(f"the unit is unclear ({unit})")
    if "1e9" in words:
        return 1e9
    named = [word for word in re.findall(r"[a-z]+", words.replace("as printed", "")) if word in UNITS]
    if not named:
        raise NotScoredError(f"the unit {unit!r} is not one of bytes")
    return UNITS[named[-1]]


def model_named(text: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """The known model with the longest name within a row's. Raises NotScoredError for none."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    found = [key for key in models if re.sub(r"[^a-z0-9]", "", key) in plain]
    if not found:
        raise NotScoredError(f"the model {text!r} has no config in published.toml")
    return max(found, key=len)


def count_of_tokens(text: str) -> list[int]:
    """Every number of tokens in a setting: `32768 tokens`, `128k tokens`, `1M tokens`, `max len 196608`."""
    thousands = {"": 1, "k": 1000, "m": 10**6}
    listed = re.findall(r"((?:[\d.]+\s*[km]?\s*/\s*)*[\d.]+\s*[km]?)\s*tok", text.lower())
    listed += re.findall(r"max(?:imum)? (?:context|len(?:gth)?)\s*(\d+)", text.lower())
    pieces = [piece.strip() for found in listed for piece in found.split("/")]
    return [
        round(float(re.sub(r"[ km]", "", piece)) * thousands[piece[-1] if piece[-1] in "km" else ""])
        for piece in pieces
    ]


def _litgpt_tune(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    setting = row["setting"]
    if "fsdp" in setting.lower() or re.search(r"[2-9] ?x", row.get("hardware", "").split(";")[0]):
        raise NotScoredError("several GPUs: FSDP with checkpointed blocks, whose limits of gathering are not printed")
    if not row["task"].startswith("lora"):
        raise NotScoredError(f"litgpt's {row['task']} has modules of its own, which are not described here")
    batch = re.search(r"micro-?batch(?: size)? (\d+)", setting)
    quant = re.search(r"quant (none|bnb\.[\w-]+)", setting)
    if batch is None or quant is None:
        raise NotScoredError("micro-batch or quantization is not printed")
    model = model_named(row["model"], models)
    tokens = _longest_sample(setting, row["model"])
    return _scored(row, {"run": "tune", "model": model, "batch": int(batch[1]), "tokens": tokens, **_format(quant[1])})


def _longest_sample(setting: str, model: str) -> int:
    """`longest sample 1304 tok (phi 1044, StableLM 1034)`: the number beside the model's name, or the first."""
    for name, number in re.findall(r"([A-Za-z]\w+) (\d{3,})", setting.partition("longest sample")[2]):
        if name.lower() in model.lower():
            return int(number)
    first = re.search(r"longest sample (\d+)", setting)
    if first is None:
        raise NotScoredError("the longest sample's length is not printed")
    return int(first[1])


def _torchtune(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Its full tuning on one device: all in bfloat16, torch's AdamW, rows packed to one length, logits widened for the loss."""
    setting = row["setting"].lower()
    if "compile" in setting or ("cumulative" in setting and not re.search(r"baseline|\+ ?packed", setting)):
        raise NotScoredError("a compiled graph: the compiler decides what is saved")
    if not row["task"].startswith("full"):
        raise NotScoredError(f"torchtune's {row['task']} has modules of its own, which are not described here")
    if "packed" not in setting.replace("unpacked", ""):
        raise NotScoredError("unpacked sequences whose lengths are not printed")
    batch, tokens = re.search(r"batch (\d+)", setting), re.search(r"(?:max seq|packed|seq) (\d+)", setting)
    if batch is None or tokens is None or "single device" not in setting:
        raise NotScoredError("batch, length or number of devices is not printed")
    return _scored(
        row,
        {
            "run": "full",
            "model": model_named(row["model"], models),
            "batch": int(batch[1]),
            "tokens": int(tokens[1]),
            "recompute": "full" if "checkpoint" in setting else "none",
        },
    )


def _generate(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    setting, is_litgpt = row["setting"].lower(), "litgpt" in row["source"].lower() or "lit-gpt" in row["source"].lower()
    if "compile" in setting:
        raise NotScoredError("a compiled graph")
    quant = re.search(r"(bnb\.[\w-]+|(?:quant )?none|bnb [48]-bit|fp16|bf16)", setting)
    if quant is None:
        raise NotScoredError("the weights' format is not printed")
    prompt = re.search(r"prompt (?:of )?(\d+)|(\d+)[ -]token prompt", setting)
    new = re.search(r"(\d+) (?:new|generated) tokens|generate[sd]? (\d+)", setting)
    if not is_litgpt and prompt is None and "short prompt" not in setting:
        raise NotScoredError("the prompt's length is not printed")
    tokens = int(next(filter(None, prompt.groups()))) if prompt else SHORT_PROMPT_TOKENS
    tokens += int(next(filter(None, new.groups()))) if new else NEW_TOKENS if is_litgpt else 60
    fields: dict[str, Any] = {
        "run": "generate",
        "model": model_named(row["model"], models),
        "tokens": tokens,
        **_format(quant[1]),
    }
    if is_litgpt and "format" in fields:
        fields["requantizes"] = True
    if not is_litgpt and "format" in fields:
        fields |= {"head": "BF16", "unpacks": fields["format"] != "int8"}  # transformers leaves the head as it is
    split = re.search(r"(sequential|tensor parallel)[^;]*over (\d+)", setting)
    if split:
        fields["stages" if split[1] == "sequential" else "tensor"] = int(split[2])
    return _scored(row, {**fields, "assumed": f"{tokens} tokens"})


def _zero(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    size = re.search(r"([\d.]+) ?([bm])\b", row["model"].lower())
    ranks = re.search(r"n_?d ?= ?(\d+)|(\d+) (?:gpus|ranks)", f"{row['setting']} {row.get('hardware', '')}".lower())
    if size is None or ranks is None:
        raise NotScoredError("parameters or ranks are not printed")
    stage = _stage(row["setting"])
    number = float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]
    return _scored(
        row, {"run": "zero", "parameters": number, "ranks": int(ranks[1] or ranks[2]), "stage": stage}, "formula"
    )


def _stage(setting: str) -> int:
    words = re.sub(r"[^a-z0-9+ ]", "", setting.lower())
    if "baseline" in words:
        return 0
    for stage, names in (
        (3, ("pos+g+p", "zero3", "stage 3", "zero 3")),
        (2, ("pos+g", "zero2", "stage 2", "zero 2")),
        (1, ("pos", "zero1", "stage 1", "zero 1")),
    ):
        if any(name in words for name in names):
            return stage
    raise NotScoredError("the stage of ZeRO is not printed")


def _deepspeed(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    size = re.search(r"(\d+)M \(largest layer (\d+)M\)", row["model"])
    grid = re.search(r"(\d+) nodes? x (\d+) GPUs?", row["setting"])
    if size is None or grid is None:
        raise NotScoredError("parameters, the largest layer or ranks are not printed")
    setting = row["setting"].lower()
    offload = "" if "no offload" in setting or "none" in setting else "all" if "param" in setting else "optimizer"
    fields = {
        "run": "deepspeed",
        "parameters": float(size[1]) * 1e6,
        "widest": float(size[2]) * 1e6,
        "ranks": int(grid[1]) * int(grid[2]),
        "stage": _stage(setting),
        "offload": offload,
    }
    first = {**row, "value": row["value"].split("/")[0]}
    return _scored(first, fields, "formula")


def _kv(row: Row, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    tokens = count_of_tokens(row["setting"])
    if not tokens:
        raise NotScoredError("no number of tokens is printed")
    latent = re.search(r"(\d+)(?: layers)? x (\d+) x 2 B", row.get("note", ""))
    if latent:
        values = row["value"].split("/")
        fields: dict[str, Any] = {
            "run": "kv latent",
            "layers": int(latent[1]),
            "width": int(latent[2]),
            "tokens": tokens[-1],
        }
        return _scored({**row, "value": values[-1]}, fields, "formula")
    heads = re.search(r"2 x (\d+) x (\d+) x (\d+) x (\d) x", row.get("note", ""))
    if heads:
        numbers = dict(zip(("layers", "heads", "width", "bytes"), map(int, heads.groups()), strict=True))
        values = row["value"].split("/")
        return _scored(
            {**row, "value": values[min(1, len(values) - 1)]},
            {"run": "kv heads", **numbers, "tokens": tokens[-1]},
            "formula",
        )
    if re.search(r"q[48]_\d|fp8|int[48]|[48]-bit", row["setting"].lower()) and not re.search(r"f16 vs", row["setting"]):
        raise NotScoredError("a quantized cache of another engine")
    values = re.split(r" vs |/", row["value"])
    place = len(tokens) - 1 if len(values) == len(tokens) else 0
    if len(values) not in (1, len(tokens)) and "f16 vs" not in row["setting"]:
        raise NotScoredError(f"{len(values)} values are printed for {len(tokens)} lengths")
    fields = {"run": "kv", "model": model_named(row["model"], models), "tokens": tokens[place]}
    return _scored({**row, "value": values[place]}, fields, "formula")


def _format(quant: str) -> dict[str, Any]:
    """The published format of weights; nothing where they are in 16 bits."""
    names = {"bnb 8-bit": "int8", "bnb.int8": "int8", "bnb 4-bit": "fp4"}
    if quant in ("none", "quant none", "fp16", "bf16"):
        return {}
    return {"format": names.get(quant, quant.removeprefix("bnb."))}


def _scored(row: Row, fields: dict[str, Any], kind: str = "torch") -> dict[str, Any]:
    value, digits = number_of_bytes(row["value"], row["unit"])
    return {"kind": kind, **fields, "value": value, "digits": digits, "read": True}


def _engine(row: Row) -> str | None:
    words = " ".join(row.get(name, "") for name in ("task", "setting", "source", "metric")).lower()
    return next((what for name, what in OTHER_ENGINES.items() if name in words), None)


def _refuse_engine(row: Row) -> None:
    engine = _engine(row)
    if engine is not None:
        raise NotScoredError(engine)
    setting = row.get("setting", "").lower()
    if "compile" in setting:
        raise NotScoredError("a compiled graph: the compiler decides what is saved")
    if "nvidia-smi" in row.get("metric", "").lower() or "nvml" in row.get("metric", "").lower():
        raise NotScoredError("the driver's figure, with an unknown context")
    if not re.search(r"(?:seq\w*|length|tokens|packed|prompt)\D{0,12}\d", setting):
        raise NotScoredError("lengths are not printed")


def _is_litgpt_tune(row: Row) -> bool:
    return "litgpt" in row["source"].lower().replace("-", "") and "finetune" in row["task"]


def _is_generate(row: Row) -> bool:
    words = row["source"].lower().replace("-", "")
    return row["task"].startswith("inference") and ("litgpt" in words or "huggingface/transformers" in row["source"])


_RULES: tuple[tuple[Callable[[Row], bool], Callable[[Row, Mapping[str, Mapping[str, Any]]], dict[str, Any]]], ...] = (
    (_is_litgpt_tune, _litgpt_tune),
    (_is_generate, _generate),
    (lambda row: "torchtune" in row["source"].lower() and "finetune" in row["task"], _torchtune),
    (lambda row: "1910.02054" in row["source"], _zero),
    (lambda row: "deepspeed" in row["source"].lower() and row["kind"] == "formula", _deepspeed),
    (lambda row: ("kv" in row["task"].lower() and "cache" in row["task"]) or row["task"].startswith("weights+kv"), _kv),
)  # fmt: skip
