"""Caches at equal bytes: the planner's and our recipes' against kvpress, transformers' quantized cache and llama.cpp's, models A and B.

At every size (bytes over those of a whole 16-bit cache of the probes' context) each contender stands with the best of its settings that fit;
one without any is left out there. Bytes are those really held over all layers: our slabs, the block being filled, scales and positions
included; for others the storages of all layers (llama.cpp: the sequence's state) after the context. Probes are those of `haversack eval kv`: foreign prose around
needles, lists, records, and real text by position; the question after the context, and ahead of it too. Damage is KL in nats per answer token from
the same model with a whole cache, everybody from their own 16-bit run. A contender is judged by its worst kind of probe; intervals are paired
bootstraps over all probes. The planner's statistics come from calibration text and other probes. Types of llama.cpp's that hold more than the
largest size stand below the table, at their own.

    python -m benchmarks.kv [--models a b] [--sizes 0.5 0.25 0.125 0.06] [--context 768] [--probes 4] [--threads 2] [--only CONTENDER ...]

Others come first, for their rows don't depend on our source. Finished rows are kept (`build/bench/kv.jsonl`): a changed model, script, setting or version of ours is measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import peer
from benchmarks.exports import pack_alike
from benchmarks.finished_rows import FinishedRows, digest
from benchmarks.results_file import write_results
from benchmarks.weights import source_digest
from haversack import data
from haversack.cost.cache_damages import untried_nats
from haversack.cost.calibrated import open_tokenizer, probe_tasks, probed_caches, token_ids_of
from haversack.cost.damage import Damage
from haversack.cost.single_changes import stage_model
from haversack.describe.model import Model, describe_model
from haversack.engine.attention_statistics import AttentionStatistics
from haversack.engine.measure import DamageMeter
from haversack.engine.probe_meter import ProbeMeter, Score, mean_kl
from haversack.engine.quiet import quiet_transformers
from haversack.errors import DoesNotFitError
from haversack.jobs.export import export
from haversack.parts.kv.base import KVOption
from haversack.probes.suite import Task, make_suite
from haversack.recipes.base import all_recipes
from haversack.recipes.cache_budget import CacheBudget
from haversack.solve.correct import correct
from haversack.solve.exact import solve
from haversack.solve.problem import Choice, Group, Problem, TimePoint

SIZES = (0.5, 0.25, 0.125, 0.06)
CONTEXT_TOKENS, NUM_PER_KIND = 768, 4
EVALUATIONS = 16
PLANNER = "planner"
RECIPE_SIZES = (0.25, 0.125)
"""Where our recipes stand beside each other; the planner and others stand at every size."""
PRESSES = (
    "StreamingLLMPress", "SnapKVPress", "ExpectedAttentionPress", "TOVAPress", "PyramidKVPress", "KeyDiffPress", "KnormPress",
    "LagKVPress",
)  # fmt: skip
QUANTIZED = [
    {"backend": backend, "bits": bits, "group_size": group_size, "recent": 128}
    for backend in ("quanto", "hqq")
    for bits in (2, 4)
    for group_size in (32, 64)
    if (backend, bits, group_size) != ("hqq", 2, 64)
]
"""hqq's 2 bits in groups of 64 fail for model A where a sequence's length is odd. 8 bits take 53% or more. The recent window is the default, and longer than any question with its answer, so that nothing is packed while they are
read: a shorter one could only lose more at as many bytes after the context."""
LLAMA_TYPES = ("q4_0", "q8_0")


@dataclass(frozen=True)
class Row:
    """A contender's setting at a size (or at any, for settings that don't depend on it): per probe, in the order of the suite."""

    contender: str
    setting: str
    held_bytes: int
    kinds: list[str]
    kl: list[float]
    nll: list[float]
    exact: list[bool | None]

    @property
    def by_kind(self) -> dict[str, float]:
        kinds = dict.fromkeys(self.kinds)
        return {kind: fmean(x for x, k in zip(self.kl, self.kinds) if k == kind) for kind in kinds}

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.by_kind.items(), key=lambda item: item[1])


class Bench:
    """One model, its probes, and the rows that are finished."""

    def __init__(self, folder: Path, rows: FinishedRows, context_tokens: int, num_per_kind: int, num_threads: int):
        self.folder, self.rows, self.num_threads = folder, rows, num_threads
        self.context_tokens = context_tokens
        self.model: Model = describe_model(folder)
        with quiet_transformers():
            tasks = make_suite(
                open_tokenizer(self.model),
                data.text("foreign-prose"),
                context_tokens=context_tokens,
                num_per_kind=num_per_kind,
            )
        loaded = DamageMeter(self.model, torch.zeros(1, 1, dtype=torch.int64))
        self.module = loaded.model
        self.meter = ProbeMeter(self.module, self.model.attention, self.model.dtype, tasks)
        self.whole_bytes = context_tokens * sum(site.bytes_per_token("BF16") for site in self.model.attention)
        self.key = {"model": self.model.fingerprint, "tasks": digest([asdict(task) for _, task in self.meter.tasks])}
        self._statistics: AttentionStatistics | None = None
        self._damages: dict[str, dict[KVOption, Damage]] | None = None
        self._steering: ProbeMeter | None = None

    # Ours

    def recipe(self, name: str, size: float) -> Row | None:
        """A recipe's whole cache within a size; None where it has no form as small."""
        recipe = all_recipes()[name]
        assert recipe.whole_cache is not None
        budget = CacheBudget(
            self.model.attention,
            self.meter.capacity_tokens,
            self.model.dtype,
            int(size * self.whole_bytes),
            self.statistics if recipe.needs_statistics else None,
        )
        try:
            return self.ours(name, recipe.whole_cache(budget))
        except DoesNotFitError:
            return None

    def ours(self, contender: str, options: Sequence[KVOption]) -> Row:
        key = {**self.key, "options": [o.to_dict() for o in options], "source": source_digest()}
        by_site = {site.id: option for site, option in zip(self.model.attention, options, strict=True)}

        def make() -> dict[str, Any]:
            return {"scores": [asdict(score) for score in self.meter.scores(by_site)]}

        scores = [Score(**score) for score in self.rows.get(key, make)["scores"]]
        label = " | ".join(dict.fromkeys(option.label for option in options))
        return Row(
            contender,
            label,
            max(score.held_bytes for score in scores),
            [f"{score.kind}, {score.asked}" for score in scores],
            [score.kl for score in scores],
            [score.nll for score in scores],
            [score.exact for score in scores],
        )

    @property
    def statistics(self) -> AttentionStatistics:
        if self._statistics is None:
            tasks = [t for t in self.steering_tasks(1) if t.announced]
            self._statistics = AttentionStatistics(self.module, self.model.attention, self.model.dtype, tasks)
        return self._statistics

    def steering_tasks(self, seed: int) -> tuple[Task, ...]:
        return probe_tasks(self.model, data.text("calibration"), self.meter.capacity_tokens, seed)

    def planner(self, size: float, evaluations: int) -> Row:
        """Options per head from measured damages, the search corrected by whole caches measured on other probes."""
        key = {**self.key, "planner": size, "evaluations": evaluations, "source": source_digest()}
        chosen = self.rows.get(
            key, lambda: [o.to_dict() for o in self._planned(int(size * self.whole_bytes), evaluations)]
        )
        return self.ours(PLANNER, [KVOption.from_dict(option) for option in chosen])

    def _planned(self, num_bytes: int, evaluations: int) -> list[KVOption]:
        if self._damages is None:
            staged = stage_model(self.model)
            text_ids = token_ids_of(self.model, data.text("calibration")[: 1 << 18])
            with tempfile.TemporaryDirectory() as scratch:
                table = _Kept(self.rows, self.key)
                self._damages = probed_caches(
                    staged, self.steering_tasks(1), text_ids, self.meter.capacity_tokens, table, Path(scratch) / "states",
                    lambda what, done, total: print(f"\r{what} {done}/{total}", end="", flush=True), 3600.0,
                )  # fmt: skip
            self._steering = ProbeMeter(self.module, self.model.attention, self.model.dtype, self.steering_tasks(2))
        shape = {"batch_size": 1, "capacity_tokens": self.meter.capacity_tokens, "dtype": self.model.dtype}
        kinds = list(
            dict.fromkeys(kind for row in self._damages.values() for d in row.values() for kind, _ in d.probes)
        )
        groups, tables = [], []
        for site in self.model.attention:
            table = list(self._damages[site.id].items())
            choices = tuple(
                Choice(str(i), damage.on(kinds), 0.0, {"kv": option.stored_bytes(site, **shape)})  # type: ignore[arg-type]
                for i, (option, damage) in enumerate(table)
            )
            groups.append(Group(site.id, choices, kind="kv"))
            tables.append([option for option, _ in table])
        problem = Problem(tuple(groups), (TimePoint("decode", "device", ("kv",)),), {"device": num_bytes})

        def options(chosen: Sequence[int]) -> list[KVOption]:
            return [table[i] for table, i in zip(tables, chosen, strict=True)]

        def measure(chosen: tuple[int, ...]) -> tuple[float, ...]:
            assert self._steering is not None
            by_site = dict(zip(self.model.attention, options(chosen), strict=True))
            found = mean_kl(self._steering.scores({site.id: option for site, option in by_site.items()}))
            untried = untried_nats(by_site, self._steering.capacity_tokens)
            text = fmean(nats for kind, nats in found.items() if kind.startswith("text"))
            return (text, *(found[kind] + untried for kind in kinds))

        start = solve(problem, time_limit_seconds=60)
        best = correct(problem, measure, max_evaluations=evaluations, start=start.chosen, time_limit_seconds=20).best
        print(
            f"\n{self.folder.name} at {num_bytes} B: solver {best.predicted:.4f} predicted, {best.measured:.4f} measured",
            flush=True,
        )
        return options(best.chosen)

    # Others

    def peers(self, sizes: Sequence[float], only: Sequence[str] | None) -> list[tuple[float | None, Row]]:
        """Every press at every size, and every other cache once (size None), of those that hold no more."""
        wanted: list[tuple[str, float | None, str, dict[str, Any]]] = [
            ("kvpress", size, press, {"press": press, "bytes": int(size * self.whole_bytes)})
            for press in PRESSES
            for size in sizes
        ]
        wanted += [("transformers", None, f"QuantizedCache {one['backend']}", one) for one in QUANTIZED]
        wanted += [("llama_cpp_caches", None, f"llama.cpp {kind}", {"kv": kind}) for kind in LLAMA_TYPES]
        wanted = [item for item in wanted if not only or item[2] in only]
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for name in ("kvpress", "transformers", "llama_cpp_caches"):
                keyed = [(self._peer_key(name, item[3]), *item[1:]) for item in wanted if item[0] == name]
                self._ask(name, [item for item in keyed if item[0] not in self.rows], Path(folder))
                for key, size, contender, setting in keyed:
                    row = self._peer_row(contender, setting, self.rows.get(key, dict))
                    if row is not None:
                        found.append((size, row))
        return found

    def _peer_key(self, name: str, setting: Mapping[str, Any]) -> dict[str, Any]:
        shared = (peer.SCRIPTS / "cached_answers.py").read_text()
        return {**self.key, "peer": name, "setting": setting, "scripts": [peer.fingerprint(name), shared]}

    def _ask(self, name: str, missing: Sequence[tuple], folder: Path) -> None:
        """Rows that are not there yet, from one process of the peer."""
        if not missing:
            return
        probes = folder / "probes.json"
        probes.write_text(json.dumps([_for_peer(task) for _, task in self.meter.tasks]))
        shared: dict[str, Any] = {"task": "kv", "probes": str(probes), "num_threads": self.num_threads}
        if name == "llama_cpp_caches":
            shared["file"] = str(folder / "model.gguf")
            export(pack_alike(self.model, None, folder / "as-is"), shared["file"], "gguf")
        else:
            shared["model"] = str(self.folder)
        requests = [{**shared, "settings": setting} for *_, setting in missing]
        answers = peer.run_peer(name, requests, num_threads=self.num_threads)
        for done, (item, answer) in enumerate(zip(missing, answers, strict=True), 1):
            self.rows.put(item[0], answer)
            said = f"KL {fmean(answer['kl']):.4f}" if answer["kl"] else "too large"
            print(
                f"{self.folder.name}: {name} {done} of {len(missing)}, {answer['seconds']:.0f} s: {item[3]}: {said}",
                flush=True,
            )

    def _peer_row(self, contender: str, setting: Mapping[str, Any], answer: Mapping[str, Any]) -> Row | None:
        """None where the cache held too much."""
        kinds = [f"{task.kind}, {asked}" for asked, task in self.meter.tasks]
        if len(answer["kl"]) < len(kinds):
            return None
        exact = [None if kind.startswith("text") else hit for kind, hit in zip(kinds, answer["exact"])]
        hidden = ("press", "backend", "bytes", "kv")
        said = " ".join(f"{name} {value}" for name, value in setting.items() if name not in hidden)
        return Row(contender, said, max(answer["bytes"]), kinds, answer["kl"], answer["nll"], exact)


