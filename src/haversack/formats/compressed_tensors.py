"""A packed folder written in the compressed-tensors format, which plain transformers and vLLM load.

    integers under scales     pack-quantized: the same values; of b-bit codes with zero points, their differences from them in
                              b + 1 bits, since transformers 5.23 does not load packed zero points
    fp8, a scale per row      float-quantized: the same
    as is, or lossless codes  the 16-bit matrix
    anything else             what the caller asks for: 8-bit integers in groups of 128 of the matrix that the plan's option stands
                              for, rounded to nearest, or that matrix in the model's dtype

Only whole linears can be said: embeddings, parts of fused projections and stacks of experts are written in the model's dtype. The
layout is told in `describe/compressed_tensors.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.compressed_tensors import FLOAT, METHOD, PACK
from haversack.describe.site import WeightSite
from haversack.describe.words import MAX_BITS, num_words, pack_words
from haversack.formats.export import Change, Packed, integers_of, is_integer, whole_folder
from haversack.formats.output import write_synced
from haversack.formats.packed_folder import COPIED, MAX_SHARD_BYTES, REST_METADATA
from haversack.formats.safetensors_file import SafetensorsWriter, explained, read_pieces, shards
from haversack.ledger import StoredTensor
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding

if TYPE_CHECKING:
    import torch

NAME = "compressed-tensors"

_EIGHT_GROUPS = (128, 64)


@dataclass(frozen=True)
class _Said:
    """How one linear is written: the scheme of its weights in the config's words, and the option that it is encoded by (the
    plan's own, or another)."""

    option: WeightOption
    scheme: Mapping[str, Any]
    form: str
    is_own: bool


def write(
    packed: Packed, output: Path, *, otherwise_bits: int = 8, progress: Callable[[int, int], None] | None = None
) -> tuple[Change, ...]:
    """Write the folder; what had to be changed. Holds one checkpoint tensor at a time. Raises OutputError."""
    model, tell = packed.model, progress or (lambda done, total: None)
    said = {site.id: found for site in model.weights if (found := _said(packed, site, otherwise_bits)) is not None}
    dense_sites = [site for site in model.weights if site.id not in said]
    dense = packed.dense_tensors(dense_sites)
    declared = {site.id: _declared(site, said[site.id]) for site in model.weights if site.id in said}
    rest = packed.folder.rest_tensors()
    everything = [*dense.values(), *(t for tensors in declared.values() for t in tensors)]
    everything += [tensor.stored for tensor in rest.values()]
    files = shards(everything, MAX_SHARD_BYTES)
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]  # fmt: skip
    with whole_folder(output) as partial:
        writers = [
            SafetensorsWriter(partial / name, tensors, metadata=REST_METADATA)
            for name, tensors in zip(names, files, strict=True)
        ]
        of = {tensor.name: writer for writer, tensors in zip(writers, files, strict=True) for tensor in tensors}
        try:
            done, total = 0, len(said) + len(dense)
            for site in model.weights:
                if site.id not in said:
                    continue
                for name, value in _encoded(packed, site, said[site.id]).items():
                    full = f"{site.module}.{name}"
                    of[full].write(full, value)
                tell(done := done + 1, total)
            for name, tensor in dense.items():
                of[name].write(name, packed.dense_tensor(tensor, dense_sites))
                tell(done := done + 1, total)
            for name, span in rest.items():
                of[name].write_pieces(name, read_pieces(span))
        finally:
            for writer in writers:
                writer.close()
                writer.remove_journal()
        with explained(output, 0, resumable=False):
            _write_json(packed, partial, said, {n: of[n].path.name for n in of}, len(files) > 1)
    return tuple(_changes(packed, said))


def _said(packed: Packed, site: WeightSite, otherwise_bits: int) -> _Said | None:
    """How a site is written, or None where it is written whole in the model's dtype."""
    layout = packed.model.sources[f"{site.module}.{site.parameter}"]
    is_linear = site.role not in ("embedding", "position") and site.id == site.module and not site.tied_modules
    plain = is_linear and len(layout.blocks) == 1 and layout.blocks[0].axes == (0, 1)  # a Conv1D lies transposed
    option = packed.option(site)
    if not plain or (option.lossless and not option.keeps_codes):
        return None
    grid, alone = option.grid, not option.transforms and not option.corrections
    if alone and is_integer(grid) and site.in_features % (grid.group_size or 1) == 0:
        bits = grid.bits if _is_symmetric(option) else grid.bits + 1
        if bits <= MAX_BITS:
            return _Said(option, _integers(bits, grid.group_size), PACK, True)
    if alone and isinstance(grid, CodebookGrid) and (grid.values, grid.group_size, grid.scales) == ("fp8", 0, "f16"):
        return _Said(option, {**_integers(8, 0), "type": "float"}, FLOAT, True)
    if otherwise_bits == 16:
        return None
    group_size = next((n for n in _EIGHT_GROUPS if site.in_features % n == 0), 0)
    eight = WeightOption(grid=IntegerGrid(8, group_size), rounding=NearestRounding())
    return _Said(eight, _integers(8, group_size), PACK, False)


