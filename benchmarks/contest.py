"""Contenders that train under caps on the peak: what `benchmarks.pretraining` and `benchmarks.tuning` share.

A contender's loss is measured once per learning rate and seed, all rows at once and nothing recomputed; its peak apart, in the way in which it holds the least (other
tools: full recomputation, one row at a time), or in the way that was planned (ours). Recomputation, micro-batches, cut losses and updates during the backward pass
change losses by rounding alone, so that no cap needs runs of its own. Every contender tries the same learning rates with the first seed; the best goes on with the
others. Rows are finished one at a time and kept, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.finished_rows import FOLDER, FinishedRows
from benchmarks.peer import SCRIPTS, PeerProcess, fingerprint
from benchmarks.results_file import write_results
from benchmarks.scorer import paired_interval
from haversack.describe.machine import detect
from haversack.describe.model import Model, describe_model
from haversack.describe.parallel import Parallelism
from haversack.describe.workload import TrainWorkload, TuneWorkload, workload_from_dict
from haversack.errors import DoesNotFitError
from haversack.plan.fit_training import fit_training
from haversack.plan.training import TrainingQuestion

OURS, OTHERS = "haversack_training", "training"
SEEDS = (0, 1, 2)
TIE_SHARE = 0.8
"""A tie counts where ours peaks at no more than this share of the other's peak, so that we are planned there, too."""

WAYS = {"recompute": "none", "update": "step", "loss": "fp32", "saved": "exact", "accumulation_steps": 1}
"""What changes no loss but by rounding, as losses are measured; with all rows of a step at once."""


