"""What the project aims for, and what the stored results say of it: the table that docs/results.md begins with.

Nothing is measured here. A goal names the benchmark that shows it and reads its stored figures; one whose benchmark has not been run says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.plan_time import GOAL_SECONDS
from benchmarks.results_file import RESULTS

Reading = tuple[str, bool]
"""The figure as it is shown, and whether the goal is met."""


@dataclass(frozen=True)
class Goal:
    """`read` takes the benchmark's stored figures. It raises KeyError or IndexError where they lack the row."""

    what: str
    aim: str
    benchmark: str
    read: Callable[[Any], Reading]


def at_least(values: list[float], limit: float) -> Reading:
    """The least of the values against a lower limit."""
    return f"{min(values):.3g}", min(values) >= limit


def at_most(values: list[float], limit: float) -> Reading:
    """The greatest of the values against an upper limit."""
    return f"{max(values):.3g}", max(values) <= limit


def share_at_most(values: list[float], limit: float) -> Reading:
    """The same for shares."""
    return f"{max(values):.2%}", max(values) <= limit


def _residents(rows: Any) -> Reading:
    """Of the residents that a plan holds; what runs beside them is bounded, not equal."""
    held = [row for row in rows if row["resident"] != "what runs"]
    equal = [row for row in held if row["predicted"] == row["measured"]]
    return f"{len(equal)} of {len(held)} equal", len(equal) == len(held)


def _error(row: Any) -> float:
    """Of what was predicted, as a share of what was measured."""
    return abs(float(row["predicted"] / row["measured"] - 1))


def _bounded(rows: Any) -> Reading:
    runs = [row for row in rows if row["resident"] == "what runs"]
    kept = [row for row in runs if row["measured"] <= row["predicted"]]
    return f"{len(kept)} of {len(runs)}", len(kept) == len(runs)


def _lower(rows: Any) -> Reading:
    below = [row for row in rows if row["difference_95"][1] < 0]
    return f"{len(below)} of {len(rows)}", len(below) == len(rows)


def _one_token(bits: str) -> Callable[[Any], list[float]]:
    """The fraction of a plain read that our fastest kernel at these bits reaches, by shape."""

    def read(rows: Any) -> list[float]:
        best: dict[tuple[int, int], float] = {}
        for row in rows:
            if row["tokens"] == 1 and row["contender"].startswith(f"{bits} bits"):
                shape = (row["out_features"], row["in_features"])
                best[shape] = max(best.get(shape, 0.0), row["over_read"])
        return list(best.values())

    return read


def _two_over_four(rows: Any) -> Reading:
    times: dict[tuple[str, int], float] = {}
    for row in rows:
        bits = row["contender"][:6]
        if row["tokens"] == 1 and bits in ("2 bits", "4 bits"):
            key = (bits, row["out_features"])
            times[key] = min(times.get(key, float("inf")), row["microseconds"])
    return at_most([times["2 bits", out] / times["4 bits", out] for bits, out in times if bits == "2 bits"], 0.67)


def _over_dense(rows: Any, *, int8: bool) -> list[float]:
    """Long inputs' rates over dense bfloat16's, by kernels of integers or of floats."""
    long = [row for row in rows if "rate_over_dense" in row]
    return [row["rate_over_dense"] for row in long if ("int8" in row["contender"]) == int8]


def _decode(figures: Any, batch: int, context: int, cache: str) -> dict[str, Any]:
    return next(
        row
        for row in figures["decode"]
        if (row["batch_size"], row["context_tokens"], row["cache"]) == (batch, context, cache)
    )


def _over_peers(figures: Any, case: str, ours: str, limit: float, theirs: str = "") -> Reading:
    """Ours over the fastest of the contenders whose names begin with `theirs`, by ratios paired by round."""
    rows = [row for row in figures if row["case"] == case and row["contender"].startswith(theirs)]
    return at_least([row["ours_over_it"][ours]["median"] for row in rows if "ours_over_it" in row], limit)


def _better_over_peers(figures: Any, case: str, limit: float, theirs: str = "") -> Reading:
    """The same for the better of ours, with activations as they are or in 8 bits, and which it was."""
    there = [row["contender"] for row in figures if row["case"] == case and "failed" not in row]
    each = {ours: _over_peers(figures, case, ours, limit, theirs)[0] for ours in there if ours.startswith("haversack")}
    best = max(each, key=lambda ours: float(each[ours]))
    kind = "8-bit" if "8-bit" in best else "16-bit"
    return f"{each[best]}, {kind} activations", float(each[best]) >= limit


def _first_token(figures: Any, which: str, limit: float) -> Reading:
    steps = figures["first_token"][which]
    seconds = sum(steps[name] for name in ("load", "decoder", "first token"))
    return f"{seconds:.2f} s", seconds < limit


def _tied_or_best(field: str, ours: str) -> Callable[[Any], Reading]:
    """Rows of others whose paired interval, theirs minus ours, does not lie below zero."""

    def read(rows: Any) -> Reading:
        others = [row for row in rows if row["contender"] != ours]
        kept = [row for row in others if row[field][1] >= 0]
        return f"{len(kept)} of {len(others)}", len(kept) == len(others)

    return read


