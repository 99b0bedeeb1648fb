"""Loading a packed folder into a transformers model: each site into its planned tier, the planned cache installed.

transformers loads what was not packed; this module does the rest. Resident tensors are read straight into private
memory, mapped ones stay pages of the file, streamed ones pass through a window that follows the layers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from haversack.describe.checkpoint import CheckpointTensor, torch_dtype
from haversack.describe.model import Model, describe_model
from haversack.describe.site import WeightSite
from haversack.describe.workload import ServeWorkload
from haversack.engine.attach import PackedSite, attach, fill_buffers, take_off
from haversack.engine.elastic import held_within
from haversack.engine.generation import install_kv_plan
from haversack.engine.kv_cache import KVPlan
from haversack.engine.packed_tensor import PackedMatrix
from haversack.engine.streaming import StreamWindow
from haversack.errors import PlanError
from haversack.formats.packed_folder import BUDGET_KEY, PLAN_NAME, PackedFolder
from haversack.formats.tiers import fill_resident, map_file, resident_room
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READER_STACK_BYTES = 256 << 10
"""Of the thread that reads: a stack of the usual size would count against a hard limit of memory."""

LAYOUTS = {"rows-v1": 1, "scales-v1": 1, "huffman-v1": 1}
"""Layouts of stored tensors that this version reads."""


@dataclass(frozen=True)
class PackedModel:
    """An opened packed folder with its model described: what loading needs, before a tensor is read."""

    folder: PackedFolder
    described: Model
    plan: Mapping[str, Any]
    held: Mapping[str, int] | None = None
    """Blocks of each site's stack that are held, where not all of them are (`engine/elastic.py`)."""

    @property
    def kv_plan(self) -> KVPlan:
        """The cache for the planned users and context."""
        by_site = {row["site"]: KVOption.from_dict(row["option"]) for row in self.plan["kv"]}
        workload = ServeWorkload.from_dict(self.plan["workload"])
        return KVPlan(
            sites=self.described.attention,
            options=tuple(by_site[site.id] for site in self.described.attention),
            batch_size=workload.users,
            capacity_tokens=workload.cache_tokens,
            dtype=self.described.dtype,
            prefill_chunk_tokens=self.plan["prefill_chunk_tokens"],
        )

    def placement(self, site_id: str) -> str:
        """ "resident", "mapped" or "streamed"."""
        return self._placements[site_id]

    def sites_in(self, mode: str) -> list[WeightSite]:
        """Weight sites that are "resident", "mapped" or "streamed"."""
        return [site for site in self.described.weights if self._placements[site.id] == mode]

    def option(self, site_id: str) -> WeightOption:
        """What represents a site: what was packed there, or as many of its blocks as are held."""
        packed = WeightOption.from_dict(self.folder.manifest.sites[site_id].option)
        return packed if self.held is None or packed.stack is None else packed.shortened(self.held[site_id])

    def site_tensors(self, site_id: str) -> dict[str, CheckpointTensor]:
        """Where a site's stored tensors lie, by the names that its option declares."""
        every = self.folder.site_tensors(site_id)
        if self.held is None:
            return every
        packed, held = WeightOption.from_dict(self.folder.manifest.sites[site_id].option), self.held.get(site_id, 0)
        blocks = {name: packed.block_of(name) for name in every}
        return {name: tensor for name, tensor in every.items() if (block := blocks[name]) is None or block < held}

    def tensors_of(self, sites: Iterable[WeightSite]) -> dict[str, Mapping[str, CheckpointTensor]]:
        """Where the stored tensors of each site lie, by name."""
        return {site.id: self.site_tensors(site.id) for site in sites}

    @cached_property
    def _placements(self) -> dict[str, str]:
        return {row["site"]: row["placement"]["part"] for row in self.plan["weights"]}


def open_packed(path: str | Path, budget: str | int | None = None) -> PackedModel:
    """Open and check a packed folder, as much of it as `budget` holds; only JSON and headers are read.

    Raises PlanError for a folder that is not packed or was edited, UsageError for a budget of one that is not elastic, and
    DoesNotFitError for a budget below its floor.
    """
    folder = PackedFolder.open(_local(path))
    folder.require_layouts(LAYOUTS)
    config = json.loads((folder.path / "config.json").read_text())
    for ours in ("quantization_config", BUDGET_KEY):
        config.pop(ours, None)
    described = describe_model(config)
    plan = json.loads(folder.plan_text)
    if {site.id for site in described.weights} != set(folder.manifest.sites):
        raise PlanError(
            f"{folder.path / PLAN_NAME} was made for another model: its sites are not those of config.json; pack again."
        )
    held = None if budget is None else held_within(plan, budget, folder.path)
    return PackedModel(folder, described, plan, held)