@dataclass(frozen=True)
class Contender:
    """Whose process runs it, and the settings that it is asked with, without recomputation."""

    name: str
    process: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Contest:
    """`caps` are shares of the peak of `yardstick`, another tool's contender; `workload` is what ours is planned for. `tokens` are trained on, but for the
    last `held_windows` windows."""

    name: str
    model: Path
    init: str
    tokens: np.ndarray
    steps: int
    rates: Sequence[float]
    workload: TrainWorkload | TuneWorkload
    others: Sequence[Contender]
    yardstick: str
    caps: Sequence[float]
    held_windows: int = 32

    @cached_property
    def described(self) -> Model:
        described = describe_model(self.model)
        return described if self.init == "trained" else describe_model(dict(described.config))

    @cached_property
    def tokens_file(self) -> Path:
        path = FOLDER / f"{self.name}-tokens.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, self.tokens.astype(np.uint16), allow_pickle=False)
        return path.resolve()

    def request(self, contender: Contender, task: str, rate: float, seed: int, **settings: Any) -> dict[str, Any]:
        return {
            "task": task,
            "model": str(self.model),
            "init": self.init,
            "tokens": str(self.tokens_file),
            "steps": self.steps,
            "rows_per_step": self.workload.batch_size,
            "seq_len": self.workload.seq_len,
            "held_windows": self.held_windows,
            "rate": rate,
            "seed": seed,
            "num_threads": 1,
            "settings": {**contender.settings, **settings},
        }

    def key(self, contender: Contender, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a row depends on."""
        scripts = hashlib.sha256((SCRIPTS / "training.py").read_bytes()).hexdigest()[:16]
        tokens = hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]
        asked = {k: v for k, v in request.items() if k not in ("tokens", "model")}
        return {
            **asked,
            "model": self.described.fingerprint,
            "tokens": tokens,
            "scripts": [scripts, fingerprint(contender.process)],
        }


def contest_on(text: str, model: Path, *, tokens: int, workload: TrainWorkload | TuneWorkload, **rest: Any) -> Contest:
    """A contest of runs over `tokens` tokens, drawn from a text in the model's own."""
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    steps = tokens // (workload.batch_size * workload.seq_len)
    return Contest(model=model, tokens=np.array(ids), steps=steps, workload=workload, **rest)


def main(make: Callable[[int], Contest], tokens: int) -> None:
    """A contest's own command, `[--minutes N] [--tokens N]`: `make` is told how many tokens every row trains on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--tokens", type=int, default=tokens)
    given = parser.parse_args()
    contest = make(given.tokens)
    rows = f"{contest.workload.batch_size} x {contest.workload.seq_len}"
    run(contest, given.minutes, [f"Every row trains on {given.tokens:,} tokens, {rows} per step."])


class Rows:
    """A contest's rows: finished ones at once, others while there is time. `missing` names what there was no time for."""

    def __init__(self, contest: Contest, deadline: float):
        self.contest, self.deadline = contest, deadline
        self.finished = FinishedRows(contest.name)
        self.missing: list[str] = []
        self._processes: dict[str, PeerProcess] = {}

    def loss(self, contender: Contender, rate: float, seed: int) -> dict[str, Any] | None:
        request = self.contest.request(contender, "train", rate, seed)
        return self._row(contender, request, f"{contender.name}, rate {rate:g}, seed {seed}")

    def peak(self, contender: Contender, **settings: Any) -> dict[str, Any] | None:
        request = self.contest.request(contender, "measure", 1e-3, 0, **settings)
        return self._row(contender, request, f"{contender.name}, peak")

    def _row(self, contender: Contender, request: dict[str, Any], what: str) -> dict[str, Any] | None:
        key = self.contest.key(contender, request)
        if key not in self.finished:
            if time.monotonic() > self.deadline:
                self.missing.append(what)
                return None
            started = time.monotonic()
            self.finished.put(key, self._ask(contender.process, request))
            print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)
        return self.finished.get(key, dict)

    def _ask(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        if name not in self._processes:
            self._processes[name] = PeerProcess(name, num_threads=1)
        return self._processes[name].ask(request, timeout_seconds=7200)

    def close(self) -> None:
        for process in self._processes.values():
            process.__exit__()


@dataclass(frozen=True)
class Planned:
    """Our choice under a budget on tensors: the workload, and the contender whose losses are its own."""

    workload: TrainWorkload | TuneWorkload
    given_up: tuple[str, ...]
    predicted_bytes: int

    @property
    def name(self) -> str:
        method = f"{self.workload.method}, " if isinstance(self.workload, TuneWorkload) else ""
        return f"haversack ({method}{self.workload.optimizer})"

    @property
    def contender(self) -> Contender:
        rows = self.workload.batch_size * self.workload.accumulation_steps
        plain = dataclasses.replace(self.workload, **{**WAYS, "batch_size": rows})
        return Contender(self.name, OURS, {"workload": plain.to_dict()})

    def to_dict(self) -> dict[str, Any]:
        return {
            "workload": self.workload.to_dict(),
            "given_up": list(self.given_up),
            "predicted_bytes": self.predicted_bytes,
        }


def planned(contest: Contest, budget_bytes: int, rows: Rows) -> Planned | None:
    """The planner's own choice; None where nothing fits, or there was no time."""

    def make() -> dict[str, Any]:
        machine = detect()
        question = TrainingQuestion(contest.described, contest.workload, machine, Parallelism(), budget_bytes, "tensor")
        try:
            fit = fit_training(question, frozenset({"precision"}), clips=False)
        except DoesNotFitError:
            return {}
        return Planned(fit.workload, fit.given_up, fit.answer.cost.tensor_peak_bytes).to_dict()

    key = {
        "plan": budget_bytes,
        "of": contest.workload.to_dict(),
        "model": contest.described.fingerprint,
        "code": fingerprint(OURS),
    }
    if key not in rows.finished and time.monotonic() > rows.deadline:
        rows.missing.append(f"plan of {budget_bytes} bytes")
        return None
    row = rows.finished.get(key, make)
    if not row:
        return None
    workload = workload_from_dict(row["workload"])
    assert isinstance(workload, TrainWorkload | TuneWorkload)
    return Planned(workload, tuple(row["given_up"]), row["predicted_bytes"])


def run(contest: Contest, minutes: float, notes: Sequence[str]) -> Path:
    """All rows that `minutes` allow, and the results of what is whole."""
    rows = Rows(contest, time.monotonic() + 60 * minutes)
    try:
        figures = figures_of(contest, rows)
    finally:
        rows.close()
    missing = [f"Missing: {len(rows.missing)} rows that there was no time for."] if rows.missing else []
    path = write_results(contest.name, figures, (*notes, *missing), tables=tables(figures))
    print(path, *missing)
    return path


def figures_of(contest: Contest, rows: Rows) -> dict[str, Any]:
    peaks = {
        c.name: max(n for what, n in row["peak_bytes"].items() if what != "making")
        for c in contest.others
        if (row := rows.peak(c, recompute=True, micro_batch=1)) is not None
    }
    figures: dict[str, Any] = {
        "steps": contest.steps,
        "tokens_trained_on": contest.steps * contest.workload.batch_size * contest.workload.seq_len,
        "learning_rates": list(contest.rates),
        "peak_bytes": peaks,
        "caps": [],
        "missing": rows.missing,
    }
    if contest.yardstick not in peaks:
        return figures
    theirs = swept(contest, contest.others, rows)
    budgets: list[tuple[str, int, int]] = []  # where, the budget, the number of its cap
    for number, share in enumerate(contest.caps):
        cap = int(share * peaks[contest.yardstick])
        fitting = {name: row for name, row in theirs.items() if peaks.get(name, cap + 1) <= cap}
        entry: dict[str, Any] = {"share_of_yardstick": share, "cap_bytes": cap, "rows": []}
        budgets.append(("at the cap", cap, number))
        if fitting:
            best = min(fitting, key=lambda name: fitting[name]["loss"])
            entry["best_other"] = best
            budgets.append((f"at {TIE_SHARE:g} of the best other's peak", int(TIE_SHARE * peaks[best]), number))
        entry["rows"] = [{"contender": name, "peak_bytes": peaks[name], **_shown(row)} for name, row in fitting.items()]
        figures["caps"].append(entry)
    plans = {budget: planned(contest, budget, rows) for _, budget, _ in budgets}
    ours = {plan.name: plan.contender for plan in plans.values() if plan is not None}
    losses = theirs | swept(contest, list(ours.values()), rows)
    figures["losses"] = {name: {k: v for k, v in row.items() if k != "windows"} for name, row in losses.items()}
    for where, budget, number in budgets:
        entry = figures["caps"][number]
        fitting = {row["contender"]: theirs[row["contender"]] for row in entry["rows"] if "planned" not in row}
        if plans[budget] is None and f"plan of {budget} bytes" in rows.missing:
            continue
        entry["rows"] += _ours(rows, where, plans[budget], fitting, losses)
    return figures


def _ours(
    rows: Rows, where: str, plan: Planned | None, fitting: Mapping[str, Any], losses: Mapping[str, Any]
) -> list[dict[str, Any]]:
    if plan is None:
        return [{"contender": "haversack", "planned": where, "fits": False}]
    measured = rows.peak(Contender(plan.name, OURS, {"workload": plan.workload.to_dict()}))
    if plan.name not in losses or measured is None:
        return []
    own = losses[plan.name]
    return [
        {
            "contender": plan.name,
            "planned": where,
            **plan.to_dict(),
            "peak_bytes": max(measured["peak_bytes"].values()),
            **_shown(own),
            "others_minus_ours_95": {name: difference(theirs, own) for name, theirs in fitting.items()},
        }
    ]


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("loss", "rate", "num_seeds")}