def _under_caps(figures: Any) -> Reading:
    """Caps at which our loss is below every other's, intervals apart, or not above the best other's at 0.8 of its peak. KeyError where rows are missing."""
    if figures["missing"]:
        raise KeyError(figures["missing"][0])
    won = 0
    for cap in figures["caps"]:
        ours = [row for row in cap["rows"] if "others_minus_ours_95" in row]
        peaks = {row["contender"]: row["peak_bytes"] for row in cap["rows"] if "planned" not in row}
        best = cap.get("best_other")
        lowest = any(all(interval[0] > 0 for interval in row["others_minus_ours_95"].values()) for row in ours)
        tied = best is not None and any(
            row["others_minus_ours_95"][best][1] >= 0 and row["peak_bytes"] <= 0.8 * peaks[best] for row in ours
        )
        won += lowest or tied
    return f"{won} of {len(figures['caps'])}", won == len(figures["caps"])


def _on_or_below(rows: Any) -> Reading:
    """Of torch's ways to recompute, those whose peak ours reaches with no more products done again. KeyError while compiled ones are missing."""
    if not any(row["contender"].startswith("compiled") for row in rows):
        raise KeyError("compiled")
    reached = [r for r in rows if "ours" in r and r["ours"]["peak_bytes"] <= r["peak_bytes"] and r["ours"]["extra_flops"] <= r["extra_flops"]]  # fmt: skip
    return f"{len(reached)} of {len(rows)}", len(reached) == len(rows)


def _agreeing(kind: str, share: float) -> Callable[[Any], Reading]:
    def read(rows: Any) -> Reading:
        scored = [row for row in rows if row["kind"] == kind]
        agreeing = [row for row in scored if row["agrees"]]
        return f"{len(agreeing)} of {len(scored)}", len(agreeing) >= share * len(scored)

    return read