def _local(path: str | Path) -> Path:
    """The folder itself, or the snapshot of a hub id that transformers has just fetched."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path)))


def prepare(model: PreTrainedModel, packed: PackedModel) -> None:
    """Take packed parameters off a model on `meta`, so that transformers loads only the rest."""
    take_off(model, packed.described.weights)
    if any(site.expert is not None for site in packed.described.weights):
        model.set_experts_implementation("eager")  # experts one by one, each from its own packed matrix


@dataclass(frozen=True)
class Reading:
    """Stored tensors by their full names, which hold their values once `done` is."""

    room: dict[str, torch.Tensor]
    done: Future[None]

    def result(self) -> dict[str, torch.Tensor]:
        self.done.result()
        return self.room


def begin_reading(packed: PackedModel) -> Reading:
    """Start to read what will be resident, in a thread of its own: the system copies while transformers builds the model, which
    is Python. The 1.1B shape at 4 bits takes a quarter of loading's processor time to read. The room is made here, so that
    whoever watches this thread's allocations sees it."""
    wanted = _flat(packed.tensors_of(packed.sites_in("resident")))
    room = resident_room(wanted)
    before = threading.stack_size(READER_STACK_BYTES)
    try:
        pool = ThreadPoolExecutor(1, thread_name_prefix="haversack-reader")
        done = pool.submit(fill_resident, wanted, room)
    finally:
        threading.stack_size(before)
    pool.shutdown(wait=False)
    return Reading(room, done)


def finish(model: Any, packed: PackedModel, reading: Reading) -> Any:
    """Bring packed tensors into their tiers, put them on, and install the planned cache."""
    mapped, streamed = packed.sites_in("mapped"), packed.sites_in("streamed")
    stored = reading.result() | map_file(_flat(packed.tensors_of(mapped)))
    matrices = [
        _fixed(site, packed, {name: stored[tensor.name] for name, tensor in packed.site_tensors(site.id).items()})
        for site in (*packed.sites_in("resident"), *mapped)
    ]
    if streamed:
        matrices += _stream(model, packed, streamed, packed.tensors_of(streamed))
    attach(model, matrices, torch_dtype(packed.described.dtype))
    fill_buffers(model, packed.described.weights)
    install_kv_plan(model, packed.kv_plan)
    model.haversack = packed
    return model.eval()


def _flat(tensors: Mapping[str, Mapping[str, CheckpointTensor]]) -> list[CheckpointTensor]:
    return [tensor for of_site in tensors.values() for tensor in of_site.values()]


def _fixed(site: WeightSite, packed: PackedModel, tensors: Mapping[str, torch.Tensor]) -> PackedSite:
    option = packed.option(site.id)
    return PackedSite(site, PackedMatrix(site.id, option, site.out_features, site.in_features, lambda: tensors))


def _stream(
    model: Any,
    packed: PackedModel,
    sites: list[WeightSite],
    tensors: Mapping[str, Mapping[str, CheckpointTensor]],
) -> list[PackedSite]:
    """A window over the layers with streamed sites, acquired before a layer runs and released after."""
    layers = sorted({site.layer for site in sites if site.layer is not None})
    groups = [[t for site in sites if site.layer == layer for t in tensors[site.id].values()] for layer in layers]
    window = StreamWindow(groups)
    modules = {layer: _layer_module(model, packed.described, layer) for layer in layers}
    held: dict[int, dict[str, torch.Tensor]] = {}
    for index, layer in enumerate(layers):
        modules[layer].register_forward_pre_hook(_acquire(window, index, layer, held))
        modules[layer].register_forward_hook(_release(window, index, layer, held), always_call=True)
    model.haversack_window = window
    out = []
    for site in sites:
        assert site.layer is not None
        names = tuple((name, f"{site.id}.{name}") for name in tensors[site.id])
        option = packed.option(site.id)
        out.append(
            PackedSite(
                site, PackedMatrix(site.id, option, site.out_features, site.in_features, _view(held, site.layer, names))
            )
        )
    return out


def _acquire(window: StreamWindow, index: int, layer: int, held: dict[int, dict[str, torch.Tensor]]) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        held[layer] = window.acquire(index)

    return hook


def _release(window: StreamWindow, index: int, layer: int, held: dict[int, dict[str, torch.Tensor]]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        held.pop(layer, None)
        window.release(index)

    return hook


def _view(held: dict[int, dict[str, torch.Tensor]], layer: int, names: tuple[tuple[str, str], ...]) -> Any:
    def tensors() -> dict[str, torch.Tensor]:
        present = held[layer]
        return {name: present[full] for name, full in names}

    return tensors


def _layer_module(model: nn.Module, described: Model, layer: int) -> nn.Module:
    """The decoder layer that holds a layer's sites: the element of the module list of all layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == described.num_layers:
            return module[layer]
    raise PlanError(
        f"{described.name} keeps its layers in no list; streaming can't follow them, so place them resident."
    )
