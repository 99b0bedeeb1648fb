"""Weights without retraining at equal bytes: ours against other tools, KL and perplexity on foreign text, models A and B.

At every size (bits per weight, everything stored counted) each contender stands with the best of its settings that fit, or, where none
does, with its smallest larger one. *Whole* counts all tensors of the model over all parameters; *linears* the matrices inside the layers over
their own parameters, the rest staying at 16 bits. Everybody calibrates on the same text (others on
32,768 tokens of it), and one scorer runs everybody's dense weights
in float32 on the same windows: 12 of 512 tokens of prose and as many of code, which nobody's calibration saw. Intervals are paired bootstraps
over windows.

    python -m benchmarks.weights [--models a b] [--scopes whole linears] [--only CONTENDER ...] [--sizes 2.25 ...]

Finished rows are kept (`build/bench/weights.jsonl`); a changed model, script, setting or version of ours is measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peer
from benchmarks.finished_rows import FOLDER, FinishedRows, digest
from benchmarks.results_file import write_results
from benchmarks.scorer import TEXTS, Scorer, mean_by_text, paired_interval, perplexity
from haversack import data
from haversack.cost.calibrated import Calibration, calibrate_model, tokenize
from haversack.cost.damage import NONE
from haversack.cost.serving import WEIGHTS, ServingProblem
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.machine import known
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.describe.workload import ServeWorkload
from haversack.engine.retune import RetuneSettings, retune
from haversack.ledger import total_bytes
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan import make
from haversack.plan.question import Question
from haversack.plan.refine import PlanMeter
from haversack.solve.exact import solve
from haversack.solve.problem import TimePoint

SIZES = (2.25, 2.5, 3.25, 4.25, 8.25)
SCOPES = ("linears", "whole")
PEER_REQUESTS = 8
"""Packed by one process of a peer before they are scored: its imports take longer than a small model's packing."""

EVALUATIONS, SOLVE_SECONDS = 6, 20.0
OURS, NEAREST = "ours", "nearest"
OUR_RECIPES = ("gptq", "normal-tables", "normal-superblocks", "vptq", "qtip", "normal-bytes")
"""What the planner chooses from: all that pays in bytes, slow to decode or not, for bytes are what is compared here."""


INTEGER_SETTINGS = (
    (2, 128, False),
    (2, 64, True),
    (2, 64, False),
    (2, 32, False),
    (3, 128, True),
    (3, 128, False),
    (3, 32, False),
    (4, 128, False),
    (4, 64, True),
    (4, 32, False),
    (8, 128, True),
)
"""Bits, group size and symmetry of the tools that have a choice: both kinds of grid near every size."""

LEARNED_SETTINGS = ((2, 128, False), (2, 64, False), (3, 128, False), (4, 128, False))
"""The same for a tool that takes ten minutes a setting: the one that comes nearest to each size. At 8 bits there is nothing to learn."""

GGML_TYPES = (
    ("IQ1_M", "IQ3_XXS"),
    ("IQ2_XXS", "Q2_K"),
    ("IQ2_XXS", "IQ3_XXS"),
    ("IQ2_XXS", "IQ3_S"),
    ("IQ2_XS", "Q2_K"),
    ("IQ2_XS", "IQ3_S"),
    ("IQ2_S", "IQ3_XXS"),
    ("Q2_K", "IQ4_XS"),
    ("IQ3_XXS", "IQ3_S"),
    ("IQ3_XXS", "IQ4_XS"),
    ("IQ3_S", "IQ4_XS"),
    ("IQ3_S", "Q6_K"),
    ("Q3_K", "Q6_K"),
    ("IQ4_XS", "IQ3_S"),
    ("IQ4_XS", "Q6_K"),
    ("Q4_0", "Q4_0"),
    ("Q4_K", "Q6_K"),
    ("Q6_K", "Q8_0"),
    ("Q8_0", "Q6_K"),
    ("Q8_0", "Q8_0"),
    *((kind, "BF16") for kind in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q6_K", "Q8_0")),
)
"""llama.cpp's types for the linears and for the embedding and head: pairs that come near a size, the embedding finer, as its own mixtures
do; and the linears alone."""


@dataclass(frozen=True)
class Measured:
    """A contender with one setting on one model: what it stores, and what that loses."""

    contender: str
    setting: str
    bytes: Mapping[str, int]
    file_bytes: int
    kl: list[float]
    nll: list[float]
    versions: Mapping[str, str]
    seconds: float

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)