def _integers(bits: int, group_size: int) -> dict[str, Any]:
    """Weights in the config's words."""
    scheme: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    return (
        {**scheme, "strategy": "group", "group_size": group_size} if group_size else {**scheme, "strategy": "channel"}
    )


def _is_symmetric(option: WeightOption) -> bool:
    return not isinstance(option.grid, IntegerGrid) or option.grid.symmetric


def _declared(site: WeightSite, said: _Said) -> list[StoredTensor]:
    rows, columns, bits = site.out_features, site.in_features, said.scheme["num_bits"]
    groups = columns // said.scheme.get("group_size", columns)
    scales = StoredTensor("weight_scale", "F16", (rows, groups))
    if said.form == FLOAT:
        tensors = [StoredTensor("weight", "F8_E4M3", (rows, columns)), scales]
    else:
        tensors = [StoredTensor("weight_packed", "I32", (rows, num_words(columns, bits))), scales]
        tensors.append(StoredTensor("weight_shape", "I64", (2,)))
    return [tensor.prefixed(site.module) for tensor in tensors]


def _encoded(packed: Packed, site: WeightSite, said: _Said) -> dict[str, torch.Tensor]:
    """The tensors of one linear, named as declared, without its module."""
    import torch

    tensors = packed.tensors(site) if said.is_own else said.option.encode(WeightTask(packed.matrix(site)))
    if said.form == FLOAT:
        codes = tensors["codes"][:, : site.in_features].contiguous()  # of 8 bits, they are the values' own bits
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": tensors["scales"]}
    integers = integers_of(said.option, tensors, site.in_features)
    assert integers is not None
    bits = said.scheme["num_bits"]
    codes = integers.codes
    if not integers.symmetric:
        grouped = codes.unflatten(1, (integers.scales.shape[1], -1)).short()
        codes = (grouped - integers.zeros.unsqueeze(-1).short()).flatten(1).add_(1 << (bits - 1)).to(torch.uint8)
    return {
        "weight_packed": pack_words(codes, bits),
        "weight_scale": integers.scales,
        "weight_shape": torch.tensor(codes.shape),
    }


def _write_json(
    packed: Packed, folder: Path, said: Mapping[str, _Said], file_of: Mapping[str, str], is_sharded: bool
) -> None:
    for pattern in COPIED:
        for file in sorted(packed.folder.path.glob(pattern)):
            if file.is_file():
                target = folder / file.relative_to(packed.folder.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    if is_sharded:
        index = {"metadata": {}, "weight_map": dict(sorted(file_of.items()))}
        write_synced(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode() + b"\n")
    config = {**packed.config, "quantization_config": _quantization(packed, said)} if said else dict(packed.config)
    write_synced(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")


def _quantization(packed: Packed, said: Mapping[str, _Said]) -> dict[str, Any]:
    """`quantization_config`: sites of one scheme are a group, linears without one are ignored."""
    groups: dict[str, dict[str, Any]] = {}
    for site_id, how in said.items():
        key = json.dumps([how.scheme, how.form], sort_keys=True)
        empty: dict[str, Any] = {
            "targets": [],
            "weights": dict(how.scheme),
            "input_activations": None,
            "output_activations": None,
        }
        groups.setdefault(key, {**empty, "format": how.form})["targets"].append(site_id)
    forms = {how.form for how in said.values()}
    return {
        "quant_method": METHOD,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": [site.module for site in packed.model.weights if site.id not in said and site.role != "embedding"]
        + [name for site in packed.model.weights for name in site.tied_modules],
        "kv_cache_scheme": None,
    }


def _changes(packed: Packed, said: Mapping[str, _Said]) -> list[Change]:
    changes = []
    for site in packed.model.weights:
        option, how = packed.option(site), said.get(site.id)
        if how is None and not (option.lossless and not option.keeps_codes):
            changes.append(Change(site.id, option.label, f"its values in {site.dtype}"))
        elif how is not None and not how.is_own:
            changes.append(Change(site.id, option.label, f"its values in {how.option.grid.label}"))  # type: ignore[union-attr]
        elif how is not None and how.form == PACK and not _is_symmetric(option):
            changes.append(Change(site.id, option.label, f"the same values in {how.scheme['num_bits']} bits"))
        elif option.grid is not None and option.grid.activation_bits != 16:
            changes.append(Change(site.id, option.label, "the same, its inputs not rounded"))
        elif option.code is not None:
            changes.append(Change(site.id, option.label, f"its values in {site.dtype}, to the bit"))
    return changes
