"""What calibration knows of each weight site, and the files that it lies in, one or more per layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.layers import site_rows
from haversack.engine.moments import PooledMoment, enough_tokens, rare_expert_note
from haversack.engine.observe import ProductKey, SecondMoment
from haversack.parts.weights.base import WeightTask

HEAD, LOOKUP = "head", "lookup"
"""Names of the files that belong to no layer."""

ATTENDED = "attended"
"""In the names of files with moments of tokens that count by the attention they get."""


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration knows of one site: pairs of `hessian` `(in, in)` and `row_importance` `(out,)`, float32.

    A tied embedding has two pairs: as head, and as lookup. `notes` says what was substituted.
    """

    site_id: str
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    notes: tuple[str, ...] = ()
    attended: torch.Tensor | None = None
    """As `hessian`, of tokens that count by the attention they get; where that was collected, and within layers."""

    def damage(self, change: torch.Tensor) -> float:
        """Estimated nats per token of adding `change` `(out, in)` to the matrix: a proxy, see the module's formula."""
        change = change.float()
        return sum(0.5 * float(((change @ h) * change).sum(1) @ importance) for h, importance in self.pairs)

    @property
    def hessian(self) -> torch.Tensor:
        """One `(in, in)` matrix for a rounding: the only pair's, or the pairs' sum weighted by mean row importance."""
        if len(self.pairs) == 1:
            return self.pairs[0][0]
        return torch.stack([h * importance.mean() for h, importance in self.pairs]).sum(0)

    def task(self, weight: torch.Tensor) -> WeightTask:
        """The working state that packs `weight` `(out, in)`, float32, with these statistics."""
        return WeightTask(weight, self.hessian, attended=self.attended)

    @property
    def row_importance(self) -> torch.Tensor:
        """`(out,)`: the sum over pairs, each weighted by its mean diagonal of `hessian`, over the sum's."""
        if len(self.pairs) == 1:
            return self.pairs[0][1]
        traces = torch.stack([h.diagonal().mean() for h, _ in self.pairs])
        rows = torch.stack([importance for _, importance in self.pairs])
        return (traces[:, None] * rows).sum(0) / traces.sum().clamp_min(1e-30)


class Statistics(Mapping[str, SiteStatistics]):
    """Statistics by site id, read from the cache folder one site at a time. Sites that no product reached are
    absent."""

    def __init__(self, folder: Path, described: Model):
        self.folder = folder
        self._sites = {site.id: site for site in described.weights}
        self._files = _Files(folder)
        self._present = [site.id for site in described.weights if self._keys_of(site)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present)

    def __len__(self) -> int:
        return len(self._present)

    def __getitem__(self, site_id: str) -> SiteStatistics:
        site = self._sites[site_id]
        notes: list[str] = []
        pairs = []
        for file, key in self._keys_of(site):
            hessian, importance, note = self._files.read(file, key)
            if importance.ndim == 2:  # a layer's: the site's rows, corrected by how its tokens act together
                squares, together = importance[:, site_rows(site)]
                importance = squares * (together.sum() / squares.sum().clamp_min(1e-30))
            pairs.append((hessian, importance))
            if note:
                notes.append(note)
        if not pairs:
            raise KeyError(site_id)
        found = SiteStatistics(site_id, tuple(pairs), tuple(notes))
        return replace(found, attended=self._attended(site, found.hessian)) if self.has_attended else found

    @property
    def unobserved(self) -> tuple[str, ...]:
        """Sites without statistics."""
        return tuple(site_id for site_id in self._sites if site_id not in set(self._present))

    @property
    def has_attended(self) -> bool:
        """Whether moments of tokens that count by the attention they get were collected."""
        return (self.folder / f"{ATTENDED}.json").exists()

    def _attended(self, site: WeightSite, otherwise: torch.Tensor) -> torch.Tensor:
        name = f"{layer_file(site.layer)}.{ATTENDED}" if site.layer is not None else ""
        keys = [key for _, key in self._keys_of(site) if name and self._files.has(name, key)]
        return self._files.moment(name, keys[0])[0] if keys else otherwise

    def _keys_of(self, site: WeightSite) -> list[tuple[str, ProductKey]]:
        key = ProductKey(f"{site.module}.{site.parameter}", -1 if site.expert is None else site.expert)
        files = [layer_file(site.layer)] if site.layer is not None else [HEAD, LOOKUP]
        return [(file, key) for file in files if self._files.has(file, key)]