def peer_settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Contender, peer and settings: what is tuned is spelled out, the best setting stands for the contender."""
    for bits, group_size, symmetric in INTEGER_SETTINGS:
        common = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        tuned = {**common, "method": "gptq", "actorder": "static", "observer": "mse"}
        yield "llmcompressor GPTQ", "llmcompressor", tuned
    for bits, group_size, symmetric in LEARNED_SETTINGS:
        learned = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "iterations": 200, "batch_size": 8}
        yield "auto-round", "auto_round", learned
    for linears, embeddings in GGML_TYPES:
        yield "llama.cpp quants", "xllamacpp", {"linears": linears, "embeddings": embeddings}
    for form, double in (("nf4", False), ("nf4", True), ("int8", False)):
        yield "bitsandbytes", "bitsandbytes", {"format": form, "double": double}


class Bench:
    """One model: its scorer, its calibration, everybody's rows."""

    def __init__(self, folder: Path, rows: FinishedRows):
        self.folder, self.rows = folder, rows
        self.scorer = Scorer(folder)
        self.model: Model = self.scorer.described
        self.calibration: Calibration = calibrate_model(self.model, data.text("calibration"), recipes=OUR_RECIPES)
        self.ids = FOLDER / f"calibration-{self.model.fingerprint[:16]}.json"
        FOLDER.mkdir(parents=True, exist_ok=True)
        token_ids = tokenize(self.model, data.text("calibration"), num_tokens=32_768, seq_len=512).tolist()
        self.ids.write_text(json.dumps(token_ids))
        self.ids_digest = digest(token_ids)
        self.inputs = self._write_inputs()
        self.meter = PlanMeter(self.calibration, EVALUATIONS, lambda what, done, total: None)

    def _write_inputs(self) -> dict[str, str]:
        """Files that peers without transformers read: the checkpoint in float32, and the mean square of each matrix's inputs."""
        checkpoint = Checkpoint.open(self.folder)
        matrices = {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}
        importance = {
            f"{site.module}.{site.parameter}": self.calibration.statistics[site.id]
            .hessian.diagonal()
            .float()
            .contiguous()
            for site in self.linears
        }
        paths = {}
        for name, tensors in (("checkpoint", matrices), ("importance", importance)):
            path = (FOLDER / f"{name}-{self.model.fingerprint[:16]}.safetensors").resolve()
            save_file(tensors, path)
            paths[name] = str(path)
        return {**paths, "calibration": str(self.ids.resolve())}

    @property
    def linears(self) -> list[WeightSite]:
        return [site for site in self.model.weights if site.layer is not None]

    def num_parameters(self, scope: str) -> int:
        return self.model.num_parameters if scope == "whole" else sum(site.num_parameters for site in self.linears)

    def bits(self, measured: Measured, scope: str) -> float:
        """Bits per weight: all that is stored, or what is stored of the linears."""
        prefixes = tuple(site.module + "." for site in self.linears)
        stored = sum(n for name, n in measured.bytes.items() if scope == "whole" or name.startswith(prefixes))
        return 8 * stored / self.num_parameters(scope)

    def peers(self, wanted: Sequence[tuple[str, str, dict[str, Any]]]) -> Iterator[Measured]:
        """Peers' rows in the order of `wanted` (contender, peer, settings): packed in one process per peer, scored here."""
        keys = [[self.scorer.key, self.ids_digest, peer.fingerprint(name), settings] for _, name, settings in wanted]
        names = dict.fromkeys(name for (_, name, _), key in zip(wanted, keys) if key not in self.rows)
        for name in names:
            missing = [
                (key, settings) for (_, n, settings), key in zip(wanted, keys) if n == name and key not in self.rows
            ]
            for start in range(0, len(missing), PEER_REQUESTS):
                self._pack(name, missing[start : start + PEER_REQUESTS])
        for (contender, _, settings), key in zip(wanted, keys):
            row = self.rows.rows[digest(key)]
            setting = ", ".join(f"{k} {v}" for k, v in settings.items())
            yield Measured(
                contender,
                setting,
                row["tensor_bytes"],
                row["file_bytes"],
                row["kl"],
                row["nll"],
                row["versions"],
                row["seconds"],
            )

    def outside_bytes(self, measured: Measured | None) -> int:
        """Bytes of the embedding and head as a contender stores them, or as the checkpoint does."""
        outside = [site for site in self.model.weights if site.layer is None]
        if measured is None:
            return sum(site.num_bytes for site in outside)
        prefixes = tuple(site.module + "." for site in outside)
        return sum(n for name, n in measured.bytes.items() if name.startswith(prefixes))

    def _pack(self, name: str, missing: Sequence[tuple[Any, dict[str, Any]]]) -> None:
        """Rows of one process: asked, scored, kept."""
        requests = []
        for key, settings in missing:
            out = (FOLDER / "weights" / digest(key)).resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
            request = {"task": "weights", "model": str(self.folder), **self.inputs, "settings": settings}
            requests.append({**request, "out": str(out)})
        for (key, settings), request, answer in zip(missing, requests, peer.run_peer(name, requests)):
            dense = Path(answer.pop("dense"))
            self.rows.put(key, {**answer, **self.scorer.score(load_file(dense))})
            dense.unlink()
            shutil.rmtree(request["out"], ignore_errors=True)
            print(f"{self.folder.name}: {name} {settings} packed in {answer['seconds']:.0f} s", flush=True)

    def nearest(self, bits: int, scope: str) -> Measured:
        """Round to nearest, symmetric groups of 64 with one 16-bit scale each."""
        option = WeightOption(IntegerGrid(bits=bits, group_size=64, symmetric=True), NearestRounding())
        sites = self.model.weights if scope == "whole" else self.linears
        key = [self.scorer.key, "nearest", option.to_dict(), scope]
        return self._own(NEAREST, option.label, {site.id: option for site in sites}, key)

    def ours(self, size: float, scope: str) -> Measured:
        """What the planner chooses within the bytes of `size`, whole plans measured on calibration text."""
        key = [self.scorer.key, "ours", source_digest(), size, scope]
        chosen = {} if key in self.rows else self.plan(size, scope)
        return self._own(OURS, "planned, scales and norms tuned", chosen, key, tune=True)

    def plan(self, size: float, scope: str) -> dict[str, WeightOption]:
        """Site id -> option, of the sites that are not left as they are."""
        outside = sum(site.num_bytes for site in self.model.weights) - sum(site.num_bytes for site in self.linears)
        rest = total_bytes(self.model.rest)
        limit = int(size * self.num_parameters(scope) / 8) + (outside + rest if scope == "linears" else 0)
        built = self._stored_only(scope, rest)
        within = replace(built, problem=replace(built.problem, capacity_bytes={"device": limit}))
        solution = solve(within.problem, time_limit_seconds=SOLVE_SECONDS)
        assert solution.fits, f"nothing fits {size} bits of {self.model.name}"
        refined = self.meter.refine(within, solution)
        weights, _ = within.candidates(within.problem.describe(refined.solution.chosen))
        return {c.site.id: c.option for c in weights if not c.option.is_neutral}

    def _stored_only(self, scope: str, rest: int) -> ServingProblem:
        """The planner's problem with the stored weights alone: caches stay as they are and aren't counted."""
        damages = dict(self.calibration.weight_damages)
        if scope == "linears":
            inside = {site.id for site in self.linears}
            damages = {id: row if id in inside else {WeightOption(): NONE} for id, row in damages.items()}
        question = Question(
            model=self.model,
            workload=ServeWorkload(prompt_tokens=64, generate_tokens=65),
            machine=known(),
            budget_bytes=self.model.num_bytes * 4,
            budget_kind="tensor",
            placement="resident",
            weight_damages=damages,
            kv_damages={site.id: {KVOption(): NONE} for site in self.model.attention},
        )
        built, _ = make.solve_at(question, 64)
        point = TimePoint("stored", "device", (WEIGHTS,), (), rest)
        return replace(built, problem=replace(built.problem, time_points=(point,)))

    def _own(
        self, contender: str, setting: str, options: Mapping[str, WeightOption], key: Any, *, tune: bool = False
    ) -> Measured:
        """One of our rows: encoded, its floats tuned if wanted, written to a file whose bytes are counted, read back dense, scored."""

        def make() -> dict[str, Any]:
            started = time.perf_counter()
            checkpoint, stored, dense, untuned = Checkpoint.open(self.folder), {}, {}, None
            sites = {site.id: site for site in self.model.weights}
            packed = {id: (option, self._tensors(sites[id], option)) for id, option in options.items()}
            rest: Mapping[str, torch.Tensor] = {}
            if tune:
                untuned = self.scorer.score(
                    {
                        f"{sites[id].module}.{sites[id].parameter}": _dense(sites[id], *pair)
                        for id, pair in packed.items()
                    }
                )["kl"]
                windows = self.calibration.windows
                tuned = retune(
                    self.model,
                    packed,
                    windows.calibration,
                    windows.search,
                    settings=RetuneSettings(epochs=2, rate=3e-3),
                )
                packed = {id: (option, tuned.tensors[id]) for id, option in options.items()}
                rest = tuned.rest
            for site in self.model.weights:
                option = options.get(site.id)
                if option is None:
                    stored[site.id + ".weight"] = read_site(checkpoint, site)
                    continue
                tensors = packed[site.id][1]
                declared = total_bytes(option.stored(site.out_features, site.in_features, site.dtype))
                assert declared == sum(tensor.nbytes for tensor in tensors.values()), f"{site.id}: {option.label}"
                stored |= {f"{site.id}.{name}": tensor for name, tensor in tensors.items()}
                dense[f"{site.module}.{site.parameter}"] = _dense(site, option, tensors)
            for tensor in self.model.rest:
                stored[tensor.name] = rest.get(tensor.name, checkpoint.read(tensor.name))
            dense |= {name: tensor.float() for name, tensor in rest.items()}
            path = FOLDER / "ours.safetensors"
            save_file({name: tensor.contiguous().clone() for name, tensor in stored.items()}, path)
            return {
                "tensor_bytes": {name: tensor.nbytes for name, tensor in stored.items()},
                "file_bytes": path.stat().st_size,
                "options": {id: option.label for id, option in options.items()},
                "kl_before_tuning": untuned,
                "seconds": time.perf_counter() - started,
                **self.scorer.score(dense),
            }

        row = self.rows.get(key, make)
        versions = {"haversack": commit()}
        return Measured(
            contender, setting, row["tensor_bytes"], row["file_bytes"], row["kl"], row["nll"], versions, row["seconds"]
        )

    def _tensors(self, site: WeightSite, option: WeightOption) -> Mapping[str, torch.Tensor]:
        if option.rounding is not None and "hessian" in option.rounding.needs:
            return self.meter.tensors(site, option)
        return option.encode(WeightTask(read_site(Checkpoint.open(self.folder), site).float()))