def swept(contest: Contest, contenders: Sequence[Contender], rows: Rows) -> dict[str, dict[str, Any]]:
    """Of every contender whose rates were all tried: the best rate, and its loss on held-back windows over the seeds that are there."""
    first = {(c.name, rate): rows.loss(c, rate, SEEDS[0]) for rate in contest.rates for c in contenders}
    found: dict[str, dict[str, Any]] = {}
    for c in contenders:
        by_rate = {rate: row for rate in contest.rates if (row := first[c.name, rate]) is not None}
        if len(by_rate) == len(contest.rates):
            means = {rate: _mean(row) for rate, row in by_rate.items()}
            best = min(means, key=means.__getitem__)
            found[c.name] = {
                "rate": best,
                "by_rate": {f"{rate:g}": mean for rate, mean in means.items()},
                "windows": {SEEDS[0]: by_rate[best]["windows"]},
            }
    for seed in SEEDS[1:]:
        for c in contenders:
            row = rows.loss(c, found[c.name]["rate"], seed) if c.name in found else None
            if row is not None:
                found[c.name]["windows"][seed] = row["windows"]
    for row in found.values():
        every = [value for windows in row["windows"].values() for value in windows]
        row |= {"num_seeds": len(row["windows"]), "loss": sum(every) / len(every)}
    return found


def _mean(row: Mapping[str, Any]) -> float:
    """Of the held-back windows; a run that broke is infinitely bad."""
    mean = float(np.mean(row["windows"]))
    return mean if np.isfinite(mean) else float("inf")


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[float]:
    """95% interval of their loss minus ours, paired by seed and window."""
    seeds = sorted(set(theirs["windows"]) & set(ours["windows"]))
    pair = [[value for seed in seeds for value in row["windows"][seed]] for row in (theirs, ours)]
    return paired_interval(*pair, strata=len(seeds))


def tables(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of others' peaks, and one for each cap that has rows."""
    peaks = {
        "title": "other tools' peaks, everything recomputed, one row at a time",
        "columns": ["contender", "peak, bytes"],
        "rows": [[name, f"{num_bytes:,}"] for name, num_bytes in figures["peak_bytes"].items()],
    }
    return [
        peaks,
        *(
            {
                "title": f"peak of at most {cap['cap_bytes']:,} bytes ({cap['share_of_yardstick']:g} of the yardstick's)",
                "columns": ["contender", "peak, bytes", "loss, nats", "learning rate", "seeds", "minus ours, 95%"],
                "rows": [list(row) for row in _table_rows(cap)],
            }
            for cap in figures["caps"]
            if cap["rows"]
        ),
    ]


def _table_rows(cap: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    differences: Mapping[str, Any] = next(
        (r["others_minus_ours_95"] for r in cap["rows"] if "others_minus_ours_95" in r), {}
    )
    for row in cap["rows"]:
        name = f"{row['contender']}, {row['planned']}" if "planned" in row else row["contender"]
        if "loss" not in row:
            yield name, "nothing fits", "", "", "", ""
            continue
        interval = differences.get(row["contender"])
        shown = "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        yield name, f"{row['peak_bytes']:,}", f"{row['loss']:.4f}", f"{row['rate']:g}", str(row["num_seeds"]), shown
