"""Verifying a packed folder: what was promised, hashed before anything loaded, against what a fresh process really took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haversack.errors import HaversackError, OutputError
from haversack.formats.output import write_whole
from haversack.formats.packed_folder import PLAN_NAME
from haversack.plan.schema import Plan
from haversack.units import format_bytes, format_rate, format_seconds

Progress = Callable[[str, int, int], None]
VERIFIED_NAME = "verified.json"


class VerifyError(HaversackError):
    """The measured run failed; the message holds its last line."""


def verify(folder: str | Path, *, quality: bool = True, progress: Progress | None = None) -> dict[str, Any]:
    """Run the planned workload in a fresh process; predicted against measured per resident and time point, what nobody owns, speed,
    kernels, and quality before and after where the unpacked model is still there. Leaves `verified.json` in the folder.

    Raises PlanError for a folder that is not packed or was edited, VerifyError if the run fails.
    """
    from haversack.engine.load import open_packed
    from haversack.jobs.run import check_packed

    folder = check_packed(folder).path
    packed = open_packed(folder)
    plan = Plan.from_json(packed.folder.plan_text, str(folder / PLAN_NAME))
    tell = progress or (lambda what, done, total: None)
    tell("running the workload", 0, 2)
    measured = _run_fresh(folder, "process")
    tell("running the workload", 1, 2)
    measured |= _run_fresh(folder, "tensors")
    tell("running the workload", 2, 2)
    rows = _byte_rows(plan, measured)
    seconds = _seconds(plan, measured)
    figures = _figures(seconds, measured, _disk_rates(plan, measured))
    notes = list(plan.notes)
    if quality:
        from haversack.jobs.quality import compare_quality

        try:
            figures += compare_quality(packed, plan, tell)
        except HaversackError as error:
            notes.append(f"quality was not measured: {error}".rstrip("."))
    budget = plan.budget.num_bytes
    peak = measured["peak_private_bytes"] if plan.budget.kind == "process" else max(measured["tensor_peaks"].values())
    report = {
        "folder": str(folder),
        "prediction_hash": plan.prediction_hash,
        "within_budget": budget is None or peak <= budget,
        "budget_bytes": budget,
        "peak_bytes": peak,
        "bytes": rows,
        "seconds": seconds,
        "figures": figures,
        "kernels": measured["kernels"],
        "notes": notes,
        "measured": measured,
    }
    try:
        write_whole(folder / VERIFIED_NAME, json.dumps(report, indent=1))
    except OutputError as error:
        report["notes"].append(f"the figures could not be kept: {error}".rstrip("."))
    return report


def _run_fresh(folder: Path, instrument: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "haversack.jobs.measured_run", instrument, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].rstrip(".")
        killed = f" (signal {-done.returncode})" if done.returncode < 0 else ""
        raise VerifyError(f"the measured run of {folder} failed{killed}: {last}.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _byte_rows(plan: Plan, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Residents, then tensor peaks by time point, then the process."""
    timeline = plan.prediction.timeline
    runtime = timeline["decode"].get("runtime", {}).get("device", 0)
    rows: list[dict[str, Any]] = []
    owners = timeline["decode"]
    for owner, found in measured["residents"].items():
        tier = "disk" if owner == "weights (mapped)" else "device"
        rows.append({"what": owner, "predicted": owners.get(owner, {}).get(tier, 0), "measured": found})
    for point, found in measured["tensor_peaks"].items():
        predicted = plan.ledger.total_bytes(point) - runtime
        rows.append({"what": f"tensors at {point}", "predicted": predicted, "measured": found})
    peak = measured["peak_private_bytes"]
    if runtime:
        rows.append({"what": "runtime", "predicted": runtime, "measured": measured["imported_private_bytes"]})
        rows.append({"what": "process peak (private)", "predicted": plan.prediction.peak_bytes, "measured": peak})
    else:
        rows.append({"what": "process peak (private)", "predicted": None, "measured": peak})
    owned = measured["imported_private_bytes"] + max(measured["tensor_peaks"].values())
    rows.append({"what": "unaccounted", "predicted": None, "measured": peak - owned})
    rows.append({"what": "file pages (evictable)", "predicted": None, "measured": measured["file_bytes"]})
    return rows


def _seconds(plan: Plan, measured: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of loading, reading the prompt and one step of decoding; what took no time that could be measured is None."""
    prediction = plan.prediction
    both = {
        "load": (prediction.load_seconds, measured["load_seconds"]),
        "prefill": (prediction.prefill_seconds, measured["prefill_seconds"]),
        "decode step": (prediction.seconds_per_token, measured["seconds_per_step"]),
    }
    return {what: {"predicted": predicted, "measured": found or None} for what, (predicted, found) in both.items()}


def _disk_rates(plan: Plan, measured: dict[str, Any]) -> tuple[float | None, float] | None:
    """Bytes/s of the disk as the plan took it and as the stream window found it; None where nothing was streamed."""
    found = measured["disk_read_bytes_per_second"]
    return (plan.machine.get("rates", {}).get("disk_read_bytes_per_second"), found) if found else None


def _figures(
    seconds: dict[str, dict[str, float | None]], measured: dict[str, Any], disk: tuple[float | None, float] | None
) -> list[dict[str, str]]:
    rows = [(what, _shown(row["predicted"]), _shown(row["measured"])) for what, row in seconds.items()]
    predicted, found = seconds["decode step"]["predicted"], seconds["decode step"]["measured"]
    tokens_per_step = measured["decode_tokens_per_second"] * (found or 0.0)
    rows += [
        ("tokens/s", format_rate(tokens_per_step / predicted) if predicted else "", format_rate(measured["decode_tokens_per_second"])),
        ("fraction of the bound", "1", f"{predicted / found:.2f}" if predicted and found else "-"),
    ]  # fmt: skip
    if disk is not None:
        predicted_rate, found_rate = (f"{format_bytes(rate)}/s" if rate else "-" for rate in disk)
        rows.append(("disk read", predicted_rate, found_rate))
    rows.append(("decode loop", "", measured["loop"]))
    rows += [("kernel " + kernel, "", "; ".join(grids)) for kernel, grids in measured["kernels"].items()]
    return [{"what": what, "predicted": predicted, "measured": found} for what, predicted, found in rows]


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)
