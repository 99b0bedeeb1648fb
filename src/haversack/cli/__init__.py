"""The command line: one file per verb, all imports of heavy libraries inside the verbs."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> None:
    """Entry point of `haversack`. Exits 0, 1 (an answer or a failed job), 2 (wrong usage) or 130 (interrupted)."""
    from haversack.cli import lean
    from haversack.cli.app import run

    lean.is_own_process = True
    raise SystemExit(run(argv))