def _dense(site: WeightSite, option: WeightOption, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return option.dense(tensors, site.out_features, site.in_features)


def standing(bench: Bench, rows: Sequence[Measured], size: float, scope: str) -> Measured:
    """The row that stands for a contender at a size: the least KL of those that fit, else the smallest larger one."""
    if scope == "linears":
        rows = [row for row in rows if bench.outside_bytes(row) >= bench.outside_bytes(None)]
    fitting = [row for row in rows if bench.bits(row, scope) <= size + 1e-9]
    if fitting:
        return min(fitting, key=lambda row: row.mean_kl)
    return min(rows, key=lambda row: bench.bits(row, scope))


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def source_digest() -> str:
    """Of the package's own source: our rows are measured again when it changes."""
    files = sorted(Path("src/haversack").rglob("*.py"))
    return digest([[str(path), path.read_text()] for path in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["a", "b"])
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES))
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    parser.add_argument("--only", nargs="*", help="contenders; the results file is written only without it")
    arguments = parser.parse_args()
    rows = FinishedRows("weights")
    figures, tables = [], []
    for name in arguments.models:
        bench = Bench(data.reference_model(name), rows)
        wanted = [s for s in peer_settings() if not arguments.only or s[0] in arguments.only]
        measured: dict[str, list[Measured]] = {}
        for row in bench.peers(wanted):
            measured.setdefault(row.contender, []).append(said(bench, row))
        for scope in arguments.scopes:
            by_contender = dict(measured)
            if not arguments.only or NEAREST in arguments.only:
                by_contender[NEAREST] = [said(bench, bench.nearest(bits, scope)) for bits in (2, 3, 4, 8)]
            ours = {}
            if not arguments.only or OURS in arguments.only:
                ours = {size: said(bench, bench.ours(size, scope)) for size in arguments.sizes}
            table, found = compare(bench, scope, by_contender, ours, arguments.sizes)
            tables.append(table)
            figures += found
    for table in tables:
        print(table["title"])
        for row in [table["columns"], *table["rows"]]:
            print("  ".join(f"{cell:<18}" for cell in row))
    if not arguments.only:
        print(write_results("weights", figures, tables=tables))


