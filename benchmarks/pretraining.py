"""Pre-training B's shape under caps on the peak: the planner's choice against other tools' optimizers with full recomputation.

`python -m benchmarks.pretraining [--minutes N] [--tokens N]` does as many rows as there is time for and goes on where it stopped (`benchmarks.contest`). Weights
are random, in 32 bits; the text is the calibration text, of which the last windows are held back. Gradients are not clipped.
"""

from __future__ import annotations

from benchmarks.contest import OTHERS, Contender, Contest, contest_on, main
from haversack import data
from haversack.describe.workload import TrainWorkload

ROWS, LENGTH = 8, 256
TOKENS = 2**19
OPTIMIZERS = (
    "torch AdamW", "bitsandbytes 8-bit AdamW", "torchao 8-bit AdamW", "torchao 4-bit AdamW", "galore-torch", "apollo-torch",
)  # fmt: skip


def contest(tokens: int) -> Contest:
    plain = {"method": "full", "recompute": False, "micro_batch": ROWS}
    return contest_on(
        data.text("calibration"),
        data.reference_model("b"),
        tokens=tokens,
        name="pretraining",
        init="random",
        rates=(1e-3, 3e-3, 1e-2),
        workload=TrainWorkload(ROWS, LENGTH, precision="fp32"),
        others=[Contender(name, OTHERS, {**plain, "optimizer": name}) for name in OPTIMIZERS],
        yardstick="torch AdamW",
        caps=(1.1, 0.8, 0.7),
    )


if __name__ == "__main__":
    main(contest, TOKENS)
