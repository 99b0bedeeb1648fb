"""Serving as the solver's problem: time points, accounts, and what the run holds whatever is chosen.

Time points on the device tier: *load*, *prefill* (its largest chunk), *decode*. Fixed at each: the runtime (the process
after its imports; not counted in a tensor budget), the unpacked rest and the buffers. Accounts: resident weights, keys and values, one
account per layer in the stream window, and one per place of the forward pass that runs at a time: what lives there
plus the workspace there; the largest of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from haversack.cost.candidates import KVCandidate, Serving, SharedCosts, WeightCandidate, WeightCandidates
from haversack.cost.dropped import caches_of_dropped, dropped_together
from haversack.describe.checkpoint import CheckpointTensor
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.streaming import PAGE_BYTES, window_tensors
from haversack.formats.packed_folder import MAX_SHARD_BYTES, REST_METADATA, PackedSite, packed_files
from haversack.formats.safetensors_file import ALIGNMENT_BYTES, layout, total_file_bytes
from haversack.ledger import DTYPE_BYTES, Ledger, StoredTensor, total_bytes
from haversack.solve.problem import Choice, Group, PeakTerm, Problem, TimePoint

WEIGHTS, KV, MAPPED, GENERATION = "weights", "kv", "weights (mapped)", "generation"
REST_FILE = "file of the rest"
"""What transformers maps of the file of what is not packed, beside the tensors that it reads there."""

PREFILL, DECODE, WINDOW, STREAMED = "prefill at site", "decode at site", "window of layer", "streamed at site"
"""What a site's choices book on beside what all share: accounts of the site's own, or of its layer's."""

STREAM_BUFFERS = 2

GENERATION_ODDS_BYTES = 16 << 10
"""Scalars, rotary tables being made, flags of finished sequences: 5 to 8 KiB were seen on models of 0.1 to 14 million
parameters; 64-byte alignment makes it hard to say exactly."""

RUN_MARGIN_BYTES = 2 * PAGE_BYTES
"""The most that a stretch of a file takes in a window beside its own bytes: its first and last page."""


@dataclass(frozen=True)
class ServingProblem:
    """A problem with the candidates behind its choices: `weights[site id][choice id]`, `kv[layer][choice id]`."""

    serving: Serving
    problem: Problem
    weights: Mapping[str, WeightCandidates]
    kv: Mapping[str, Mapping[str, KVCandidate]]
    fixed: Mapping[str, int]
    kinds: tuple[str, ...] = ()
    """Probes that damages are of, beside text: positions 1 and on of every choice's damage."""

    def candidates(self, chosen: Mapping[str, str]) -> tuple[list[WeightCandidate], list[KVCandidate]]:
        """The candidates behind a solution (group id -> choice id)."""
        weights = [row[chosen[group]] for group, row in self.weights.items()]
        kv = [row[chosen[group]] for group, row in self.kv.items()]
        return weights, kv

    def ledger(self, chosen: Mapping[str, str]) -> Ledger:
        """Bytes by time point, resident and tier under a solution: the solver's to the byte, but for the stream window, whose
        exact bytes (pages, alignment) are at most what the solver booked."""
        weights, kv = self.candidates(chosen)
        ledger = Ledger()
        resident = sum(c.stored_bytes for c in weights if c.placement.mode == "resident")
        mapped = sum(c.stored_bytes for c in weights if c.placement.mode == "mapped")
        streamed = sum(c.stored_bytes for c in weights if c.placement.mode == "streamed")
        window = total_bytes(stream_window(self.serving.model, weights)) if streamed else 0
        for point in ("load", "prefill", "decode"):
            for owner, num_bytes in self.fixed.items():
                if point != "load" or owner != GENERATION:
                    ledger.add(point, owner, "device", num_bytes)
            ledger.add(point, WEIGHTS, "device", resident)
            if mapped:
                ledger.add(point, MAPPED, "disk", mapped)
            if window:
                ledger.add(point, "weights (stream window)", "device", window)
                ledger.add(point, "weights (streamed)", "disk", streamed)
            if point == "load":
                ledger.add(point, "activations", "device", self.serving.base_bytes(point))
            else:
                ledger.add(point, KV, "device", sum(c.stored_bytes for c in kv))
                for candidate in kv:
                    for tier, num_bytes in candidate.elsewhere_bytes.items():
                        ledger.add(point, KV, tier, num_bytes)
                base = self.serving.base_bytes(point)
                running = max([base, *(getattr(c, f"{point}_bytes") for c in (*weights, *kv))])
                ledger.add(point, "activations", "device", base)
                ledger.add(point, "workspace", "device", running - base)
        return ledger


