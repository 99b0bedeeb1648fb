"""Mutated configs, plans, machine files, safetensors headers, indexes, packed folders and generation configs by the
thousand: only HaversackError may leave.

`make fuzz`, or `python -m tests.cli.fuzz [CASES] [SEED]`, runs as many cases as asked, prints each surprise, and keeps what
surprised in `tests/cli/corpus/`, which the tests replay for ever. A subset of fresh cases runs in the tests too.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.describe.families import FAMILIES

from haversack.describe.checkpoint import Checkpoint
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.errors import HaversackError
from haversack.formats.packed_folder import PackedFolder, PackedFolderWriter, PackedSite
from haversack.ledger import StoredTensor
from haversack.plan.make import Question, make_plan
from haversack.plan.schema import Plan

CORPUS = Path(__file__).parent / "corpus"

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "\u0000",
    "full_attention", [], [1], [[]], {}, {"part": "integer"}, {"part": "integer", "bits": 5}, {"x": 1},
)  # fmt: skip

MACHINE = {"name": "m", "cores": 2, "memory_bytes": 2**33, "available_bytes": 2**32}
FAMILY_NAMES = ("llama", "gemma3_text", "gpt2", "phi3", "mixtral", "qwen2")


class Fuzzer:
    """Each case makes one mutant, changed at one to three places, and opens it. A mutant is JSON, so that it can be kept."""

    KINDS = ("header", "file", "plan", "machine", "config", "workload", "index", "packed", "generation")

    def __init__(self, folder: Path):
        self.folder = folder
        self.machine = Machine.from_dict(MACHINE)
        model = describe_model(FAMILIES["llama"])
        question = Question(model, ServeWorkload(12, 4), self.machine, 2**20, "tensor")
        self.plan = json.loads(make_plan(question).plan.to_json())
        self.header: dict[str, Any] = {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            "__metadata__": {"format": "pt"},
        }
        self.packed = self._pack()
        self.whole = [json.loads((self.packed / name).read_text()) for name in ("haversack.json", "config.json")]

    def run(self, seed: int) -> tuple[str, dict[str, Any]] | None:
        """One case; None, or what went wrong and the mutant."""
        rng = random.Random(seed)
        kind = self.KINDS[seed % len(self.KINDS)]
        mutant = getattr(self, f"make_{kind}")(rng)
        problem = self.problem(kind, mutant)
        return None if problem is None else (f"{kind}, seed {seed}: {problem}", {"kind": kind, "mutant": mutant})

    def problem(self, kind: str, mutant: Any) -> str | None:
        """Open a mutant; None, or what left beside our own errors."""
        try:
            getattr(self, f"open_{kind}")(mutant)
        except HaversackError as error:
            if "\n" in str(error) or not str(error).strip():
                return f"not one sentence: {str(error)[:300]!r}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        return None

    # Safetensors: a header that is another, and bytes that are others

    def make_header(self, rng: random.Random) -> dict[str, Any]:
        return {"header": mutated(self.header, rng), "data_bytes": rng.choice((32, 32, 32, 31, 40))}

    def open_header(self, mutant: dict[str, Any]) -> None:
        text = json.dumps(mutant["header"]).encode()
        self._open(len(text).to_bytes(8, "little") + text + bytes(mutant["data_bytes"]))

    def make_file(self, rng: random.Random) -> str:
        text = json.dumps(self.header).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + bytes(32))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))]).hex()

    def open_file(self, mutant: str) -> None:
        self._open(bytes.fromhex(mutant))

    def _open(self, data: bytes) -> None:
        file = self.folder / "model.safetensors"
        file.write_bytes(data)
        _read_all(Checkpoint.open(file))

    def make_index(self, rng: random.Random) -> dict[str, Any]:
        index = {"metadata": {"total_size": 64}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
        names = ("two.safetensors", "../model.safetensors", "/etc/passwd", "", "model.safetensors.index.json", ".")
        mutant = mutated(index, rng)
        if isinstance(mutant.get("weight_map"), dict) and rng.random() < 0.5:
            mutant["weight_map"][rng.choice(("a", "b", "c"))] = rng.choice(names)
        return mutant

    def open_index(self, mutant: dict[str, Any]) -> None:
        folder = self.folder / "sharded"
        folder.mkdir(exist_ok=True)
        text = json.dumps(self.header).encode()
        (folder / "one.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
        (folder / "model.safetensors.index.json").write_text(json.dumps(mutant))
        _read_all(Checkpoint.open(folder))

    # Plans, machines, configs, workloads

    def make_plan(self, rng: random.Random) -> dict[str, Any]:
        """Half of the mutants are sealed again, as a forger would."""
        data = mutated(self.plan, rng)
        if rng.random() < 0.5:
            data["prediction_hash"] = Plan.model_validate_json(json.dumps(data)).computed_hash() if valid(data) else ""
        return data

    def open_plan(self, mutant: dict[str, Any]) -> None:
        Plan.from_json(json.dumps(mutant)).ledger.peak()

    def make_machine(self, rng: random.Random) -> dict[str, Any]:
        return mutated(self.machine.to_dict(), rng)

    def open_machine(self, mutant: dict[str, Any]) -> None:
        machine = Machine.from_dict(mutant)
        machine.read_rate()
        machine.matmul_rate("bf16")
        machine.tiers()

    def make_config(self, rng: random.Random) -> dict[str, Any]:
        return mutated(dict(FAMILIES[rng.choice(FAMILY_NAMES)]), rng, depth=1)

    def open_config(self, mutant: dict[str, Any]) -> None:
        describe_model(mutant)

    def make_workload(self, rng: random.Random) -> dict[str, Any]:
        return mutated(ServeWorkload(12, 4).to_dict(), rng)

    def open_workload(self, mutant: dict[str, Any]) -> None:
        ServeWorkload.from_dict(mutant)

    # A packed folder whose manifest, or config, was edited; half sealed again

    def _pack(self) -> Path:
        source = self.folder / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(FAMILIES["llama"]))
        stored = (StoredTensor("codes", "U8", (4, 8)), StoredTensor("scales", "F16", (4, 1)))
        site = PackedSite({"grid": {"part": "integer", "bits": 4}}, stored)
        rest = [StoredTensor("model.norm.weight", "F32", (8,))]
        writer = PackedFolderWriter(
            self.folder / "packed", source, plan_text="{}", sites={"s": site}, rest=rest, layouts={"rows-v1": 1}
        )
        with writer:
            tensors = {"codes": torch.zeros(4, 8, dtype=torch.uint8), "scales": torch.zeros(4, 1, dtype=torch.float16)}
            writer.write_site("s", tensors)
            writer.write_rest("model.norm.weight", torch.zeros(8))
            return writer.finish().path

    def make_packed(self, rng: random.Random) -> dict[str, Any]:
        manifest, config = self.whole
        if rng.random() < 0.8:
            manifest = mutated(manifest, rng)
        else:
            config = mutated(config, rng)
        return {"manifest": manifest, "config": config, "sealed": rng.random() < 0.8}

    def open_packed(self, mutant: dict[str, Any]) -> None:
        text, config = json.dumps(mutant["manifest"]), mutant["config"]
        if mutant["sealed"] and isinstance(config.get("quantization_config"), dict):
            config["quantization_config"]["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (self.packed / "haversack.json").write_text(text)
        (self.packed / "config.json").write_text(json.dumps(config))
        folder = PackedFolder.open(self.packed)
        folder.require_layouts({"rows-v1": 1})
        folder.verify()

    def make_generation(self, rng: random.Random) -> dict[str, Any]:
        settings = {
            "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": 0.1,
            "no_repeat_ngram_size": 3, "eos_token_id": [1, 2], "stop_strings": ["x"], "typical_p": 0.5,
        }  # fmt: skip
        return mutated(settings, rng, depth=1)

    def open_generation(self, mutant: dict[str, Any]) -> None:
        from haversack.engine.sampling import Sampler, end_strings, end_tokens, read_generation_config

        folder = self.folder / "generation"
        folder.mkdir(exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps(mutant))
        config = read_generation_config(folder)
        token = Sampler(config).choose(torch.randn(9), [1, 2, 3, 4])
        assert 0 <= token < 9
        assert all(isinstance(end, int) for end in end_tokens(config, SimpleNamespace(eos_token_id=None)))
        assert all(isinstance(end, str) for end in end_strings(config))


def _read_all(checkpoint: Checkpoint) -> None:
    checkpoint.fingerprint()
    for name in checkpoint.tensors:
        checkpoint.read(name)


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
    surprises = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for seed in range(first, first + cases):
            if (found := fuzzer.run(seed)) is None:
                continue
            surprises += 1
            text, case = found
            print(text)
            CORPUS.mkdir(exist_ok=True)
            (CORPUS / f"{case['kind']}-{seed}.json").write_text(json.dumps(case, indent=1) + "\n")
    print(f"{cases} cases, {surprises} surprises")
    return 1 if surprises else 0


if __name__ == "__main__":
    raise SystemExit(main())
