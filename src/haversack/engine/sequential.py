"""Layers in order, each with the statistics of inputs that come from the layers already packed.

Errors of earlier layers reach later ones through their inputs; statistics taken there let a rounding make up for part
of them (Frantar et al. 2022, arXiv 2210.17323, section 4, "true sequential": within a layer too).

Memory and disk: as in calibration's forward pass, with hidden states of two layers on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from haversack.describe.site import WeightSite
from haversack.engine.calibrate import check_token_ids
from haversack.engine.hidden_states import HiddenStates
from haversack.engine.layers import StreamedModel, matrix_view
from haversack.engine.moments import (
    PooledMoment,
    batches,
    collect_moments,
    enough_tokens,
    moment_rounds,
    rare_expert_note,
    shared_products,
    trace_inputs,
    watched_parameters,
)
from haversack.engine.observe import ProductKey


@dataclass(frozen=True)
class LayerVisit:
    """Some sites of one materialised layer, and the second moment of each one's current input.

    Change the layer through `replace` (or by putting other modules into `module`) before asking for the next visit.
    `hessians` and `notes` are by site id; sites whose product was never seen are in `sites` without a hessian.
    """

    layer: int
    module: nn.Module
    sites: tuple[WeightSite, ...]
    hessians: Mapping[str, torch.Tensor]
    notes: Mapping[str, str]
    model: StreamedModel

    def weight(self, site: WeightSite) -> torch.Tensor:
        """The site's matrix `(out, in)`, a float32 copy."""
        return self._view(site).to(torch.float32, copy=True).contiguous()

    def replace(self, site: WeightSite, matrix: torch.Tensor) -> None:
        """Let the layer compute with `matrix` `(out, in)` from now on, rounded to the compute dtype."""
        self._view(site).copy_(matrix)

    def _view(self, site: WeightSite) -> torch.Tensor:
        parameter = self.model.module.get_parameter(f"{site.module}.{site.parameter}")
        return matrix_view(parameter, site.module_slice)


def sequential_layers(
    model: StreamedModel,
    token_ids: torch.Tensor,
    *,
    scratch: str | Path,
    within_layer: bool = True,
    batch_tokens: int = 4096,
    statistics_bytes: int = 4 * 2**30,
) -> Iterator[LayerVisit]:
    """Visit the sites of every layer in order; what a visit changed shapes all later inputs.

    With `within_layer` the sites that share an input are one visit (query, key and value; output; gate and up; down),
    each with statistics after the visits before it: 2.2 instead of 1 forward passes for a Llama. Otherwise a layer is
    one visit, or several where `statistics_bytes` of second moments don't hold all.

    `scratch` holds the hidden states. A folder that a killed run left goes on at the layer it had reached (the first
    visit's `layer`): name it by everything that decides how layers are replaced. It is removed at the end.
    """
    check_token_ids(token_ids, model.described)
    folder = Path(scratch)
    num_sequences, num_tokens = token_ids.shape
    parts = batches(num_sequences, max(1, batch_tokens // num_tokens))
    states = HiddenStates(folder, num_tokens, model.described.hidden_size, model.compute_dtype)
    reached = [int(name.removeprefix("hidden-")) for name in states.finished()]
    if not reached:
        with torch.no_grad(), model.before_layers() as embed:
            hidden = states.create("hidden-0", num_sequences)
            for part in parts:
                hidden[part] = embed(token_ids[part])
        states.finish("hidden-0")
    for layer in range(max(reached, default=0), model.num_layers):
        hidden = states.open(f"hidden-{layer}", num_sequences)
        with model.layer(layer) as module:
            yield from _visits(model, layer, module, hidden, parts, within_layer, statistics_bytes)
            after = states.create(f"hidden-{layer + 1}", num_sequences)
            with torch.no_grad():
                for part in parts:
                    after[part] = model.run_layer(layer, hidden[part])
        states.finish(f"hidden-{layer + 1}")
        states.remove(f"hidden-{layer}")
    shutil.rmtree(folder)


def _visits(
    model: StreamedModel,
    layer: int,
    module: nn.Module,
    hidden: torch.Tensor,
    parts: list[slice],
    within_layer: bool,
    statistics_bytes: int,
) -> Iterator[LayerVisit]:
    watched = watched_parameters(model, layer)
    sharing = trace_inputs(model, layer, watched, hidden[:1])
    groups = {group[0]: group for group in shared_products(sharing, watched)}
    sites_of: dict[ProductKey, list[WeightSite]] = {}
    for site in model.layer_sites(layer):
        key = ProductKey(f"{site.module}.{site.parameter}", -1 if site.expert is None else site.expert)
        sites_of.setdefault(key, []).append(site)
    pools: dict[str, PooledMoment] = {}
    for keys in moment_rounds(sharing, watched, statistics_bytes, one_input_each=within_layer):
        last = next(iter(keys)) if len(keys) == 1 else None
        inputs = ((part, hidden[part]) for part in parts)
        moments = collect_moments(model, layer, watched, keys, inputs, None, stop_after=last)
        visited: list[WeightSite] = []
        hessians: dict[str, torch.Tensor] = {}
        notes: dict[str, str] = {}
        means = {key: (moment.mean(), moment.num_tokens) for key, moment in moments.items()}
        for key in means:
            if key.expert >= 0:
                pools.setdefault(key.parameter, PooledMoment()).add(*means[key])
        for owner in sorted(keys):
            mean: torch.Tensor | None = means[owner][0] if owner in means else None
            seen = means[owner][1] if owner in means else 0
            note = ""
            pool = pools.get(owner.parameter)
            if pool is not None and pool.sum is not None and seen < enough_tokens(pool.sum.shape[0]):
                note = rare_expert_note(owner.expert, seen, enough_tokens(pool.sum.shape[0]))
                mean = pool.mean()
            for site in (site for key in groups[owner] for site in sites_of.get(key, ())):
                visited.append(site)
                if mean is not None:
                    hessians[site.id] = mean
                if note:
                    notes[site.id] = note
        yield LayerVisit(layer, module, tuple(visited), hessians, notes, model)
    seen_parameters = {name for names in sharing.members.values() for name in names}
    unseen = tuple(s for s in model.layer_sites(layer) if f"{s.module}.{s.parameter}" not in seen_parameters)
    if unseen:
        yield LayerVisit(layer, module, unseen, {}, {}, model)