class MomentWriter:
    """Saves means of `x x^T`, one file per round, and an index of products once all are there."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._places: dict[ProductKey, tuple[str, str]] = {}
        self._num_tokens: dict[ProductKey, int] = {}
        self._pools: dict[str, PooledMoment] = {}
        self._num_files = 0

    def add(self, moments: Mapping[ProductKey, SecondMoment]) -> None:
        tensors = {}
        for key, moment in moments.items():
            mean = moment.mean()
            if key.expert >= 0:
                self._pools.setdefault(key.parameter, PooledMoment()).add(mean, moment.num_tokens)
            tensors[text_of(key)] = mean
            self._num_tokens[key] = moment.num_tokens
        self._write(tensors)

    def finish(self, groups: list[list[ProductKey]]) -> None:
        """Write the index of these groups of products, each of which reads the moment of its first."""
        pooled: dict[str, torch.Tensor] = {}
        index: dict[str, list[Any]] = {}
        for owner, *others in groups:
            note = ""
            pool = self._pools.get(owner.parameter)
            if pool is not None and pool.sum is not None:
                enough, seen = enough_tokens(pool.sum.shape[0]), self._num_tokens.get(owner, 0)
                if seen < enough:
                    note = rare_expert_note(owner.expert, seen, enough)
                    pooled[owner.parameter] = pool.sum
                    self._places[owner] = (f"{self._name}.moments-{self._num_files}", owner.parameter)
            for key in (owner, *others):
                index[text_of(key)] = [*self._places[owner], note]
        if pooled:
            self._write({name: self._pools[name].mean() for name in pooled})
        write_text(self._folder / f"{self._name}.moments.json", json.dumps(index))

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        name = f"{self._name}.moments-{self._num_files}"
        save_tensors(self._folder / f"{name}.safetensors", tensors)
        self._places |= {_key(text): (name, text) for text in tensors}
        self._num_files += 1


class _Files:
    """The cache folder's files, by layer (or head, or lookup) and product."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._indexes: dict[str, dict[str, list[Any]]] = {}

    def has(self, name: str, key: ProductKey) -> bool:
        return text_of(key) in self._index(name)

    def read(self, name: str, key: ProductKey) -> tuple[torch.Tensor, torch.Tensor, str]:
        hessian, note = self.moment(name, key)
        with safe_open(self._folder / f"{name}.importance.safetensors", "pt") as opened:
            if text_of(key) in opened.keys():  # noqa: SIM118 (not a dict)
                return hessian, opened.get_tensor(text_of(key)), note
            others = [n for n in opened.keys() if n.startswith(f"{key.parameter}#")]  # noqa: SIM118
            unreached = f"expert {key.expert} saw no gradient: the mean over experts stands in"
            importance = torch.stack([opened.get_tensor(n) for n in others]).mean(0)
        return hessian, importance, "; ".join(filter(None, [note, unreached]))

    def moment(self, name: str, key: ProductKey) -> tuple[torch.Tensor, str]:
        file, tensor, note = self._index(name)[text_of(key)]
        with safe_open(self._folder / f"{file}.safetensors", "pt") as opened:
            return opened.get_tensor(tensor), note

    def _index(self, name: str) -> dict[str, list[Any]]:
        if name not in self._indexes:
            file = self._folder / f"{name}.moments.json"
            self._indexes[name] = json.loads(file.read_text()) if file.exists() else {}
        return self._indexes[name]


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    part = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(file)


def write_text(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def text_of(key: ProductKey) -> str:
    return key.parameter if key.expert < 0 else f"{key.parameter}#{key.expert}"


def _key(text: str) -> ProductKey:
    name, _, expert = text.partition("#")
    return ProductKey(name, int(expert) if expert else -1)


def layer_file(layer: int) -> str:
    return f"layer-{layer:04d}"
