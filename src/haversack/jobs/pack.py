"""Packing: the plan's options applied, streamed by checkpoint tensor, into a folder that transformers loads.

One site is in memory at a time: its matrix in float32, its statistics, and what it stores. Finished tensors stay in
`DIR.partial`; a pack that was interrupted goes on there, and the folder gets its name when it is whole.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from haversack.describe.assemble import read_parameter, read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model
from haversack.engine.calibrate import Statistics
from haversack.engine.load import LAYOUTS
from haversack.errors import CheckpointError, InterruptedJobError, PlanError
from haversack.formats.packed_folder import PackedFolder, PackedFolderWriter, PackedSite
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.plan.schema import Plan

Progress = Callable[[str, int, int], None]


def pack(
    model: Model,
    plan: Plan,
    output: str | Path,
    *,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> tuple[PackedFolder, tuple[str, ...]]:
    """Pack a described folder by a plan; the folder, and notes on what had to be changed at single sites.

    Raises PlanError if the plan was made for another model, OutputError if the output can't be written,
    InterruptedJobError on Ctrl-C (finished work is kept).
    """
    if plan.model.fingerprint != model.fingerprint:
        raise PlanError(
            f"the plan was made for {plan.model.name} ({plan.model.fingerprint[:12]}), but {model.name} is another model "
            f"({model.fingerprint[:12]}); make a plan for this one."
        )
    assert model.folder is not None, "packing needs weights"
    checkpoint = Checkpoint.open(model.folder)
    options = {row.site: WeightOption.from_dict(row.option) for row in plan.weights}
    sites = {
        site.id: PackedSite(
            options[site.id].to_dict(), options[site.id].stored(site.out_features, site.in_features, site.dtype)
        )
        for site in model.weights
    }
    tell = progress or (lambda what, done, total: None)
    notes: list[str] = []
    writer = PackedFolderWriter(
        output, model.folder, plan_text=plan.to_json(), sites=sites, rest=model.rest, layouts=LAYOUTS
    )
    total = sum(site.num_parameters for site in model.weights)
    with writer, _stoppable() as stopped:
        missing = set(writer.missing_sites)
        done = 0
        for site in model.weights:
            if site.id in missing:
                if stopped():
                    raise InterruptedJobError(
                        f"packing was interrupted with {done / total:.0%} done; the same command goes on from there.",
                        resume=str(writer.partial),
                    )
                weight = read_site(checkpoint, site)
                option = options[site.id]
                if option.is_neutral:
                    writer.write_site(site.id, {"weight": weight})
                else:
                    task = WeightTask(weight.float())
                    check_finite(site.id, task.weight)
                    if statistics is not None and site.id in statistics:
                        task.hessian = statistics[site.id].hessian
                    writer.write_site(site.id, option.encode(task))
                    notes += [f"{site.id}: {note}" for note in task.notes]
            done += site.num_parameters
            tell("packing", done, total)
        for name in writer.missing_rest:
            module, _, parameter = name.rpartition(".")
            writer.write_rest(name, read_parameter(checkpoint, model, module, parameter))
        return writer.finish(), tuple(notes)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError if a tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name} holds {count} values that are not finite, so no grid can represent it; repair or fetch the checkpoint."
        )


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the site in hand; a second one stops at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
