"""The page: a plan, and what was measured where `verify` left it, as one self-contained HTML file."""

from __future__ import annotations

import html
import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from haversack.errors import OutputError, PlanError
from haversack.formats.output import write_whole
from haversack.formats.packed_folder import PLAN_NAME
from haversack.jobs.verify import VERIFIED_NAME
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.plan.schema import DamageRecord, Plan
from haversack.report.charts import Bar, FrontPoint, SiteCell, pareto, site_map, stacked_bars, stand_alone
from haversack.units import format_bytes, format_count, format_seconds

LIGHT = {
    "ink": "#1b1f24", "quiet": "#5c6670", "paper": "#ffffff", "line": "#d9dee3", "accent": "#b3261e",
    "c0": "#2f6f9f", "c1": "#d98a29", "c2": "#5b9a5b", "c3": "#9a5fa8", "c4": "#7a8691", "c5": "#c0504d", "c6": "#4aa3a2", "c7": "#8a6d3b",
}  # fmt: skip
DARK = {
    "ink": "#e6e9ec", "quiet": "#9aa5b0", "paper": "#14181c", "line": "#2f3740", "accent": "#ff8a80",
    "c0": "#6fb1e0", "c1": "#e8aa5c", "c2": "#86c386", "c3": "#c596d1", "c4": "#9aa5b0", "c5": "#e08683", "c6": "#7ccac9", "c7": "#c2a672",
}  # fmt: skip
"""Colours of the page's variables on light and on dark paper."""

FEW_SITES = 60
"""So many sites are listed at once; a longer list waits behind a click."""

KV_ROLE = "cache"


def write_report(source: str | Path, output: str | Path) -> Path:
    """Write the page for a packed folder or a plan file. Raises PlanError (no plan there), OutputError (can't write)."""
    source, output = Path(source), Path(output)
    folder = source if source.is_dir() else None
    if not source.exists():
        raise PlanError(f"there is no {str(source)!r}; name a folder that `haversack pack` wrote, or a plan file.")
    if folder and not (folder / PLAN_NAME).is_file():
        raise PlanError(f"{source} has no {PLAN_NAME}, so it is not packed; run `haversack pack` first.")
    plan = Plan.read(source / PLAN_NAME if folder else source)
    if output.exists() and output.samefile(source):
        raise OutputError(f"{output} is the plan itself; choose another output.")
    measured = _measured(folder, plan) if folder else None
    write_whole(output, render(plan, measured, str(source), folder=folder is not None))
    return output


def memory_picture(plan: Plan) -> str:
    """The page's first picture as an SVG file of its own, legend included, in the light colours."""
    bars, owners = _bars(plan)
    return stand_alone(stacked_bars(bars, owners, plan.budget.num_bytes), owners, LIGHT)


def _measured(folder: Path, plan: Plan) -> dict[str, Any] | None:
    """What `verify` left. Raises PlanError where it was edited, or measured another plan."""
    file = folder / VERIFIED_NAME
    if not file.exists():
        return None
    try:
        measured = json.loads(file.read_text())
        _measured_rows(measured), _measured_figures(measured), _kernels(measured)
        if measured["prediction_hash"] == plan.prediction_hash:
            return measured
        found = "was measured of another plan"
    except (ValueError, LookupError, TypeError, AttributeError):
        found = "is not what `haversack verify` wrote"
    raise PlanError(f"{file} {found}; run `haversack verify {folder}` again, or remove the file.")


