"""Pre-training B's shape under caps on the peak: the planner's choice against other tools' optimizers with full recomputation.

`python -m benchmarks.pretraining [--minutes N] [--tokens N]` does as many rows as there is time for and goes on where it stopped (`benchmarks.contest`). Weights
are random, in 32 bits; the text is the calibration text, of which the last windows are held back. Gradients are not clipped.
"""

from __future__ import annotations

import argparse

import numpy as np
from transformers import AutoTokenizer

from benchmarks.contest import OTHERS, Contender, Contest, run
from haversack import data
from haversack.describe.workload import TrainWorkload

ROWS, LENGTH = 8, 256
TOKENS = 2**19
OPTIMIZERS = (
    "torch AdamW", "bitsandbytes 8-bit AdamW", "torchao 8-bit AdamW", "torchao 4-bit AdamW", "galore-torch", "apollo-torch",
)  # fmt: skip


def main(minutes: float, tokens: int) -> None:
    folder = data.reference_model("b")
    ids = AutoTokenizer.from_pretrained(folder)(data.text("calibration"))["input_ids"]
    plain = {"method": "full", "recompute": False, "micro_batch": ROWS}
    contest = Contest(
        name="pretraining",
        model=folder,
        init="random",
        tokens=np.array(ids),
        steps=tokens // (ROWS * LENGTH),
        rates=(1e-3, 3e-3, 1e-2),
        workload=TrainWorkload(ROWS, LENGTH, precision="fp32"),
        others=[Contender(name, OTHERS, {**plain, "optimizer": name}) for name in OPTIMIZERS],
        yardstick="torch AdamW",
        caps=(1.1, 0.8, 0.7),
    )
    run(contest, minutes, [f"Every row trains on {tokens:,} tokens, {ROWS} x {LENGTH} per step."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    given = parser.parse_args()
    main(given.minutes, given.tokens)
