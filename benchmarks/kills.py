"""Killed at random moments, also while a checkpoint is written, and resumed: is the end that of the unbroken run, bit for bit?

`python -m benchmarks.kills [NUMBER]`: kills (SIGKILL) in runs of a model of 0.1M parameters under each of four settings in turn.
Every second kill waits until a checkpoint is being written and comes 0 to 6 ms later; the others come at a moment drawn evenly from the first quarter of a
run's time. A process is forked from one that has imported the libraries, so that it begins in a tenth of a second. A finished run is compared with the unbroken
one: the last checkpoint (weights, 32-bit copies, optimizer states, random state), the exported weights, every step's loss.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.finished_rows import FinishedRows
from benchmarks.results_file import write_results
from haversack import data
from haversack.describe.machine import detect
from haversack.describe.model import describe_model
from haversack.describe.training_settings import TrainingSettings
from haversack.describe.workload import TuneWorkload
from haversack.formats.checkpoints import saved_steps
from haversack.jobs.training_log import read_log
from haversack.jobs.tune import TrainingRequest, run_training

FOLDER = Path("build/kills")
STEPS = 40
MOST_SECONDS_INTO_A_SAVE = 0.006

MOST_OF_A_RUN = 0.25
"""A kill comes within this share of the unbroken run's time, so that a run is killed several times on its way."""

SETTINGS: dict[str, dict[str, Any]] = {
    "full, 32-bit copies": {"precision": "master", "method": "full", "optimizer": "adamw"},
    "full, 8-bit states, recomputed": {
        "precision": "master", "method": "full", "optimizer": "adamw8bit", "recompute": "full",
    },
    "full, 32 bits, muon": {"precision": "fp32", "method": "full", "optimizer": "muon"},
    "adapters on a packed base": {"precision": "master", "method": "qlora", "optimizer": "adamw", "lora_rank": 4},
}  # fmt: skip


def tiny_model(folder: Path) -> Path:
    """A Llama shape with dropout, so that the random state counts, and model A's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                             vocab_size=4096, max_position_embeddings=64, attention_dropout=0.1)  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(data.reference_model("a") / name, folder / name)
    return folder


def request_of(model: Path, text: Path, output: Path, name: str, seed: int) -> TrainingRequest:
    workload = TuneWorkload(2, 32, accumulation_steps=2, **SETTINGS[name])
    return TrainingRequest(
        model=describe_model(model),
        tokenizer_source=model,
        files=(text,),
        output=output,
        machine=detect(),
        workload=workload,
        pinned=frozenset({*SETTINGS[name], "accumulation_steps", "recompute"}),
        settings=TrainingSettings(rows_per_step=4, steps=STEPS, save_every=2, learning_rate=1e-3, seed=seed),
        budget_bytes=2**30,
        seq_len=32,
    )


def in_process(request: TrainingRequest) -> int:
    """A forked process that runs or goes on with a run; its id."""
    child = os.fork()
    if child:
        return child
    try:
        run_training(request)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def kill_once(request: TrainingRequest, draw: random.Random, *, saving: bool, seconds: float) -> dict[str, Any] | None:
    """Start, kill, and say when it came; None where the run was finished before."""
    folder = request.output / "checkpoints"
    child = in_process(request)
    started = time.monotonic()
    moment = draw.uniform(0.0, seconds)
    into = draw.uniform(0.0, MOST_SECONDS_INTO_A_SAVE)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the run failed by itself with status {status}")
            return None
        if time.monotonic() - started >= moment and (not saving or _being_written(folder)):
            break
        time.sleep(0.0002)
    if saving:
        time.sleep(into)
    written = _being_written(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {
        "seconds_after_start": round(time.monotonic() - started, 3),
        "aimed_at_a_save": saving,
        "left_half_written": written and _being_written(folder),
        "newest_step": (saved_steps(folder) or [0])[-1],
    }


def _being_written(folder: Path) -> bool:
    return folder.is_dir() and any(name.endswith(".partial") for name in os.listdir(folder))  # noqa: PTH208


def compare(whole: Path, broken: Path) -> dict[str, bool]:
    """What is the same, bit for bit."""
    last = f"checkpoints/step-{STEPS:08d}/state.safetensors"
    exported = next(p for p in ("model/model.safetensors", "adapter/adapter_model.safetensors") if (whole / p).exists())
    losses = [{r["step"]: r["loss"] for r in read_log(f / "metrics.jsonl") if "loss" in r} for f in (whole, broken)]
    return {
        "checkpoint": (whole / last).read_bytes() == (broken / last).read_bytes(),
        "exported": (whole / exported).read_bytes() == (broken / exported).read_bytes(),
        "losses": losses[0] == losses[1] and len(losses[0]) == STEPS,
    }


def runs(wanted: int, finished: FinishedRows) -> Iterator[dict[str, Any]]:
    """Runs until there were `wanted` kills; each with its kills and its comparison."""
    model = tiny_model(FOLDER / "model")
    text = FOLDER / "text.txt"
    text.write_text(data.text("foreign-prose")[:20_000])
    shutil.rmtree(FOLDER / "warm", ignore_errors=True)
    run_training(request_of(model, text, FOLDER / "warm", next(iter(SETTINGS)), 0))  # imports what a run imports
    count = number = 0
    while count < wanted:
        name = list(SETTINGS)[number % len(SETTINGS)]
        key = {"run": number, "setting": name, "fields": SETTINGS[name], "steps": STEPS, "torch": torch.__version__}
        row = finished.get(key, lambda name=name, number=number: one_run(model, text, name, number))
        count += len(row["kills"])
        number += 1
        print(f"{name}: {len(row['kills'])} kills ({count} in all), {row['same']}", flush=True)
        yield row


def one_run(model: Path, text: Path, name: str, number: int) -> dict[str, Any]:
    """One unbroken run, and one that is killed until it gets to its end between two kills."""
    draw = random.Random(number)
    whole, broken = FOLDER / f"whole-{number}", FOLDER / f"broken-{number}"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    child = in_process(request_of(model, text, whole, name, number))
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the unbroken run failed")
    seconds = time.monotonic() - started
    kills = []
    request = request_of(model, text, broken, name, number)
    while (kill := kill_once(request, draw, saving=len(kills) % 2 == 1, seconds=MOST_OF_A_RUN * seconds)) is not None:
        kills.append(kill)
    result = {"setting": name, "seconds_unbroken": round(seconds, 1), "kills": kills, "same": compare(whole, broken)}
    shutil.rmtree(whole)
    shutil.rmtree(broken)
    return result


def main(wanted: int = 50) -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = list(runs(wanted, FinishedRows("kills")))
    kills = [kill for row in rows for kill in row["kills"]]
    figures = {
        "num_kills": len(kills),
        "aimed_at_a_save": sum(kill["aimed_at_a_save"] for kill in kills),
        "left_half_written": sum(kill["left_half_written"] for kill in kills),
        "num_runs": len(rows),
        "bit_equal_runs": sum(all(row["same"].values()) for row in rows),
        "runs": rows,
    }
    notes = (
        "A kill is SIGKILL. Processes are forked from one that has imported the libraries; one thread each.",
        "left_half_written counts kills that left a checkpoint unfinished on disk.",
    )
    path = write_results("kills", figures, notes)
    print(json.dumps({k: v for k, v in figures.items() if k != "runs"}), path)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