def render(plan: Plan, measured: dict[str, Any] | None, source: str, *, folder: bool = True) -> str:
    """The page as text; `folder` says whether `source` is a packed folder or only a plan."""
    import jinja2

    template = resources.files("haversack.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    bars, owners = _bars(plan)
    budget = plan.budget.num_bytes
    return environment.from_string(template).render(
        budget=bool(budget),
        title=f"{Path(plan.model.name).name or plan.model.name}, {'packed' if folder else 'a plan'}",
        lead=_lead(plan),
        light=LIGHT,
        dark=DARK,
        owners=owners,
        memory_svg=stacked_bars(bars, owners, budget),
        summary=_summary(plan),
        sites_svg=site_map(_cells(plan)),
        front_svg=pareto(_front(plan), budget) if plan.front else "",
        measured=_measured_rows(measured),
        figures=_measured_figures(measured),
        kernels=_kernels(measured),
        mixes=_mixes(plan),
        choices=_choices(plan),
        few_sites=len(plan.weights) + len(plan.kv) <= FEW_SITES,
        folder=folder,
        source=source,
        notes=[_with_code(note.rstrip(".")) for note in plan.notes],
        commands=_commands(plan, source, folder),
        plan_json=plan.to_json(),
    )


def _with_code(sentence: str) -> str:
    """A sentence as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(sentence))


def _lead(plan: Plan) -> str:
    workload, budget = plan.workload, plan.budget
    size = f"a {budget.kind} budget of {format_bytes(budget.num_bytes)}" if budget.num_bytes else "the fewest bytes"
    return (
        f"{plan.model.architecture}, {format_count(plan.model.num_parameters)} parameters, in {size}, for "
        f"{workload['users']} x ({workload['prompt_tokens']:,} prompt + {workload['generate_tokens']:,} generated) tokens. "
        f"Prediction {plan.prediction_hash[:16]}."
    )


def _bars(plan: Plan) -> tuple[list[Bar], list[str]]:
    """For each time point: everything at 16 bits and resident, and this plan."""
    neutral_weights = sum(row.neutral_bytes for row in plan.weights)
    neutral_kv = sum(row.neutral_bytes for row in plan.kv)
    bars, owners = [], []
    for point in plan.prediction.timeline:
        after = plan.ledger.owners_at(point)
        before = {k: v for k, v in after.items() if not k.startswith(("weights", "kv"))}
        before = {"weights": neutral_weights, **({"kv": neutral_kv} if point != "load" else {}), **before}
        bars += [Bar(point, "16 bits", before), Bar(point, "plan", after)]
        owners += [*after, *before]
    return bars, list(dict.fromkeys(owners))


def _summary(plan: Plan) -> list[tuple[str, str]]:
    prediction = plan.prediction
    stored = sum(row.stored_bytes for row in plan.weights)
    neutral = sum(row.neutral_bytes for row in plan.weights)
    kv_stored, kv_neutral = sum(r.stored_bytes for r in plan.kv), sum(r.neutral_bytes for r in plan.kv)
    damage = prediction.damage
    if damage.nats is None:
        lost = "unknown" + (f"; at least {damage.low:.3g} nats per token from what was published" if damage.low else "")
    else:
        lost = f"{damage.nats:.4g} nats per token, {damage.label}" if damage.nats else "none: everything stays as it is"
        if damage.low is not None and damage.high is not None and damage.low < damage.high:
            lost += f", {damage.low:.3g} to {damage.high:.3g}"
    return [
        ("peak", f"{format_bytes(prediction.peak_bytes)} at {prediction.peak_time_point}"),
        ("weights", f"{format_bytes(stored)} of {format_bytes(neutral)} ({stored / max(1, neutral):.1%})"),
        (
            "keys and values",
            f"{format_bytes(kv_stored)} of {format_bytes(kv_neutral)} ({kv_stored / max(1, kv_neutral):.1%})",
        ),
        ("damage", lost + (f" ({damage.source})" if damage.source else "")),
        *_probes(damage),
        ("decode", f"{format_seconds(prediction.seconds_per_token)} per step by the machine's rates"),
        (
            "solver",
            f"{plan.solve.method}; {plan.solve.num_choices:,} choices at {plan.solve.num_groups:,} places"
            + (f"; {plan.solve.evaluations} whole plans measured" if plan.solve.evaluations else ""),
        ),
    ]


def _probes(damage: DamageRecord) -> list[tuple[str, str]]:
    """What each kind of probe loses, the worst first."""
    if not damage.probes:
        return []
    ordered = sorted(damage.probes.items(), key=lambda item: -item[1])
    said = [f"{kind} {nats:.4g}" for kind, nats in ordered]
    return [("probes", f"{', '.join(said)} nats per answer token; the plan is judged by the worst")]


def _cells(plan: Plan) -> list[SiteCell]:
    cells: dict[tuple[int | None, str], list[Any]] = {}
    for row in plan.weights:
        cells.setdefault((row.layer, row.role), []).append(row)
    out = []
    for (layer, role), rows in cells.items():
        bits = sum(r.stored_bytes for r in rows) * 8 / sum(r.num_parameters for r in rows)
        names = ", ".join(dict.fromkeys(WeightOption.from_dict(r.option).label for r in rows))
        out.append(SiteCell(layer, role, bits, f"{rows[0].site}: {bits:.2f} bits per weight, {names}; {rows[0].why}"))
    for kv in plan.kv:
        bits = 16 * kv.stored_bytes / max(1, kv.neutral_bytes)
        label = KVOption.from_dict(kv.option).label
        out.append(SiteCell(kv.layer, KV_ROLE, bits, f"{kv.site}: {bits:.2f} bits per number, {label}; {kv.why}"))
    return out


def _front(plan: Plan) -> list[FrontPoint]:
    points = [FrontPoint(p["peak_bytes"], p["damage"], p["kind"], p["label"]) for p in plan.front]
    if plan.prediction.damage.nats:
        points.append(FrontPoint(plan.prediction.peak_bytes, plan.prediction.damage.nats, "chosen", "this plan"))
    return points


def _measured_rows(measured: dict[str, Any] | None) -> list[tuple[str, str, str, str]]:
    rows = []
    for row in (measured or {}).get("bytes", ()):
        predicted, found = row["predicted"], row["measured"]
        gap = "" if predicted is None or found is None else f"{found - predicted:+,} B"
        rows.append(
            (
                row["what"],
                "" if predicted is None else format_bytes(predicted),
                "" if found is None else format_bytes(found),
                "equal" if gap and found == predicted else gap,
            )
        )
    return rows


def _measured_figures(measured: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Seconds and quality; kernels have a list of their own."""
    figures = (measured or {}).get("figures", ())
    return [
        (row["what"], row["predicted"], row["measured"]) for row in figures if not row["what"].startswith("kernel ")
    ]


def _kernels(measured: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [(name, ", ".join(formats)) for name, formats in (measured or {}).get("kernels", {}).items()]


def _mixes(plan: Plan) -> list[tuple[str, str, str, str, str, str]]:
    """What each role got: one row per role, option and placement, with the layers it was chosen for."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for weight in plan.weights:
        label = WeightOption.from_dict(weight.option).label
        groups.setdefault((weight.role, label, weight.placement["part"]), []).append(weight)
    for kv in plan.kv:
        groups.setdefault((KV_ROLE, KVOption.from_dict(kv.option).label, "keys and values"), []).append(kv)
    out = []
    for (role, label, where), rows in groups.items():
        stored, neutral = sum(row.stored_bytes for row in rows), sum(row.neutral_bytes for row in rows)
        out.append((role, label, where, _layers(rows), format_bytes(stored), f"{stored / max(1, neutral):.0%}"))
    order = {role: n for n, role in enumerate(dict.fromkeys(row[0] for row in out))}
    return sorted(out, key=lambda row: order[row[0]])


def _layers(rows: list[Any]) -> str:
    """`0-3, 7`; empty for what lies in no layer."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _choices(plan: Plan) -> list[tuple[str, str, str, str, str, str, str]]:
    rows = []
    for weight in plan.weights:
        label, where = WeightOption.from_dict(weight.option).label, weight.placement["part"]
        rows.append((weight.site, label, where, *_cost(weight)))
    for kv in plan.kv:
        rows.append((kv.site, KVOption.from_dict(kv.option).label, "keys and values", *_cost(kv)))
    return rows


def _cost(row: Any) -> tuple[str, str, str, str]:
    damage = "unknown" if row.damage is None else f"{row.damage:.2g}"
    return format_bytes(row.stored_bytes), f"{row.stored_bytes / max(1, row.neutral_bytes):.0%}", damage, row.why


def _commands(plan: Plan, source: str, folder: bool) -> str:
    workload = plan.workload
    flag = "--budget" if plan.budget.kind == "process" else "--tensor-budget"
    limit = f"{flag} {plan.budget.num_bytes}" if plan.budget.num_bytes else f"--max-damage {plan.budget.max_damage}"
    lengths = f"--prompt-tokens {workload['prompt_tokens']} --generate-tokens {workload['generate_tokens']}"
    users = f" --users {workload['users']}" if workload["users"] != 1 else ""
    model = shlex.quote(plan.model.source)
    if not folder:
        return f"haversack pack {model} --plan {shlex.quote(source)} -o DIR\nhaversack verify DIR"
    quoted = shlex.quote(source)
    return (
        f"haversack pack {model} {limit} {lengths}{users} -o DIR\n"
        f"haversack verify {quoted}\nhaversack report {quoted} -o report.html"
    )
