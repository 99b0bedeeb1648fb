"""Decoding and prefill of the 1.1B Llama shape with random weights: this project's beside other tools', in processes that take turns.

Contenders are ours at 4 bits, with activations as they are and rounded to 8 bits; llama.cpp Q4_0 and Q4_K_M, OpenVINO int4 (both round
activations to 8 bits too), torchao int4 and transformers in bfloat16: tokens/s of one and of eight sequences with 64 tokens before them, a
prefill of 512 tokens, and one sequence after 8,192 tokens with smaller caches. What rounding activations loses is measured on reference model A
(`benchmarks.activation_bits`) and stands beside. The processes of a case
are all open at once; in every round each takes one turn, in an order that moves by one from round to round. A figure is the median over rounds of
a turn's median step (or its prefill), a ratio the median over rounds of ours over theirs in the same round, with the least and the most.

    python -m benchmarks.decode_peers [--cases NAME ...] [--only CONTENDER ...] [--rounds 7] [--threads 2] [--prepare]

Finished cases are kept: a run that was stopped goes on with the next. A contender that fails is a row that says so. `--prepare` makes what takes
minutes (models in every format, llama.cpp's long caches) and times nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import activation_bits, peer
from benchmarks.decode import SHAPE, pack_model
from benchmarks.finished_rows import FOLDER, FinishedRows
from benchmarks.results_file import busy_share, write_results
from benchmarks.streaming import CONFIG, make_model

Settings = Mapping[str, Any]

CONTENDERS: dict[str, tuple[str, Settings]] = {
    "haversack int4": ("haversack", {"cache": "16"}),
    "haversack int4, 8-bit activations": ("haversack", {"cache": "16", "activation_bits": 8}),
    "haversack int4, 4-bit cache": ("haversack", {"cache": "4"}),
    "haversack int4, 2-bit cache": ("haversack", {"cache": "2"}),
    "llama.cpp Q4_0": ("llama_cpp", {"format": "Q4_0", "kv": "f16", "flash_attention": True}),
    "llama.cpp Q4_K_M": ("llama_cpp", {"format": "Q4_K_M", "kv": "f16", "flash_attention": True}),
    "OpenVINO int4": ("openvino", {"format": "int4"}),
    "torchao int4": ("torchao", {"format": "int4"}),
    "transformers bf16": ("transformers", {}),
    "llama.cpp Q4_0, q8_0 cache": ("llama_cpp", {"format": "Q4_0", "kv": "q8_0", "flash_attention": True}),
    "llama.cpp Q4_0, q4_0 cache": ("llama_cpp", {"format": "Q4_0", "kv": "q4_0", "flash_attention": True}),
}
"""Name -> peer and settings."""

CASES: dict[str, Settings] = {
    "batch 1": {"batch": 1, "context": 64, "prefill": 512, "tokens": 24},
    "batch 8": {"batch": 8, "context": 64, "prefill": 0, "tokens": 12},
    "context 8192": {"batch": 1, "context": 8192, "prefill": 0, "tokens": 16},
}

OURS = ("haversack int4", "haversack int4, 8-bit activations")
SHORT = ("llama.cpp Q4_0", "llama.cpp Q4_K_M", "OpenVINO int4", "torchao int4", "transformers bf16")
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "batch 1": (OURS, SHORT),
    "batch 8": (OURS, SHORT),
    "context 8192": (
        ("haversack int4", "haversack int4, 4-bit cache", "haversack int4, 2-bit cache"),
        ("llama.cpp Q4_0", "llama.cpp Q4_0, q8_0 cache", "llama.cpp Q4_0, q4_0 cache"),
    ),
}
"""Ours and theirs, by case."""

GOALS = {"batch 1": 1.3, "batch 8": 1.2, "prefill": 1.0, "context 8192": 1.0}
"""Ours over the fastest of theirs, at least; prefill also twice llama.cpp."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make models and long caches, time nothing")
    arguments = parser.parse_args()
    rows = FinishedRows("decode_peers")
    figures: list[dict[str, Any]] = []
    for case in arguments.cases:
        names = [name for names in RUNS[case] for name in names if name in arguments.only]
        if arguments.prepare:
            take_turns(case, names, rounds=0, num_threads=arguments.threads)
            continue
        prints = {name: [peer.fingerprint(CONTENDERS[name][0]), dict(CONTENDERS[name][1])] for name in names}
        key = [case, dict(CASES[case]), prints, SHAPE, arguments.rounds, arguments.threads]
        figures += rows.get(key, lambda case=case, names=names: compare(case, names, arguments))  # type: ignore[misc]
    if not arguments.prepare:
        lost = activation_bits.losses(rows)
        tables = [table(figures, arguments.threads), losses_table(lost)]
        print(write_results("decode_peers", [*figures, {"case": "activations", "losses": lost}], tables=tables))


