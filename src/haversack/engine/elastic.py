"""Folders whose sites come in blocks: how many of them a budget holds, and a loaded model that shrinks and grows in place.

The plan's `elastic` record lists all blocks in the order in which they are taken, each with the peak that a run has once it is
there (`plan/elastic.py`). Any number of the first of them is a model, to the bit the one that packing so many blocks makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from haversack.errors import DoesNotFitError, UsageError
from haversack.units import format_bytes, parse_budget

if TYPE_CHECKING:
    from pathlib import Path

    from haversack.engine.load import PackedModel
    from haversack.engine.packed_tensor import RowBlock


def blocks_within(plan: Mapping[str, Any], budget: str | int, where: str | Path) -> int:
    """How many blocks, from the first, a budget holds at the peak; all of them where it holds more.

    `budget` is bytes, or text as `--budget` takes it, and counts what the plan's own budget counted: the whole process, or our
    tensors. Raises UsageError for a folder that is not elastic, or nonsense; DoesNotFitError below the floor.
    """
    elastic = plan.get("elastic")
    if elastic is None:
        raise UsageError(
            f"{where} was packed at one size, so that no budget can be chosen; leave it out, or pack again with --elastic."
        )
    num_bytes = parse_budget(budget, _available_bytes() if "%" in str(budget) else 0)
    floor = elastic["floor_peak_bytes"]
    if num_bytes < floor:
        raise DoesNotFitError(
            f"{where} needs {format_bytes(floor)} at least, with no block beyond its floor, but the budget is "
            f"{format_bytes(num_bytes)}: {format_bytes(floor - num_bytes)} short; raise it, or pack for a shorter context.",
            budget_bytes=num_bytes,
            shortfall_bytes=floor - num_bytes,
        )
    return sum(block["peak_bytes"] <= num_bytes for block in elastic["blocks"])  # peaks never fall along the order


def held_within(plan: Mapping[str, Any], budget: str | int, where: str | Path) -> dict[str, int]:
    """Blocks of each site that a budget holds; as `blocks_within`."""
    return held_blocks(plan, blocks_within(plan, budget, where))


def held_blocks(plan: Mapping[str, Any], number: int) -> dict[str, int]:
    """Blocks of each site among the first `number` of all, those of the floor among them."""
    elastic = plan["elastic"]
    taken = Counter(block["site"] for block in elastic["blocks"][:number])
    return {row["site"]: elastic["floor_blocks"] + taken[row["site"]] for row in plan["weights"]}


def resize(model: Any, budget: str | int) -> int:
    """Let go of blocks, or read further ones from the folder, until a loaded model is as large as `budget` allows; the bytes
    of packed weights that it holds then.

    Only the blocks between both sizes move: nothing is loaded again, and caches of keys and values stay what they are. Raises as
    `blocks_within`, and UsageError for a model that no packed folder was loaded into. Compiled decode loops hold tensors of
    their own and must be opened again.
    """
    from haversack.engine.load import PackedModel as Loaded
    from haversack.engine.packed_tensor import packed_parameters, packed_tensors

    packed = getattr(model, "haversack", None)
    if not isinstance(packed, Loaded):
        raise UsageError(
            "this model was not loaded from a packed folder; load one that `haversack pack --elastic` wrote."
        )
    wanted = held_within(packed.plan, budget, packed.folder.path)
    before = packed.held or held_blocks(packed.plan, len(packed.plan["elastic"]["blocks"]))
    packed = replace(packed, held=wanted)
    changed = {site for site, number in wanted.items() if number != before[site]}
    for parameter in packed_parameters(model):
        parameter.blocks = tuple(
            _resized(block, packed) if block.matrix.site_id in changed else block for block in parameter.blocks
        )
    model.haversack = packed
    return sum(tensor.untyped_storage().nbytes() for tensor in packed_tensors(model))


def _resized(block: RowBlock, packed: PackedModel) -> RowBlock:
    """The rows with as many blocks of their site as are held now: what is missing is read, what is too much let go of."""
    from haversack.formats.tiers import read_resident

    site_id, present = block.matrix.site_id, block.matrix.tensors()
    wanted = packed.site_tensors(site_id)
    read = read_resident(tensor for name, tensor in wanted.items() if name not in present)
    tensors = {name: read[tensor.name] if tensor.name in read else present[name] for name, tensor in wanted.items()}
    matrix = replace(block.matrix, option=packed.option(site_id), tensors=lambda: tensors)
    return replace(block, matrix=matrix)


def _available_bytes() -> int:
    from haversack.describe import machine

    return machine.detect().available_bytes
