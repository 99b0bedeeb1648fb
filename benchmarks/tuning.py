"""Tuning A to a text it never saw under caps on the peak: the planner's choice against peft's adapters and AdamW with full recomputation.

`python -m benchmarks.tuning [--minutes N] [--tokens N]` does as many rows as there is time for and goes on where it stopped (`benchmarks.contest`). What is not packed has
32 bits; adapters of all have the same rank, beside every linear of the layers. The last windows of the text are held back. Gradients are not clipped.
"""

from __future__ import annotations

from benchmarks.contest import OTHERS, Contender, Contest, contest_on, main
from haversack import data
from haversack.describe.workload import TuneWorkload

ROWS, LENGTH, RANK = 8, 256, 16
TOKENS = 2**17
CONTENDERS = {
    "torch AdamW": {"method": "full"},
    "peft LoRA": {"method": "lora", "lora_rank": RANK},
    "peft QLoRA, nf4": {"method": "qlora", "lora_rank": RANK},
}


def contest(tokens: int) -> Contest:
    plain = {"optimizer": "torch AdamW", "recompute": False, "micro_batch": ROWS}
    return contest_on(
        data.text("foreign-prose"),
        data.reference_model("a"),
        tokens=tokens,
        name="tuning",
        init="trained",
        rates=(1e-4, 3e-4, 1e-3, 3e-3),
        workload=TuneWorkload(ROWS, LENGTH, precision="fp32", method="full", lora_rank=RANK),
        others=[Contender(name, OTHERS, {**plain, **settings}) for name, settings in CONTENDERS.items()],
        yardstick="torch AdamW",
        caps=(1.1, 0.5, 0.35),
    )


if __name__ == "__main__":
    main(contest, TOKENS)