def serving_problem(
    serving: Serving,
    weights: Sequence[WeightCandidates],
    kv: Sequence[Sequence[KVCandidate]],
    *,
    budget_bytes: int | None,
    runtime_bytes: int,
    max_damage: float | None = None,
    max_seconds: float | None = None,
) -> ServingProblem:
    """The problem of choosing one candidate per site within `budget_bytes` on the device tier (None: not limited)."""
    groups: list[Group] = []
    kv_rows: dict[str, dict[str, KVCandidate]] = {}
    layers: set[int] = set()
    streamed: list[str] = []
    margin = _buffer_margin_bytes(weights)
    running: dict[str, list[str]] = {"prefill": ["prefill base"], "decode": ["decode base"]}
    kinds = tuple(dict.fromkeys(kind for row in kv for c in row for kind, _ in c.damage.probes))
    choices: dict[tuple[SharedCosts, int, int], tuple[Choice, ...]] = {}
    for row in weights:
        site = row.site
        for point in running:
            running[point].append(f"{point} {site.id}")
        if site.layer is not None and row.shared.streams:
            layers.add(site.layer)
            streamed.append(f"streamed {site.id}")
        alike = (row.shared, row.prefill_bytes, row.decode_bytes)
        if alike not in choices:
            choices[alike] = tuple(_weight_choice(c, margin, kinds) for c in row.values())
        groups.append(Group(site.id, choices[alike], site.role, _own_accounts(site)))
    for kv_row in kv:
        kv_site = kv_row[0].site
        kv_rows[kv_site.id] = {c.id: c for c in kv_row}
        for point in running:
            running[point].append(f"{point} {kv_site.id}")
        groups.append(Group(kv_site.id, tuple(_kv_choice(c, kinds) for c in kv_row), kind="kv"))
    base = {f"{point} base": serving.base_bytes(point) for point in running}
    groups.append(Group("activations", (Choice("as traced", account_bytes=base),)))

    fixed = {
        "runtime": runtime_bytes,
        "rest": total_bytes(serving.model.held_rest) + total_bytes(serving.model.buffers),
        REST_FILE: rest_file_bytes(serving.model),
        GENERATION: generation_bytes(serving),
    }
    window = PeakTerm(tuple(f"window {layer}" for layer in sorted(layers)), STREAM_BUFFERS)
    windows = (window, PeakTerm(tuple(streamed), STREAM_BUFFERS)) if layers else ()
    fixed_bytes = sum(fixed.values())
    load_bytes = fixed_bytes - fixed[GENERATION] + serving.base_bytes("load")
    points = [TimePoint("load", "device", (WEIGHTS,), windows, load_bytes)]
    for point, accounts in running.items():
        points.append(TimePoint(point, "device", (WEIGHTS, KV), (*windows, PeakTerm(tuple(accounts))), fixed_bytes))
    problem = Problem(
        tuple(groups),
        tuple(points),
        {} if budget_bytes is None else {"device": budget_bytes},
        (*dropped_together(weights), *caches_of_dropped(weights, kv)),
        max_seconds=max_seconds,
        max_damage=max_damage,
    )
    weight_rows = {row.site.id: row for row in weights}
    return ServingProblem(serving, problem, weight_rows, kv_rows, {k: v for k, v in fixed.items() if v}, kinds)