class _Kept:
    """A stage's rows among the benchmark's own."""

    def __init__(self, rows: FinishedRows, key: Mapping[str, Any]):
        self._rows, self._key = rows, {**key, "source": source_digest()}
        kept = self._rows.rows.get(digest(self._key), {})
        self.rows: dict[str, Any] = dict(kept)

    def add(self, key: str, value: object) -> None:
        self.rows[key] = value
        if key.startswith("stage "):  # its end
            self._rows.put(self._key, self.rows)


def _for_peer(task: Task) -> dict[str, Any]:
    """Turns as ids and the places of their answers; those in a row become one, whose later questions read what was asked and answered before."""
    turns = []
    for together in [task.turns] if task.in_a_row else [(turn,) for turn in task.turns]:
        ids: list[int] = []
        places: list[int] = []
        for turn in together:
            start = len(ids) + len(turn.question)
            ids += [*turn.question, *turn.answer]
            places += range(start, len(ids))
        turns.append([ids, places])
    return {"context": list(task.context), "turns": turns}


def interval(theirs: Row, ours: Row, *, num_samples: int = 4000) -> list[float]:
    """95% paired bootstrap of the mean of theirs minus ours over probes, as many of each kind drawn."""
    difference = torch.tensor(theirs.kl, dtype=torch.float64) - torch.tensor(ours.kl, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(num_samples, dtype=torch.float64)
    for kind in dict.fromkeys(ours.kinds):
        some = difference[[i for i, k in enumerate(ours.kinds) if k == kind]]
        draws = torch.randint(len(some), (num_samples, len(some)), generator=generator)
        means += some[draws].mean(1) * len(some) / len(difference)
    return [float(means.quantile(0.025)), float(means.quantile(0.975))]


def compare(
    bench: Bench, others: Sequence[tuple[float | None, Row]], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Figures and a table of one model."""
    only = arguments.only
    recipes = [r.id for r in all_recipes().values() if r.whole_cache is not None and (not only or r.id in only)]
    figures: list[dict[str, Any]] = []
    table_rows: list[list[str]] = []
    for size in arguments.sizes:
        limit = size * bench.whole_bytes
        rows: list[Row] = []
        if not only or PLANNER in only:
            rows.append(bench.planner(size, arguments.evaluations))
        if size in RECIPE_SIZES or only:
            rows += [row for name in recipes if (row := bench.recipe(name, size)) is not None]
        by_contender: dict[str, list[Row]] = {}
        for at, row in others:
            if at in (None, size) and row.held_bytes <= limit:
                by_contender.setdefault(row.contender, []).append(row)
        rows += [min(settings, key=lambda row: row.worst[1]) for settings in by_contender.values()]
        ours = rows[0] if rows and rows[0].contender == PLANNER else None
        for row in sorted(rows, key=lambda row: row.worst[1]):
            kind, worst = row.worst
            gap = interval(row, ours) if ours is not None and row is not ours else None
            exact = [hit for hit in row.exact if hit is not None]
            text = [nll for nll, k in zip(row.nll, row.kinds) if k.startswith("text")]
            figures.append(
                {
                    "model": bench.folder.name,
                    "size": size,
                    "share_held": row.held_bytes / bench.whole_bytes,
                    "minus_planner_95": gap,
                    "by_kind": row.by_kind,
                    "mean_kl": fmean(row.kl),
                    "exact": fmean(exact),
                    "text_nll": fmean(text),
                    **asdict(row),
                }
            )
            said = "" if gap is None else f"{gap[0]:+.3f} to {gap[1]:+.3f}"
            held = f"{row.held_bytes / bench.whole_bytes:.1%}"
            table_rows.append(
                [
                    f"{size:.1%}",
                    row.contender,
                    held,
                    f"{worst:.3f}",
                    kind,
                    f"{fmean(row.kl):.3f}",
                    f"{fmean(exact):.0%}",
                    said,
                ]
            )
            print("  ".join(f"{cell:<20}" for cell in table_rows[-1]), flush=True)
    for _, row in others:
        if row.held_bytes > max(arguments.sizes) * bench.whole_bytes:
            kind, worst = row.worst
            exact = [hit for hit in row.exact if hit is not None]
            held = f"{row.held_bytes / bench.whole_bytes:.1%}"
            cells = [held, row.contender, held, f"{worst:.3f}", kind, f"{fmean(row.kl):.3f}", f"{fmean(exact):.0%}", ""]
            table_rows.append(cells)
    columns = ["size", "cache", "held", "worst KL", "at", "mean KL", "exact", "mean minus planner's, 95%"]
    title = f"{bench.folder.name}: caches at equal bytes, nats per answer token ({bench.context_tokens} tokens)"
    return figures, {"title": title, "columns": columns, "rows": table_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["a", "b"])
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    parser.add_argument("--context", type=int, default=CONTEXT_TOKENS)
    parser.add_argument("--probes", type=int, default=NUM_PER_KIND, help="of each kind")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="whole caches that the planner measures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="contenders; the results file is written only without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = FinishedRows("kv")
    figures, tables = [], []
    sizes = (arguments.context, arguments.probes, arguments.threads)
    benches = [Bench(data.reference_model(name), rows, *sizes) for name in arguments.models]
    others = [bench.peers(arguments.sizes, arguments.only) for bench in benches]
    for bench, theirs in zip(benches, others, strict=True):
        found, table = compare(bench, theirs, arguments)
        figures += found
        tables.append(table)
    if not arguments.only:
        print(write_results("kv", figures, tables=tables))


if __name__ == "__main__":
    main()
