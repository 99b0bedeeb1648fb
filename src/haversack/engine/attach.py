"""Putting packed sites where a transformers model's parameters were.

Several sites may make one parameter (parts of a fused projection, experts of a stack); each gives its rows. Before
weights are loaded the parameters are taken off, so that transformers neither initialises nor looks for them; afterwards
they are put on in packed form. A tied parameter is put on every module that reads it, as one storage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from haversack.describe.site import WeightSite
from haversack.engine.packed_tensor import PackedMatrix, PackedStack, PackedTensor, RowBlock


@dataclass(frozen=True)
class PackedSite:
    """A site and its packed matrix."""

    site: WeightSite
    matrix: PackedMatrix


def take_off(model: nn.Module, sites: Sequence[WeightSite]) -> None:
    """Remove the parameters of `sites` (and of the modules tied to them) from a model on `meta`, and clear its ties.

    The modules, and those around them, are marked as initialised: transformers would fill parameters that are not there.
    """
    for site in sites:
        for name in (site.module, *site.tied_modules):
            model.get_submodule(name)._parameters[site.parameter] = None
            for path in _path_to(name):
                model.get_submodule(path)._is_hf_initialized = True  # type: ignore[assignment]
    if any(site.tied_modules for site in sites):
        clear_ties(model)


def fill_buffers(model: Any, sites: Sequence[WeightSite]) -> None:
    """Let transformers fill the non-persistent buffers of the modules that `take_off` marked; packed weights stay."""
    names = dict.fromkeys(
        path for site in sites for name in (site.module, *site.tied_modules) for path in _path_to(name)
    )
    for name in names:
        module = model.get_submodule(name)
        if any(buffer is not None for buffer in module._buffers.values()):
            with torch.no_grad():
                model._init_weights(module)


def _path_to(name: str) -> list[str]:
    """The module's path and those of all modules around it, the model itself too."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(len(pieces) + 1)]


def clear_ties(model: nn.Module) -> None:
    """Make transformers forget which weights are tied: the packed tensor is put on both modules by `attach`."""
    for module in model.modules():
        if getattr(module, "_tied_weights_keys", None):
            module._tied_weights_keys = {}  # type: ignore[assignment]
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {}  # type: ignore[assignment]


def attach(model: nn.Module, packed: Sequence[PackedSite], dtype: torch.dtype) -> None:
    """Put packed sites on the modules that use them. The sites of one parameter must all be given."""
    by_parameter: dict[tuple[str, str], list[PackedSite]] = defaultdict(list)
    for item in packed:
        by_parameter[item.site.module, item.site.parameter].append(item)
    for (module, parameter), items in by_parameter.items():
        tensor = _assemble(items, dtype)
        for name in (module, *items[0].site.tied_modules):
            packed_parameter = nn.Parameter(tensor, requires_grad=False)
            packed_parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # never filled by transformers
            model.get_submodule(name)._parameters[parameter] = packed_parameter


def _assemble(items: list[PackedSite], dtype: torch.dtype) -> torch.Tensor:
    if not items[0].site.module_slice.squeeze:
        return _matrix(items, dtype)
    by_expert: dict[int, list[PackedSite]] = defaultdict(list)
    for item in items:
        by_expert[item.site.module_slice.index[0][0]].append(item)
    assert sorted(by_expert) == list(range(len(by_expert))), "every expert of a stack is packed, or none"
    return PackedStack([_matrix(by_expert[expert], dtype) for expert in range(len(by_expert))])


def _matrix(items: list[PackedSite], dtype: torch.dtype) -> PackedTensor:
    blocks = [RowBlock(item.matrix, parameter_rows(item.site)) for item in items]
    blocks.sort(key=lambda block: (block.rows.start or 0, block.rows.step or 1))
    return PackedTensor(blocks, dtype=dtype, transposed=items[0].site.module_slice.transposed)


def parameter_rows(site: WeightSite) -> slice:
    """The rows `y = x W^T` of the module's matrix that a site provides."""
    cut = site.module_slice
    index = cut.index[1:] if cut.squeeze else cut.index
    dimension = 1 if cut.transposed else 0
    start, stop = index[dimension] if dimension < len(index) else (0, site.out_features * cut.row_step)
    return slice(start, stop, cut.row_step)