def rest_file_bytes(model: Model) -> int:
    """Of the file of what is not packed, its header and the tensors that are held apart from it: the whole of it stays mapped, and torch's
    allocator reports it."""
    held_there = total_bytes(tensor for tensor in model.rest if tensor.name not in model.widened)
    return total_file_bytes(model.rest, REST_METADATA) - held_there


def generation_bytes(serving: Serving) -> int:
    """What `generate` itself keeps beside the model: token ids, mask and positions (int64, with a copy while one is
    extended); the logits of the chunk before, if the prompt is cut; and odds and ends. Scores in float32 live where no pass
    runs, or are part of a step (`Serving.base_bytes`)."""
    workload, model = serving.workload, serving.model
    per_user = 4 * 8 * workload.context_tokens
    if serving.prefill.new_tokens < workload.prompt_tokens:
        per_user += model.vocab_size * DTYPE_BYTES[model.dtype]
    return workload.users * per_user + GENERATION_ODDS_BYTES


def stream_window(model: Model, weights: Sequence[WeightCandidate]) -> tuple[StoredTensor, ...]:
    """The buffers of the stream window, from the layout of the files that packing will write."""
    sites = {
        c.site.id: PackedSite(
            {}, c.option.stored(c.site.out_features, c.site.in_features, c.site.dtype), c.placement.mode == "streamed"
        )
        for c in weights
    }
    spans: dict[str, CheckpointTensor] = {}
    for name, tensors in packed_files(sites, model.rest).items():
        spans |= layout(Path(name), tensors)[0]
    groups: dict[int, list[CheckpointTensor]] = {}
    for c in weights:
        if c.placement.mode == "streamed":
            assert c.site.layer is not None
            names = [f"{c.site.id}.{tensor.name}" for tensor in sites[c.site.id].stored]
            groups.setdefault(c.site.layer, []).extend(spans[name] for name in names)
    return window_tensors([groups[layer] for layer in sorted(groups)], STREAM_BUFFERS)


def _buffer_margin_bytes(weights: Sequence[WeightCandidates]) -> int:
    """What a buffer of the window takes beside its layer's tensors: a page to align it, and the first and last page of
    each file that the layer is cut over. Streamed sites lie first and in order, so that it is cut by shards alone."""
    by_layer: dict[int | None, int] = {}
    for row in weights:
        layer = row.site.layer
        by_layer[layer] = by_layer.get(layer, 0) + row.shared.most_stored_bytes
    cuts = 0 if sum(by_layer.values()) <= MAX_SHARD_BYTES else 1 + max(by_layer.values()) // MAX_SHARD_BYTES
    return PAGE_BYTES + (1 + cuts) * RUN_MARGIN_BYTES


def _weight_choice(c: WeightCandidate, buffer_margin_bytes: int, kinds: Sequence[str]) -> Choice:
    """The same for all sites of these costs; what it books on, `_own_accounts` names."""
    accounts = {PREFILL: c.prefill_bytes, DECODE: c.decode_bytes}
    if c.placement.mode == "resident":
        accounts[WEIGHTS] = c.stored_bytes
    elif c.placement.mode == "streamed":
        stored = c.option.stored(c.site.out_features, c.site.in_features, c.site.dtype)
        apart = sum(tensor.num_bytes % ALIGNMENT_BYTES > 0 for tensor in stored)  # files put these behind the others
        accounts[WINDOW] = c.stored_bytes + apart * RUN_MARGIN_BYTES
        accounts[STREAMED] = buffer_margin_bytes
    return Choice(c.id, c.damage.on(kinds), (c.seconds, c.disk_seconds), accounts)


def _own_accounts(site: WeightSite) -> dict[str, str]:
    return {
        PREFILL: f"prefill {site.id}",
        DECODE: f"decode {site.id}",
        WINDOW: f"window {site.layer}",
        STREAMED: f"streamed {site.id}",
    }


def _kv_choice(c: KVCandidate, kinds: Sequence[str]) -> Choice:
    accounts = {f"prefill {c.site.id}": c.prefill_bytes, f"decode {c.site.id}": c.decode_bytes, KV: c.stored_bytes}
    return Choice(c.id, c.damage.on(kinds), (c.seconds, 0.0), accounts)