GOALS = (
    Goal("declared bytes of weights, rest and cache against the allocator's", "equal", "exact_bytes", _residents),
    Goal("what runs beside them: at most what was declared", "all", "exact_bytes", _bounded),
    Goal(
        "peak of the process, models of 1 to 2 GiB",
        "within 5%",
        "process_peak",
        lambda rows: share_at_most([row["error"] for row in rows], 0.05),
    ),
    Goal("plans lose less than the best uniform choice, intervals apart", "all", "plans", _lower),
    *(
        Goal(
            f"one-token matmul at {bits} bits, packed bytes/s over read bandwidth",
            f"at least {limit}",
            "kernels",
            lambda rows, bits=bits, limit=limit: at_least(_one_token(bits)(rows), limit),  # type: ignore[misc]
        )
        for bits, limit in (("2", 0.65), ("3", 0.65), ("4", 0.8), ("8", 0.8))
    ),
    Goal("2-bit time over 4-bit time", "at most 0.67", "kernels", _two_over_four),
    Goal(
        "512-token matmul at 4 bits over dense bf16's rate",
        "at least 0.6",
        "kernels",
        lambda rows: at_least(_over_dense(rows, int8=False), 0.6),
    ),
    Goal(
        "the same with 8-bit activations",
        "at least 1.6",
        "kernels",
        lambda rows: at_least(_over_dense(rows, int8=True), 1.6),
    ),
    Goal(
        "whole-model decode at 4 bits over its bound",
        "at least 0.7",
        "decode",
        lambda figures: at_least([_decode(figures, 1, 64, "16")["fraction_of_bound"]], 0.7),
    ),
    *(
        Goal(what, f"at least {given[1]}", "decode_peers", lambda f, given=given: _better_over_peers(f, *given))  # type: ignore[misc]
        for what, given in (
            ("decode, one sequence, over the fastest other tool", ("batch 1", 1.3)),
            ("decode, eight sequences, over the fastest other tool", ("batch 8", 1.2)),
            ("prefill of 512 tokens over the fastest other tool", ("prefill", 1.0)),
            ("the same over llama.cpp", ("prefill", 2.0, "llama.cpp")),
        )
    ),
    *(
        Goal(what, f"at least {limit}", "decode_peers", lambda f, given=given: _over_peers(f, *given))  # type: ignore[misc]
        for what, limit, given in (
            (
                "decode after 8,192 tokens, 4-bit cache, over llama.cpp's smaller caches",
                1.0,
                ("context 8192", "haversack int4, 4-bit cache", 1.0, "llama.cpp Q4_0, q"),
            ),
            (
                "the same, 2-bit cache",
                1.0,
                ("context 8192", "haversack int4, 2-bit cache", 1.0, "llama.cpp Q4_0, q"),
            ),
        )
    ),
    Goal("time to first token, cold", "under 20 s", "decode", lambda f: _first_token(f, "cold", 20)),
    Goal("with the kernel cache", "under 1 s", "decode", lambda f: _first_token(f, "with the kernel cache", 1)),
    Goal(
        "a 1.1B model streamed under a 1 GiB tensor budget: peak",
        "within 5%",
        "streaming",
        lambda f: share_at_most(
            [_error(row) for one in f["rounds"] for row in one["bytes"] if row["what"].startswith("tensors at")], 0.05
        ),
    ),
    Goal(
        "its tokens per second, median of rounds",
        "within 25%",
        "streaming",
        lambda f: share_at_most([f["median_error"]], 0.25),
    ),
    Goal(
        "calibrating model A, from nothing to a plan, minutes",
        "under 5",
        "calibration",
        lambda rows: at_most([row["seconds"] / 60 for row in rows if row["model"] == "a"], 5),
    ),
    Goal(
        "calibrating a 1.1B shape, minutes",
        "under 30",
        "calibration",
        lambda rows: at_most([row["seconds"] / 60 for row in rows if row["model"] == "1.1B"], 30),
    ),
    *(
        Goal(
            f"processor time from a cold start: {case}",
            f"under {limit} s",
            "plan_time",
            lambda rows, case=case: next(  # type: ignore[misc]
                at_most([row["cpu_seconds"]], row["goal_seconds"]) for row in rows if row["case"] == case
            ),
        )
        for case, limit in GOAL_SECONDS.items()
    ),
    Goal(
        "random training settings: median error of the tensor peak",
        "at most 1%",
        "prediction",
        lambda f: share_at_most([f["summary"]["tensor_median"]], 0.01),
    ),
    Goal(
        "the same, 95th percentile",
        "at most 3%",
        "prediction",
        lambda f: share_at_most([f["summary"]["tensor_95th"]], 0.03),
    ),
    Goal(
        "process peak over the imports where the model takes three times them, 95th percentile",
        "at most 7%",
        "prediction",
        lambda f: share_at_most([f["summary"]["process_95th"]], 0.07),
    ),
    Goal(
        "decode steps of ten configurations: rank correlation with what was predicted",
        "at least 0.95",
        "decode_time",
        lambda f: at_least([f["summary"]["rank_correlation"]], 0.95),
    ),
    Goal(
        "the same, median error",
        "at most 20%",
        "decode_time",
        lambda f: share_at_most([f["summary"]["median_error"]], 0.2),
    ),
    Goal("published formulas", "exact", "published", _agreeing("formula", 1.0)),
    Goal("published runs of torch and transformers within 10%", "at least 80%", "published", _agreeing("torch", 0.8)),
    Goal(
        "two ranks that share their states (FSDP2), per rank",
        "within 5%",
        "fsdp",
        lambda rows: share_at_most([abs(row["error"]) for row in rows], 0.05),
    ),
    Goal(
        "whole models and linears at equal bytes: others' damage lower than ours",
        "never",
        "weights",
        _tied_or_best("minus_ours_95", "ours"),
    ),
    Goal(
        "packing a 1.1B shape by second-order feedback, minutes",
        "under 15",
        "packing",
        lambda f: at_most([f["seconds_of_the_whole"]["total"] / 60], 15),
    ),
    Goal(
        "its peak over the baseline, GiB",
        "under 3",
        "packing",
        lambda f: at_most([f["peak_bytes_over_baseline"] / 2**30], 3),
    ),
    Goal("caches at equal bytes: others' damage lower than ours", "never", "kv", _tied_or_best("minus_planner_95", "planner")),
    Goal(
        "peak of the cache during an 8,192-token prefill",
        "within 3%",
        "kv_prefill",
        lambda rows: share_at_most([abs(row["error"]) for row in rows], 0.03),
    ),
    Goal(
        "loss layer, 256,000 tokens: extra bytes over the logits'",
        "at most 1%",
        "loss",
        lambda f: share_at_most([f["share_of_logits"]], 0.01),
    ),
    Goal("its time over torch's", "at most 1.2", "loss", lambda f: at_most([f["ratio_of_fastest"]], 1.2)),
    *(
        Goal(
            f"whole step with {name} over torch's AdamW",
            f"at most {limit}",
            "optimizers",
            lambda f, name=name, limit=limit: at_most([f["rows"][name]["ratio_of_step_seconds"]], limit),  # type: ignore[misc]
        )
        for name, limit in (("adamw8bit", 1.1), ("galore", 1.25))
    ),
    *(
        Goal(f"{what} under three caps: lowest loss, or tied at 0.8 of the best other's peak", "all", name, _under_caps)
        for what, name in (("pre-training B's shape", "pretraining"), ("tuning A to a foreign text", "tuning"))
    ),
    Goal("recomputation: on or below torch's ways in peak and products", "all", "recomputation", _on_or_below),
    Goal(
        "runs killed at random moments and resumed: bit-equal",
        "all",
        "kills",
        lambda f: (f"{f['bit_equal_runs']} of {f['num_runs']} runs, {f['num_kills']} kills", f["bit_equal_runs"] == f["num_runs"]),
    ),
)  # fmt: skip


def readings() -> Iterator[tuple[Goal, Reading | None]]:
    """Every goal with what its benchmark's stored figures say; None where they don't say it yet."""
    for goal in GOALS:
        file = RESULTS / f"{goal.benchmark}.json"
        try:
            yield goal, goal.read(json.loads(file.read_text())["figures"])
        except (FileNotFoundError, KeyError, IndexError, StopIteration, ValueError, TypeError):
            yield goal, None
