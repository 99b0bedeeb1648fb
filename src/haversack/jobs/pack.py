"""Packing: the plan's options applied, streamed by checkpoint tensor, into a folder that transformers loads.

One site is in memory at a time: its matrix in float32, its statistics, and what it stores. Finished tensors stay in
`DIR.partial`; a pack that was interrupted goes on there, and the folder gets its name when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from haversack.cost.calibrated import Calibration, Packed
from haversack.describe.assemble import read_codes, read_parameter, read_site
from haversack.describe.checkpoint import Checkpoint, require_finite
from haversack.describe.model import Model
from haversack.engine.load import LAYOUTS
from haversack.engine.retune import Retuned, RetuneSettings, retune
from haversack.engine.site_statistics import Statistics
from haversack.errors import CheckpointError, InterruptedJobError, OutputError, PlanError
from haversack.formats.packed_folder import PackedFolder, PackedFolderWriter, PackedSite, partial_path, unfinished_plan
from haversack.formats.safetensors_file import explained
from haversack.jobs.interrupt import stoppable
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.plan.schema import Plan

Progress = Callable[[str, int, int], None]


def pack(
    model: Model,
    plan: Plan,
    output: str | Path,
    *,
    statistics: Statistics | None = None,
    retuned: Retuned | None = None,
    packed: Mapping[tuple[str, WeightOption], Packed] | None = None,
    progress: Progress | None = None,
) -> tuple[PackedFolder, tuple[str, ...]]:
    """Pack a described folder by a plan; the folder, and notes on what had to be changed at single sites. What `retuned` holds is
    written as it is (`retune_plan`), and so is what was `packed` already with these statistics, to measure plans.

    Raises PlanError if the plan was made for another model, OutputError if the output can't be written,
    InterruptedJobError on Ctrl-C (finished work is kept).
    """
    check_belongs(plan, model)
    assert model.folder is not None, "packing needs weights"
    checkpoint = Checkpoint.open(model.folder)
    options = {row.site: WeightOption.from_dict(row.option) for row in plan.weights}
    streamed = {row.site for row in plan.weights if row.placement["part"] == "streamed"}
    places = _places(plan)
    sites = {
        site.id: PackedSite(
            options[site.id].to_dict(),
            stored := options[site.id].stored(site.out_features, site.in_features, site.dtype),
            site.id in streamed,
            {
                t.name: place
                for t in stored
                if (place := places.get((site.id, options[site.id].block_of(t.name)))) is not None
            },
        )
        for site in model.weights
    }
    tell = progress or (lambda what, done, total: None)
    notes: list[str] = []
    writer = PackedFolderWriter(
        output, model.folder, plan_text=plan.to_json(), sites=sites, rest=model.rest, layouts=LAYOUTS
    )
    total = sum(site.num_parameters for site in model.weights)
    with writer, _begun_alike(writer, checkpoint, statistics, retuned), stoppable() as stopped:
        missing = set(writer.missing_sites)
        done = 0
        for site in model.weights:
            if site.id in missing:
                if stopped():
                    raise InterruptedJobError(
                        f"packing was interrupted with {done / total:.0%} done; the same command goes on from there.",
                        resume=str(writer.partial),
                    )
                weight = require_finite(read_site(checkpoint, site), site.id)
                option = options[site.id]
                if retuned is not None and site.id in retuned.tensors:
                    writer.write_site(site.id, retuned.tensors[site.id])
                elif option.is_neutral:
                    writer.write_site(site.id, {"weight": weight})
                elif packed is not None and (found := packed.get((site.id, option))) is not None:
                    writer.write_site(site.id, found.tensors)
                    notes += [f"{site.id}: {note}" for note in found.notes]
                else:
                    task = WeightTask(weight.float())
                    if statistics is not None and site.id in statistics:
                        task = statistics[site.id].task(task.weight)
                    if option.keeps_codes:
                        task.stored = read_codes(checkpoint, site)
                    writer.write_site(site.id, option.encode(task))
                    notes += [f"{site.id}: {note}" for note in task.notes]
            done += site.num_parameters
            tell("packing", done, total)
        for name in writer.missing_rest:
            if retuned is not None and name in retuned.rest:
                writer.write_rest(name, retuned.rest[name])
                continue
            module, _, parameter = name.rpartition(".")
            writer.write_rest(name, require_finite(read_parameter(checkpoint, model, module, parameter), name))
        return writer.finish(), tuple(notes)


def retune_plan(
    model: Model, plan: Plan, calibration: Calibration, epochs: int, progress: Progress | None = None
) -> Retuned:
    """What a plan packs, with scales and norms tuned together in `epochs` passes over the calibration's text: holds the whole model.

    Raises UsageError for epochs out of range, PlanError if the plan was made for another model.
    """
    check_belongs(plan, model)
    assert model.folder is not None, "packing needs weights"
    checkpoint, options = (
        Checkpoint.open(model.folder),
        {row.site: WeightOption.from_dict(row.option) for row in plan.weights},
    )
    settings, tell = RetuneSettings(epochs=epochs), progress or (lambda what, done, total: None)
    packed = {}
    for done, site in enumerate(model.weights):
        tell("packing", done, len(model.weights))
        option = options[site.id]
        if option.grid is not None and not option.keeps_codes:
            weight = require_finite(read_site(checkpoint, site), site.id).float()
            known = site.id in calibration.statistics
            task = calibration.statistics[site.id].task(weight) if known else WeightTask(weight)
            found = calibration.packed.get((site.id, option))
            packed[site.id] = (option, option.encode(task) if found is None else found.tensors)
    windows = calibration.windows
    return retune(model, packed, windows.calibration, windows.search, settings=settings, progress=tell)


def _places(plan: Plan) -> dict[tuple[str, int | None], int]:
    """Where in the order of all blocks each block (site, number) lies, of a folder that can be held at any size."""
    if plan.elastic is None:
        return {}
    held = {row.site: plan.elastic.floor_blocks for row in plan.weights}
    places: dict[tuple[str, int | None], int] = {}
    for place, block in enumerate(plan.elastic.blocks):
        places[block.site, held[block.site]] = place
        held[block.site] += 1
    return places


def check_belongs(plan: Plan, model: Model) -> None:
    """Raise PlanError unless a plan was made for this model and names its sites."""
    if plan.model.fingerprint != model.fingerprint:
        raise PlanError(
            f"the plan was made for {plan.model.name} ({plan.model.fingerprint[:12]}), but {model.name} is another model "
            f"({model.fingerprint[:12]}); make a plan for this one."
        )
    ours = [site.id for site in model.weights] + [site.id for site in model.attention]
    named = [row.site for row in plan.weights] + [row.site for row in plan.kv]
    if differing := sorted(set(ours) ^ set(named)) or (sorted(named) if len(named) != len(ours) else []):
        raise PlanError(
            f"the plan and {model.name} differ in their sites, first {differing[0]!r}; make a plan for this model."
        )


def check_packable(model: Model, *, trust_remote_code: bool = False) -> None:
    """Before minutes of work: can this family's attention be reached, and are the small tensors sound?

    Raises UnsupportedModelError by name, or CheckpointError. Takes 0.2 to 2 s.
    """
    from transformers import AutoConfig

    from haversack.engine.reach import check_reach

    assert model.folder is not None, "packing needs weights"
    check_reach(AutoConfig.from_pretrained(model.folder, trust_remote_code=trust_remote_code))
    checkpoint = Checkpoint.open(model.folder)
    for tensor in model.rest:
        module, _, parameter = tensor.name.rpartition(".")
        require_finite(read_parameter(checkpoint, model, module, parameter), tensor.name)


def unfinished(model: Model, output: str | Path) -> Plan | None:
    """The plan of an interrupted pack of this model into `output`, or None where nothing was begun.

    Raises OutputError for a partial folder that is another model's, or no pack's.
    """
    partial = partial_path(output)
    if not partial.exists():
        return None
    try:
        plan = Plan.from_json(unfinished_plan(output) or "")
    except PlanError:
        plan = None
    if plan is None or plan.model.fingerprint != model.fingerprint:
        raise OutputError(
            f"{partial} is not an unfinished pack of {model.name} that this version can go on with; "
            "remove it, or choose another output."
        )
    return plan


@contextmanager
def _begun_alike(
    writer: PackedFolderWriter, checkpoint: Checkpoint, statistics: Statistics | None, retuned: Retuned | None
) -> Iterator[None]:
    """Tensors of other weights, or packed with other statistics, must not mix: what a pack was begun from is noted in
    its partial folder. A damaged checkpoint leaves no partial folder, since a repaired one could not go on with it."""
    note = writer.partial / "source.journal"  # journals vanish when the folder is whole
    begun: dict[str, Any] = {
        "weights": checkpoint.fingerprint(),
        "calibration": statistics.folder.name if statistics else None,
    }
    if retuned is not None:
        begun["retuned"] = asdict(retuned.settings)
    facts = json.dumps(begun)
    with explained(note, len(facts)):
        if not note.exists():
            note.write_text(facts)
        elif note.read_text() != facts:
            raise OutputError(
                f"{writer.partial} was begun from other weights or another calibration; remove it to start over."
            )
    try:
        yield
    except CheckpointError:
        writer.discard()
        raise
