"""`haversack methods`: every part and recipe, with its source."""

from __future__ import annotations

import typer

from haversack.cli import console


def methods(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List every part and recipe with its source and what of the catalogue it makes true."""
    from haversack.recipes.base import list_methods

    rows = list_methods()
    if json:
        console.print_json(rows)
        return
    console.table(
        ("id", "kind", "resident", "what it does", "source"),
        [
            (
                row["id"],
                row["kind"],
                row["resident"],
                row["title"],
                f"{row['source']['authors'].split(',')[0].split(' and ')[0]} {row['source']['year']}"
                if row["source"]
                else "",
            )
            for row in rows
        ],
    )
