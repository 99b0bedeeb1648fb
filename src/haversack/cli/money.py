"""What `haversack plan` says of time and money: operators and what each waits for, dollars per million tokens, cheapest machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.cli import console
from haversack.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from haversack.cost.roofline import Operator
    from haversack.describe.model import Model


def price_line(machine: str, prices: Path | None, seconds_per_token: float | None) -> str:
    """Dollars per million tokens, or why that is unknown."""
    from haversack.describe.prices import read_prices

    price = read_prices(prices).get(machine.lower())
    if price is None:
        return f"unknown: nobody priced {machine} (--prices FILE)"
    if not seconds_per_token:
        return f"unknown: ${price.dollars_per_hour:g} an hour, but its speed is unknown"
    return f"${price.per_million(seconds_per_token):.3g} at ${price.dollars_per_hour:g} an hour ({price.source})"


def operators_json(operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """What `--json` gives of them."""
    return [
        {
            "time_point": operator.point,
            "operator": operator.name,
            "bytes": round(operator.num_bytes),
            "flops": operator.flops,
            "seconds": operator.seconds,
            "bottleneck": operator.bottleneck,
        }
        for operator in operators
    ]


def print_operators(operators: Sequence[Operator]) -> None:
    """A row per time point and operator."""
    rows = [
        (
            operator.point,
            operator.name,
            format_bytes(round(operator.num_bytes)),
            f"{operator.flops:.3g}",
            format_seconds(operator.seconds) if operator.seconds is not None else "unknown",
            operator.bottleneck,
        )
        for operator in operators
    ]
    console.table(("at", "operator", "bytes", "flops", "at least", "waits for"), rows, right=(2, 3, 4))


def fleet_verb(model: Model, mix: Sequence[str], prices: Path | None, *, json: bool) -> int:
    """Print the cheapest machines for a mix of requests; 0 if there are any."""
    from haversack.describe.prices import read_prices
    from haversack.plan.fleet import parse_mix, plan_fleet

    answer = plan_fleet(model, parse_mix(mix), read_prices(prices))
    fleet = answer.fleet
    if json:
        console.print_json(
            {
                "machines": None if fleet is None else dict(fleet.counts),
                "dollars_per_hour": None if fleet is None else fleet.dollars_per_hour,
                "shares": None if fleet is None else fleet.shares,
                "loads": answer.loads,
                "left_out": answer.left_out,
            }
        )
        return 0 if fleet is not None else 1
    if fleet is None:
        console.paragraph(f"{model.name}: no priced machine serves all of these requests from its own memory.")
    else:
        counted = ", ".join(f"{count} x {name}" for name, count in fleet.counts.items())
        console.paragraph(f"{model.name}: {counted}, ${fleet.dollars_per_hour:.4g} an hour together.")
        rows = [
            (kind, name, f"{share:.0%}", f"{answer.loads[kind][name] * share:.3g}")
            for kind, row in fleet.shares.items()
            for name, share in row.items()
        ]
        console.table(("prompt+answer", "machine", "of the requests", "machines' time"), rows, right=(2, 3))
    notes = ["rates are the roofline's, at most; each machine holds the model as it is"]
    console.notes([*notes, *(f"{name} is left out: {why}" for name, why in answer.left_out.items())])
    return 0 if fleet is not None else 1
