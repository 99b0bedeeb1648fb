"""Published rows read from their own words: settings where they are printed, a reason by name where they are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.published_words import NotScoredError, count_of_tokens, number_of_bytes, read_setting

MODELS = {name: {} for name in ("phi-1_5", "llama-2-7b", "llama-2-70b", "llama-3_1-8b", "stablelm-alpha-3b")}


def row(**words: str) -> dict[str, str]:
    empty = dict.fromkeys(
        ("kind", "task", "model", "setting", "metric", "value", "unit", "hardware", "source", "note"), ""
    )
    return {**empty, "kind": "measured", **words}


LITGPT = {"source": "Lightning-AI/litgpt@0 tutorials/resource-tables.md", "unit": "GB(1e9)", "hardware": "1x A100-40GB"}
TABLE = "longest sample 1304 tok (phi 1044, StableLM 1034); bf16-true"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            {**LITGPT, "task": "lora-finetune", "model": "phi-1.5 1.3B", "value": "3.78", "setting": f"base quant bnb.nf4; micro-batch 1; {TABLE}"},
            {"kind": "torch", "run": "tune", "model": "phi-1_5", "batch": 1, "tokens": 1044, "format": "nf4", "value": 3.78e9},
        ),
        (
            {**LITGPT, "task": "lora-finetune", "model": "Llama-2-7B", "value": "29.07", "setting": f"base quant none; micro-batch 2; {TABLE}"},
            {"run": "tune", "model": "llama-2-7b", "batch": 2, "tokens": 1304, "value": 29.07e9},
        ),
        (
            {**LITGPT, "task": "inference multi-GPU", "model": "Llama-2-70B-chat", "value": "34", "setting": "sequential layer split over 4 GPUs; quant none; 256 new tokens"},
            {"run": "generate", "model": "llama-2-70b", "stages": 4, "value": 34e9},
        ),
        (
            {"kind": "formula", "task": "train states", "model": "7.5B model", "setting": "P_os+g; K=12; Nd=64", "value": "16.6", "unit": "GB", "source": "ZeRO arXiv 1910.02054 Fig.1"},
            {"kind": "formula", "run": "zero", "parameters": 7.5e9, "ranks": 64, "stage": 2, "value": 16.6e9},
        ),
        (
            {"kind": "formula", "task": "kv-cache", "model": "Llama-3.1-8B", "setting": "fp16; 128k tokens", "value": "15.62", "unit": "GiB", "source": "a blog"},
            {"run": "kv", "model": "llama-3_1-8b", "tokens": 128_000},
        ),
    ],
)  # fmt: skip
def test_a_setting_is_read(words: dict[str, str], expected: dict[str, object]) -> None:
    found = read_setting(row(**words), MODELS)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"source": "vllm-project/vllm#1", "task": "serve", "setting": "seq 4096"}, "vLLM"),
        ({"source": "some/llama.cpp thread", "task": "inference"}, "llama.cpp"),
        ({**LITGPT, "task": "lora-finetune", "model": "Mystery-9B", "value": "9", "setting": f"base quant none; micro-batch 1; {TABLE}"}, "no config"),
        ({**LITGPT, "task": "lora-finetune", "model": "Llama-2-7B", "value": "9", "setting": TABLE}, "micro-batch or quantization"),
        ({**LITGPT, "task": "inference", "model": "phi-1.5", "value": "9", "unit": "GB as printed (unit uncertain)", "setting": "quant none"}, "the unit is unclear"),
        ({**LITGPT, "task": "inference", "model": "phi-1.5", "value": "3 vs 4", "setting": "quant none"}, "not one number"),
        ({**LITGPT, "task": "inference", "model": "phi-1.5", "value": "OOM", "setting": "quant none"}, "not one number"),
        ({"source": "meta-pytorch/torchtune", "task": "full-finetune", "setting": "batch 2; compile; seq 4096"}, "a compiled graph"),
        ({"source": "x", "task": "train", "metric": "NVML used", "setting": "seq 128"}, "the driver's figure"),
        ({"source": "x", "task": "train", "setting": "batch 2"}, "lengths are not printed"),
        ({"source": "x", "task": "dance", "setting": "seq 128"}, "no rule reads the task 'dance'"),
        ({"source": "", "task": ""}, "lengths are not printed"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_says_why(words: dict[str, str], why: str) -> None:
    found = read_setting(row(**words), MODELS)
    assert found["kind"] in ("dropped", "other") and why in found["why"]


def test_other_engines_are_told_apart_from_what_is_missing() -> None:
    assert read_setting(row(source="vllm", setting="seq 1"), MODELS)["kind"] == "other"
    assert read_setting(row(source="x", setting="seq 1"), MODELS)["kind"] == "dropped"


@pytest.mark.parametrize(
    ("value", "unit", "num_bytes", "digits"),
    [
        ("4.82", "GB(1e9)", 4.82e9, 3),
        ("15.2", "GiB", 15.2 * 2**30, 3),
        ("28,791", "MiB", 28791 * 2**20, 5),
        ("330", "GB", 330e9, 2),
        ("1474", "MB as printed = MiB", 1474 * 2**20, 4),
        ("24964497408", "bytes", 24964497408, 11),
    ],
)
def test_printed_numbers_in_their_units(value: str, unit: str, num_bytes: float, digits: int) -> None:
    assert number_of_bytes(value, unit) == (pytest.approx(num_bytes), digits)


@pytest.mark.parametrize("unit", ["tokens", "G (unit not stated)", "printed GB (mixed)", ""])
def test_unclear_units_are_refused(unit: str) -> None:
    with pytest.raises(NotScoredError, match="unit"):
        number_of_bytes("3", unit)


def test_numbers_of_tokens() -> None:
    assert count_of_tokens("fp16; batch 1; 1k / 16k / 128k tokens") == [1000, 16_000, 128_000]
    assert count_of_tokens("max context 262144 (inferred)") == [262144]
    assert count_of_tokens("fp16; 1M tokens") == [10**6]
