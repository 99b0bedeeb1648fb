"""What `haversack plan` prints of a model whose cache is transformers' own: bytes as they are, and that nothing is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from haversack.cli import console
from haversack.cli.verdict import verdict_json, verdict_words
from haversack.units import format_bytes, format_count

if TYPE_CHECKING:
    from haversack.plan.question import Question


def print_native(question: Question, why: str, *, json: bool) -> int:
    """Print the answer; 0 if it fits, 1 if not."""
    from haversack.plan.native import native_answer

    answer = native_answer(question, why)
    model, workload = question.model, question.workload
    if json:
        console.print_json(
            {
                **verdict_json(
                    answer.ledger,
                    fits=answer.fits,
                    budget_bytes=question.budget_bytes,
                    budget_kind=question.budget_kind,
                    shortfall_bytes=answer.shortfall_bytes,
                    cheapest_change=answer.cheapest_change,
                ),
                "planned": False,
                "why": why,
            }
        )
        return 0 if answer.fits else 1
    verdict = verdict_words(fits=answer.fits, budget_bytes=question.budget_bytes, budget_kind=question.budget_kind)
    console.paragraph(
        f"{model.name}: {format_count(model.num_parameters)} parameters, {format_bytes(model.num_bytes)} as they are "
        f"({model.dtype})."
    )
    console.paragraph(
        f"{workload.users} x ({workload.prompt_tokens} prompt + {workload.generate_tokens} generated) tokens: "
        f"{verdict}, left to transformers as it is."
    )
    if not answer.fits:
        console.paragraph(
            f"{format_bytes(answer.shortfall_bytes)} short at {answer.peak[0]}. {answer.cheapest_change or ''}".rstrip()
        )
    typer.echo("")
    console.ledger_table(answer.ledger)
    typer.echo("")
    console.notes([f"nothing is planned or packed: {why}", "seconds and damage of such a model are unknown"])
    return 0 if answer.fits else 1
