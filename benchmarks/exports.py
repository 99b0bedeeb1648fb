"""Other tools' formats, both ways: logits of what is exported, and of what llama.cpp made, against the matrices they stand for.

Models A and B, everything inside the layers at one option, by nearest rounding (what is compared are values, so that calibration would
change nothing), tokens of foreign prose. The reference is transformers in float32 with the very matrices that the packed folder
stands for. llama.cpp rounds the inputs of low-bit products to 8 bits, so that its logits differ where the file holds the same values;
what it does with a file in 16 bits stands beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.peer import run_peer
from benchmarks.results_file import write_results
from haversack import data
from haversack.cost.calibrated import token_ids_of
from haversack.cost.damage import NONE
from haversack.describe.machine import Machine
from haversack.describe.model import Model, describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine.whole import load_whole
from haversack.jobs.export import export, open_for_export
from haversack.jobs.pack import pack
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question

SEQUENCES, TOKENS = 4, 256
GRIDS = {
    "as is": None,
    "8-bit integers": IntegerGrid(8, 64),
    "4-bit integers": IntegerGrid(4, 64),
    "4-bit integers with zero points": IntegerGrid(4, 64, symmetric=False),
    "normal tables of 3 bits": CodebookGrid("max3", 32, "u4"),
}
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""What ggml makes of every matrix, to be read back."""


@dataclass(frozen=True)
class Row:
    """How far one program's logits are from the reference's, over all tokens; KL in nats per token."""

    model: str
    what: str
    program: str
    file_bytes: int
    largest_difference: float
    largest_logit: float
    kl: float
    num_changed: int = 0


def main() -> None:
    rows = [row for name in ("a", "b") for row in measure(name)]
    tables = [
        {
            "title": f"Model {name.upper()}",
            "columns": ["file", "program", "bytes", "largest difference of a logit", "KL, nats per token"],
            "rows": [
                [
                    r.what,
                    r.program,
                    f"{r.file_bytes:,}",
                    f"{r.largest_difference:.2g} of {r.largest_logit:.3g}",
                    f"{r.kl:.2g}",
                ]
                for r in rows
                if r.model == name
            ],
        }
        for name in ("a", "b")
    ]
    path = write_results("exports", [asdict(row) for row in rows], tables=tables)
    print(path)


def measure(name: str) -> Iterator[Row]:
    """Every option exported, and every type that llama.cpp makes read back."""
    described = describe_model(data.reference_model(name))  # type: ignore[arg-type]
    ids = token_ids_of(described, data.text("foreign-prose"))[: SEQUENCES * TOKENS]
    rows = torch.tensor(ids).view(SEQUENCES, TOKENS)
    with TemporaryDirectory(prefix="haversack-exports-") as folder:
        work = Path(folder)
        (work / "ids.json").write_text(json.dumps(rows.tolist()))
        for what, grid in GRIDS.items():
            slug = what.replace(" ", "-")
            packed = pack_alike(described, grid, work / slug)
            reference = stood_for(described, packed, rows)
            done = export(packed, work / f"{slug}.gguf", "gguf")
            changed = sum("rounded" in change.now for change in done.changes)
            yield _row(
                name, what, "GGUF in llama.cpp", done.num_bytes, reference, llama(work / f"{slug}.gguf", work), changed
            )
            done = export(packed, work / f"{slug}-ct", "compressed-tensors")
            changed = sum("the same" not in change.now for change in done.changes)
            found = plain_transformers(work / f"{slug}-ct", rows)
            yield _row(name, what, "compressed-tensors in transformers", done.num_bytes, reference, found, changed)
        for kind in TYPES:
            yield read_back(name, kind, work, rows)


def read_back(name: str, kind: str, work: Path, rows: torch.Tensor) -> Row:
    """A file of ggml's own making: llama.cpp's logits against those of the matrices that are read from it."""
    made = work / f"made-{kind}.gguf"
    request = {"task": "quantize", "file": str(work / "as-is.gguf"), "out": str(made), "type": kind}
    (answer,) = run_peer("xllamacpp", [request])
    reference = logits_of(load_whole(describe_model(made), dtype=torch.float32), rows)
    return _row(name, f"ggml's {kind}", "GGUF in llama.cpp", answer["file_bytes"], reference, llama(made, work))


def pack_alike(model: Model, grid: Any, folder: Path) -> Path:
    """Everything inside the layers on one grid, the rest as it is."""
    inside = WeightOption() if grid is None else WeightOption(grid=grid, rounding=NearestRounding())
    question = Question(
        model=model,
        workload=ServeWorkload(64, 16),
        machine=Machine("benchmark", 2, 2**36, 2**36),
        budget_bytes=2**36,
        budget_kind="tensor",
        weight_damages={s.id: {inside if s.layer is not None else WeightOption(): NONE} for s in model.weights},
        kv_damages={site.id: {KVOption(): NONE} for site in model.attention},
    )
    pack(model, make_plan(question).require_fit(), folder)
    return folder


@torch.no_grad()
def stood_for(model: Model, packed: Path, rows: torch.Tensor) -> torch.Tensor:
    """Logits of transformers in float32 with the matrices that a packed folder stands for."""
    dense, opened = load_whole(model, dtype=torch.float32), open_for_export(packed)
    for site in opened.model.weights:
        dense.get_submodule(site.module).weight.copy_(opened.matrix(site))
    return logits_of(dense, rows)


def plain_transformers(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rows)


@torch.no_grad()
def logits_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None]).logits for row in rows])


def llama(file: Path, work: Path) -> torch.Tensor:
    request = {"task": "logits", "file": str(file), "ids": str(work / "ids.json"), "out": str(file), "num_threads": 2}
    (answer,) = run_peer("xllamacpp", [request])
    return load_file(answer["logits"])["logits"]


def _row(
    model: str, what: str, program: str, num_bytes: int, reference: torch.Tensor, found: torch.Tensor, changed: int = 0
) -> Row:
    log_p, log_q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    row = Row(
        model,
        what,
        program,
        num_bytes,
        float((reference - found).abs().max()),
        float(reference.abs().max()),
        kl,
        changed,
    )
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
