"""Log-likelihoods of all answers before a model is tuned, made once and kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from haversack.describe.checkpoint import Checkpoint
from haversack.engine.pairs import Pairs
from haversack.engine.training_step import TrainingStep
from haversack.formats.safetensors_file import write_tensors
from haversack.jobs.ranks import ALONE, Ranks
from haversack.samples.packing import PackedRows

NAME = "log_likelihoods"


def reference_answers(
    folder: Path,
    step: TrainingStep,
    rows: PackedRows,
    fingerprints: Mapping[str, str],
    ranks: Ranks = ALONE,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> torch.Tensor:
    """Nats of each answer under the model as it is now, float32 `(answers,)` by their numbers in the data: read from the
    folder if they are of this model and data, else made in micro-batches and written. `step` may not have been trained yet.

    Takes one forward pass over the data, without what a backward pass needs: its peak lies below a step's. Raises OutputError.
    """
    num_answers = 2 * rows.store.num_samples
    asked = [fingerprints["model"], fingerprints["data"], step.workload.seq_len, getattr(step.workload, "method", "")]
    of = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    home = folder / f"reference-{of}"
    if not ranks.any(not (home / "reference.safetensors").is_file()):
        return Checkpoint.open(home).read(NAME)
    answers = torch.zeros(num_answers)
    step.model.eval()
    at_once = step.workload.batch_size
    for start in range(0, len(rows), at_once * ranks.size):
        mine = range(start, min(start + at_once * ranks.size, len(rows)))[ranks.rank :: ranks.size]
        batch = rows.rows(mine or range(1))  # a rank without a row computes with the others
        assert batch.positions is not None and batch.sequences is not None and batch.samples is not None
        pairs = Pairs(torch.from_numpy(batch.sequences), batch.num_averaged)
        given = [torch.from_numpy(values) for values in (batch.ids, batch.labels, batch.positions)]
        with torch.no_grad():
            found = step.log_likelihoods(given[0], given[1], given[2], pairs)
        if mine:
            answers[torch.from_numpy(batch.samples)] = found.flatten()
        progress("the model's own answers", start, len(rows))
    step.model.train()
    answers = torch.tensor(ranks.sums(answers.tolist())) if ranks.are_several else answers
    if ranks.is_first:
        _write(home, answers)
    ranks.wait()
    return answers


def _write(home: Path, answers: torch.Tensor) -> None:
    home.mkdir(parents=True, exist_ok=True)
    partial = home / "reference.partial"
    write_tensors(partial, {NAME: answers})
    partial.rename(home / "reference.safetensors")
