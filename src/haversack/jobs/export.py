"""Exporting: a packed folder written for other tools, with what their layouts could not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from haversack.describe.hub import read_config
from haversack.describe.model import describe_model
from haversack.engine.load import LAYOUTS
from haversack.errors import UsageError
from haversack.formats import compressed_tensors, gguf
from haversack.formats.export import Change, Packed
from haversack.jobs.run import check_packed
from haversack.parts.kv.base import KVOption
from haversack.plan.schema import Plan

FORMATS = (compressed_tensors.NAME, gguf.NAME)
OTHERWISE_BITS = (8, 16)


@dataclass(frozen=True)
class Exported:
    """What was written, its bytes on disk, and what had to be changed, by site and for the whole."""

    path: Path
    num_bytes: int
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def export(
    source: str | Path,
    output: str | Path,
    form: str,
    *,
    otherwise_bits: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Write a packed folder as `form`; sites whose option it can't say get `otherwise_bits`.

    Raises PlanError for a folder that isn't packed, UnsupportedModelError for an architecture that the format doesn't have,
    OutputError if the output can't be written.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form!r} is not one of {', '.join(FORMATS)}.")
    if otherwise_bits not in OTHERWISE_BITS:
        raise UsageError(f"--otherwise {otherwise_bits} is not one of 8 and 16 bits.")
    packed = open_for_export(source)
    tell = None if progress is None else (lambda done, total: progress("exporting", done, total))
    path = Path(output)
    if form == gguf.NAME:
        changes, notes = gguf.write(packed, path, otherwise_bits=otherwise_bits, progress=tell)
        return Exported(path, path.stat().st_size, changes, (*notes, *_caches(packed)))
    changes = compressed_tensors.write(packed, path, otherwise_bits=otherwise_bits, progress=tell)
    return Exported(path, sum(file.stat().st_size for file in path.glob("*.safetensors")), changes, _caches(packed))


def open_for_export(source: str | Path) -> Packed:
    """A packed folder, opened and checked. Raises PlanError."""
    folder = check_packed(source)
    folder.require_layouts(LAYOUTS)
    config = read_config(folder.path / "config.json")
    config.pop("quantization_config", None)
    return Packed(folder, describe_model(config), config)


def _caches(packed: Packed) -> tuple[str, ...]:
    """What no weights' format says: caches, and where things lie while the model runs."""
    plan = Plan.from_json(packed.folder.plan_text)
    notes = []
    if changed := [row.site for row in plan.kv if not KVOption.from_dict(row.option).is_neutral]:
        notes.append(
            f"caches are not said: {len(changed)} layers, first {changed[0]}, keep theirs in the engine's own form"
        )
    if moved := [row.site for row in plan.weights if row.placement["part"] != "resident"]:
        notes.append(
            f"where weights lie is not said: {len(moved)} sites, first {moved[0]}, lie where the engine puts them"
        )
    return tuple(notes)