def compare(case: str, names: Sequence[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per contender and measure of a case."""
    answers = take_turns(case, names, rounds=arguments.rounds, num_threads=arguments.threads)
    busy, ours = round(busy_share(), 2), [name for name in RUNS[case][0] if name in names]
    found = []
    for measure in ("decode", "prefill") if CASES[case]["prefill"] else ("decode",):
        rates = {name: _rates(of, case, measure) for name, of in answers.items() if not isinstance(of, str)}
        for name in names:
            row: dict[str, Any] = {"case": case if measure == "decode" else measure, "contender": name, "busy": busy}
            row["settings"] = {**CASES[case], **CONTENDERS[name][1]}
            answer = answers[name]
            if isinstance(answer, str):
                found.append({**row, "failed": answer})
                continue
            row |= {k: answer[0][k] for k in ("versions", "weight_bytes")}
            row |= {"tokens_per_second": statistics.median(rates[name]), "by_round": rates[name]}
            if name not in ours:
                row["ours_over_it"] = {own: _paired(rates[own], rates[name]) for own in ours if own in rates}
            found.append(row)
    return found


def take_turns(
    case: str, names: Sequence[str], *, rounds: int, num_threads: int
) -> dict[str, list[dict[str, Any]] | str]:
    """Per contender its answers by round, after a turn that is not counted; or what it said when it failed."""
    found: dict[str, list[dict[str, Any]] | str] = {name: [] for name in names}
    with ExitStack() as stack:
        processes: dict[str, peer.PeerProcess] = {}

        def turn(name: str, *, counts: bool) -> None:
            if isinstance(found[name], str):
                return
            started = time.monotonic()
            try:
                if name not in processes:
                    process = peer.PeerProcess(CONTENDERS[name][0], num_threads=num_threads)
                    processes[name] = stack.enter_context(process)
                answer = processes[name].ask(request(name, case, rounds + 1, num_threads))
            except peer.PeerError as error:
                found[name] = str(error).split(" at {")[0]  # not the request, which names this machine's paths
                print(f"{case}: {name} failed: {error}", flush=True)
                return
            if counts:
                found[name].append(answer)  # type: ignore[union-attr]
            else:
                print(f"{case}: {name} is ready after {time.monotonic() - started:.0f} s", flush=True)

        for name in names:
            turn(name, counts=False)
        for number in range(rounds):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                turn(name, counts=True)
            done = {name: of[-1] for name, of in found.items() if not isinstance(of, str)}
            steps = {name: 1e3 * statistics.median(answer["step_seconds"]) for name, answer in done.items()}
            said = ", ".join(f"{name} {step:.1f}" for name, step in steps.items())
            print(f"{case}, round {number + 1}, ms per step: {said}", flush=True)
    return found


def request(name: str, case: str, turns: int, num_threads: int) -> dict[str, Any]:
    """One turn of a contender."""
    source = make_model(Path("build/llama-1b"), CONFIG).resolve()
    bits = CONTENDERS[name][1].get("activation_bits", 16)
    return {
        "task": "speed",
        "model": str(source),
        "packed": str(pack_model(Path("build/decode-1b"), bits).resolve()),
        "folder": str(FOLDER.resolve()),
        "config": {**CONFIG, "rope_theta": dict(CONFIG["rope_parameters"])["rope_theta"]},  # type: ignore[call-overload]
        "num_threads": num_threads,
        "settings": {**CASES[case], "turns": turns, **CONTENDERS[name][1]},
    }


def _rates(answers: list[dict[str, Any]], case: str, measure: str) -> list[float]:
    """Tokens/s by round."""
    if measure == "prefill":
        return [CASES[case]["prefill"] / answer["prefill_seconds"][0] for answer in answers]
    return [CASES[case]["batch"] / statistics.median(answer["step_seconds"]) for answer in answers]


def _paired(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def table(figures: list[dict[str, Any]], num_threads: int) -> dict[str, Any]:
    """What the documentation shows."""
    rows = []
    for row in figures:
        if "failed" in row:
            rows.append([row["case"], row["contender"], "failed", "", row["failed"].splitlines()[-1][:80], ""])
            continue
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        over = "; ".join(
            f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
            for ratio in row.get("ours_over_it", {}).values()
        )
        rate, gigabytes = f"{row['tokens_per_second']:.1f}", f"{row['weight_bytes'] / 1e9:.3f}"
        rows.append([row["case"], row["contender"], rate, over, gigabytes, versions])
    columns = ["case", "contender", "tokens/s", "ours over it", "weights, GB", "versions"]
    return {"title": f"1.1B Llama shape, {num_threads} threads", "columns": columns, "rows": rows}


def losses_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """KL by bits of activations."""
    shown = []
    for row in rows:
        low, high = row.get("over_16_bits_95", (0.0, 0.0))
        over = f"{low:+.5f} to {high:+.5f}" if "over_16_bits_95" in row else ""
        shown.append([str(row["activation_bits"]), row["option"], row["kernel"], f"{row['kl']:.5f}", over])
    columns = ["bits of activations", "weights", "kernel of a prefill", "KL, nats per token", "less 16 bits', 95%"]
    return {"title": "What rounding activations loses: reference model A", "columns": columns, "rows": shown}


if __name__ == "__main__":
    main()