def said(bench: Bench, row: Measured) -> Measured:
    bits = " ".join(f"{scope} {bench.bits(row, scope):.3f}" for scope in SCOPES)
    print(f"{bench.folder.name}: {row.contender} ({row.setting}): {bits} bits, KL {row.mean_kl:.5f}", flush=True)
    return row


def compare(
    bench: Bench,
    scope: str,
    by_contender: Mapping[str, Sequence[Measured]],
    ours: Mapping[float, Measured],
    sizes: Sequence[float],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A table of one model and scope, and its figures with every window's KL."""
    title = f"{bench.folder.name}, {scope}: KL in nats per token (bits per weight really stored)"
    columns = ["size", OURS, *by_contender, "best of the others minus ours, 95%"]
    table_rows, figures = [], []
    for size in sizes:
        stand = {name: standing(bench, rows, size, scope) for name, rows in by_contender.items()}
        best = min(stand.values(), key=lambda row: row.mean_kl, default=None)
        mine = ours.get(size)
        everyone = ({OURS: mine} if mine else {}) | stand
        cells = [f"{row.mean_kl:.5f} ({bench.bits(row, scope):.2f})" for row in everyone.values()]
        gap = ""
        if mine and best:
            low, high = paired_interval(best.kl, mine.kl)
            gap = f"{low:+.5f} to {high:+.5f} ({best.contender})"
        table_rows.append([f"{size}", *([] if mine else ["-"]), *cells, gap])
        for row in everyone.values():
            kl, nll = mean_by_text(row.kl), mean_by_text(row.nll)
            figures.append(
                {
                    "model": bench.folder.name,
                    "scope": scope,
                    "size_bits": size,
                    "contender": row.contender,
                    "setting": row.setting,
                    "versions": dict(row.versions),
                    "bits_per_weight": bench.bits(row, scope),
                    "tensor_bytes": sum(row.bytes.values()),
                    "file_bytes": row.file_bytes,
                    "kl": row.mean_kl,
                    "minus_ours_95": paired_interval(row.kl, mine.kl) if mine else None,
                    **{f"kl_{text}": kl[text] for text in TEXTS},
                    **{f"perplexity_{text}": perplexity(nll[text]) for text in TEXTS},
                    "kl_per_window": [round(x, 7) for x in row.kl],
                    "seconds": row.seconds,
                }
            )
    return {"title": title, "columns": columns, "rows": table_rows}, figures


if __name__ == "__main__":
    main()
