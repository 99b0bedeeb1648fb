"""Runs under torchrun: two processes give the losses of one, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import haversack
from haversack.data import reference_model, text
from haversack.engine.shards import check_sharded_optimizer
from haversack.errors import UsageError

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
STEPS = 12
RANKS = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


def started(folder: Path, output: str, *, ranks: bool, more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`haversack train` in a process of its own, or under torchrun in two."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "prose.txt").write_text(text("foreign-prose")[:20000])
    asked = ["train", "config.json", "--data", "prose.txt", "--budget", "2GiB", "--batch", "4", "--seq-len", "32"]
    asked += ["--steps", str(STEPS), "--save-every", "2", "--lr", "1e-2", "--holdout", "0.05", "--evaluate-every", "6"]
    asked += ["--with", "precision=fp32", "--tokenizer", str(reference_model("a")), "-o", output, *more]
    root = Path(haversack.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(RANKS if ranks else []), "-m", "haversack", *asked]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-2000:]
    return output


def figures(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], name): row[name] for row in rows for name in ("loss", "eval_loss", "grad_norm") if name in row
    }


@pytest.mark.long
def test_two_processes_give_the_losses_of_one_and_one_goes_on_from_two(tmp_path: Path) -> None:
    finished(started(tmp_path, "one", ranks=False))
    shown = finished(started(tmp_path, "two", ranks=True))
    assert "process peak of rank 1 (private)" in shown
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert one.keys() == two.keys() and two == pytest.approx(one, rel=2e-4)  # sums in another order
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    for owner in ("weights", "optimizer states"):  # rows are cut evenly here, but for one vector's
        pair = result["resident_bytes"][owner]
        assert pair["predicted"] == pytest.approx(pair["measured"], rel=0.02)
    exported = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert exported[0].keys() == exported[1].keys()
    for name, tensor in exported[0].items():
        assert torch.allclose(tensor, exported[1][name], atol=2e-3), name
    process = started(tmp_path, "broken", ranks=True)
    checkpoints = tmp_path / "broken" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-????????")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for running in [process, *psutil.Process(process.pid).children(recursive=True)]:
        running.kill()
    process.communicate()
    assert not (tmp_path / "broken" / "result.json").exists()
    saved = sorted(path for path in checkpoints.glob("step-????????"))
    assert saved and (saved[-1] / "state-00001-of-00002.safetensors").is_file() and not list(saved[-1].glob("*.pt"))
    finished(started(tmp_path, "broken", ranks=False))
    assert figures(tmp_path / "broken") == pytest.approx(one, rel=2e-4)


@pytest.mark.parametrize("name", ["muon", "adafactor", "galore", "adamw8bit"])
def test_rules_over_whole_matrices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"optimizer {name} works on whole matrices"):
        check_sharded_optimizer(name)
    check_sharded_optimizer("adamw")
