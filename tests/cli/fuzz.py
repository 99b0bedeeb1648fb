"""Mutated configs, plan files, machine files and safetensors headers by the thousand: only HaversackError may leave.

`python -m tests.cli.fuzz [CASES] [SEED]` runs as many cases as asked and prints each surprise with the seed that makes it
again; a subset runs in the tests.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.describe.families import FAMILIES

from haversack.describe.checkpoint import Checkpoint
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.errors import HaversackError
from haversack.plan.make import Question, make_plan
from haversack.plan.schema import Plan

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "\u0000",
    "full_attention", [], [1], [[]], {}, {"part": "integer"}, {"part": "integer", "bits": 5}, {"x": 1},
)  # fmt: skip

MACHINE = {"name": "m", "cores": 2, "memory_bytes": 2**33, "available_bytes": 2**32}
FAMILY_NAMES = ("llama", "gemma3_text", "gpt2", "phi3", "mixtral", "qwen2")


class Fuzzer:
    """Each case mutates one thing, at one to three places, and opens it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.machine = Machine.from_dict(MACHINE)
        model = describe_model(FAMILIES["llama"])
        question = Question(model, ServeWorkload(12, 4), self.machine, 2**20, "tensor")
        self.plan = json.loads(make_plan(question).plan.to_json())
        header = {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            "__metadata__": {"format": "pt"},
        }
        self.header: dict[str, Any] = header
        self.kinds: tuple[Callable[[random.Random], None], ...] = (
            self.open_header, self.open_bytes, self.read_plan, self.read_machine, self.describe_config, self.plan_workload,
        )  # fmt: skip

    def run(self, seed: int) -> str | None:
        """One case; None, or what went wrong."""
        rng = random.Random(seed)
        kind = self.kinds[seed % len(self.kinds)]
        try:
            kind(rng)
        except HaversackError as error:
            if "\n" in str(error) or not str(error).strip():
                return f"{kind.__name__}, seed {seed}: not one sentence: {str(error)[:300]!r}"
        except Exception as error:
            return f"{kind.__name__}, seed {seed}: {type(error).__name__}: {str(error)[:300]}"
        return None

    def open_header(self, rng: random.Random) -> None:
        text = json.dumps(mutated(self.header, rng)).encode()
        self._open(len(text).to_bytes(8, "little") + text + bytes(rng.choice((32, 32, 32, 31, 40))))

    def open_bytes(self, rng: random.Random) -> None:
        text = json.dumps(self.header).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + bytes(32))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        self._open(bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))]))

    def _open(self, data: bytes) -> None:
        file = self.folder / "model.safetensors"
        file.write_bytes(data)
        checkpoint = Checkpoint.open(file)
        checkpoint.fingerprint()
        for name in checkpoint.tensors:
            checkpoint.read(name)

    def read_plan(self, rng: random.Random) -> None:
        """Half of the mutants are sealed again, as a forger would."""
        data = mutated(self.plan, rng)
        if rng.random() < 0.5:
            data["prediction_hash"] = Plan.model_validate_json(json.dumps(data)).computed_hash() if valid(data) else ""
        plan = Plan.from_json(json.dumps(data))
        plan.ledger.peak()

    def read_machine(self, rng: random.Random) -> None:
        fresh = json.loads(json.dumps(self.machine.to_dict()))
        machine = Machine.from_dict(mutated(fresh, rng))
        machine.read_rate()
        machine.matmul_rate("bf16")
        machine.tiers()

    def describe_config(self, rng: random.Random) -> None:
        describe_model(mutated(dict(FAMILIES[rng.choice(FAMILY_NAMES)]), rng, depth=1))

    def plan_workload(self, rng: random.Random) -> None:
        data = mutated(ServeWorkload(12, 4).to_dict(), rng)
        ServeWorkload.from_dict(data)


def valid(data: dict[str, Any]) -> bool:
    """Whether a mutant passes the schema, so that its hash can be forged."""
    try:
        Plan.model_validate_json(json.dumps(data))
    except ValueError:
        return False
    return True


def mutated(data: Any, rng: random.Random, depth: int = 6) -> Any:
    """A deep copy with one to three values replaced, removed, or moved."""
    copy = json.loads(json.dumps(data))
    for _ in range(rng.randint(1, 3)):
        at = copy
        for _ in range(rng.randint(1, depth)):
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7 and depth > 1:
                at = at[key]
                continue
            what = rng.random()
            if what < 0.65:
                at[key] = rng.choice(VALUES)
            elif what < 0.85:
                del at[key]
            else:
                at[key] = json.loads(json.dumps(at[rng.choice(keys)]))
            break
    return copy


def main() -> int:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        surprises = [text for seed in range(first, first + cases) if (text := fuzzer.run(seed))]
    print("\n".join(surprises[:50]))
    print(f"{cases} cases, {len(surprises)} surprises")
    return 1 if surprises else 0


if __name__ == "__main__":
    raise SystemExit(main())
