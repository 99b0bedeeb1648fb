"""Damage of every head's cache under every option, on text and on probes; and the options of a layer made of its heads'.

A KV head alone is changed, and the divergence measured apart on real text and on the answers of each kind of probe, from cached
layer inputs. A layer's options are then combinations of its heads', with damages added: for each probe, for their sum and
for the worst of them, the combinations that no other beats at fewer bytes. Sums are what the search starts from; whole
plans are measured after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from haversack.cost.damage import NONE, Damage
from haversack.cost.single_changes import Progress, Rows, run_stage
from haversack.describe.model import Model
from haversack.describe.site import AttentionSite
from haversack.engine.layers import StreamedModel
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.per_token import PerTokenKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.probes.suite import Task
from haversack.recipes.cache_budget import SINK_TOKENS, selection
from haversack.solve.problem import as_tuple

TEXT = "text"
WINDOWS = (32, 16, 8, 4, 2)
"""Parts of the context that a head's window is: from a thirty-second to a half."""

MAX_OPTIONS = 160
"""Of a layer; more are thinned evenly over bytes, front by front."""

MAX_SECONDS = 240.0
"""For measuring heads of models up to 100M parameters."""

UNTRIED_NATS = 0.02
"""Per answer token, for each head that drops its tokens, of those that it drops: what it may lose on tasks that were not tried. One task of each kind does
not show it: model B's plan at 45% of the 16-bit bytes, made without this, lost 0.0007 nats at worst on the tasks that steered it and 0.27 on others."""


@dataclass(frozen=True)
class ProbeRows:
    """Token ids `(sequences, tokens)` and, by kind, the places whose predictions count."""

    token_ids: torch.Tensor
    scored: Mapping[str, torch.Tensor]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.token_ids.numpy().tobytes()).hexdigest()[:12]


def head_options(capacity_tokens: int) -> tuple[KVOption, ...]:
    """What a head is offered for contexts of `capacity_tokens`: windows, windows in few bits, all in few bits, chosen tokens; in the order in which
    they are measured: a window that most heads lose nothing by, and what packs all."""
    packed = [QuantizedKV(bits, bits_of_values, 32, 0) for bits, bits_of_values in ((8, 8), (4, 4), (4, 2), (2, 2))]
    windows = [SinksAndWindow(SINK_TOKENS, max(1, capacity_tokens // part - SINK_TOKENS)) for part in WINDOWS]
    options = [KVOption(windows[0]), *[KVOption(represent=store) for store in reversed(packed)]]
    options += [KVOption(window) for window in windows[1:-1]]
    options += [KVOption(window, store) for window in windows[-2:] for store in packed[1:4:2]]
    options += [KVOption(selection(HeavyHitters, capacity_tokens // part)) for part in WINDOWS[2:4]]
    options += [KVOption(selection(HeavyHitters, capacity_tokens // part), PerTokenKV(4)) for part in WINDOWS[3:]]
    return tuple(options)


def probe_rows(tasks: Sequence[Task], text_ids: Sequence[int], length: int, num_text_rows: int = 1) -> ProbeRows:
    """Tasks as rows of `length` tokens that end with their answers, text before shorter ones and longer ones' beginnings left off;
    tasks of several turns are asked their turns in a row, those of copies only the first. Then rows of text, which counts everywhere.
    """
    rows: list[list[int]] = []
    places: list[tuple[str, list[int]]] = []
    for task in tasks:
        if task.kind.startswith(TEXT):
            continue
        ids, answers = list(task.context), list[int]()
        for turn in task.turns if task.in_a_row else task.turns[:1]:
            start = len(ids) + len(turn.question)
            answers += range(start - 1, start - 1 + len(turn.answer))
            ids += [*turn.question, *turn.answer]
        before = length - len(ids)
        ids = [*text_ids[:before], *ids] if before > 0 else ids[-before:]
        rows.append(ids)
        places.append((task.kind, [place + before for place in answers]))
    for i in range(num_text_rows):
        rows.append(list(text_ids[i * length : (i + 1) * length]))
        places.append((TEXT, list(range(length))))
    scored = {kind: torch.zeros(len(rows), length, dtype=torch.bool) for kind, _ in reversed(places)}  # text first
    for row, (kind, columns) in enumerate(places):
        scored[kind][row, [column for column in columns if column >= 0]] = True
    return ProbeRows(torch.tensor(rows), scored)


def measure_heads(
    model: StreamedModel,
    probes: ProbeRows,
    options: Sequence[KVOption],
    rows: Rows,
    scratch: Path,
    tell: Progress,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, list[dict[KVOption, Damage]]]:
    """`[site id][KV head][option]`: that head alone so held. Where time ran out, the mean of the heads that were measured; where tokens are dropped,
    with `UNTRIED_NATS`."""
    from haversack.engine.downstream import Downstream, HeadChange
    from haversack.engine.observe import products_in_bfloat16

    sites = [site for site in model.described.attention if site.shares_with is None]

    def key(site: AttentionSite, head: int, option: KVOption) -> str:
        return f"{site.id}#{head} {probes.digest} {option.label}"

    batches = [
        {key(site, head, option): (site, head, option) for head in range(site.num_kv_heads)}
        for option in options
        for site in reversed(sites)
    ]

    def measure(
        downstream: Downstream, batch: Sequence[tuple[AttentionSite, int, KVOption]]
    ) -> dict[str, dict[str, float]]:
        return downstream.measure_apart([HeadChange(key(*one), *one) for one in batch])

    with products_in_bfloat16():  # of float32 models: two thirds of the time are matrix products
        run_stage(
            "heads",
            batches,
            measure,
            model,
            probes.token_ids,
            rows,
            scratch,
            tell,
            scored=probes.scored,
            max_seconds=max_seconds,
        )
    found: dict[str, list[dict[KVOption, Damage]]] = {
        site.id: [{KVOption(): NONE} for _ in range(site.num_kv_heads)] for site in sites
    }
    for option in options:
        known = {
            k: rows.rows[f"KL {k}"]
            for s in sites
            for h in range(s.num_kv_heads)
            if f"KL {(k := key(s, h, option))}" in rows.rows
        }
        for site in sites if known else ():
            untried = UNTRIED_NATS * dropped_share(_one_head(site), option, probes.token_ids.shape[1])
            for head in range(site.num_kv_heads):
                by_kind = known.get(key(site, head, option))
                label, source = "measured", "KL with this head's cache so held"
                if by_kind is None:
                    label, source = "proxied", "mean KL of the same cache at other heads"
                    by_kind = {kind: fmean(row[kind] for row in known.values()) for kind in probes.scored}
                if untried:
                    label, source = "proxied", f"{source}, and a share for tasks that were not tried"
                nats = {kind: max(0.0, value) for kind, value in by_kind.items()}
                others = tuple((kind, value + untried) for kind, value in nats.items() if kind != TEXT)
                found[site.id][head][option] = Damage(nats[TEXT], label, source=source, probes=others)
    return found


def layer_options(
    heads: Sequence[Mapping[KVOption, Damage]], bytes_of_head: Callable[[KVOption], int]
) -> dict[KVOption, Damage]:
    """Options of a layer made of its heads', none beaten by another in bytes and in each probe, their sum and their worst at once."""
    kinds = tuple(dict.fromkeys(kind for table in heads for damage in table.values() for kind, _ in damage.probes))
    combined: list[_Combination] = [_Combination((), 0, (0.0,) * (1 + len(kinds)), "measured")]
    for table in heads:
        grown = []
        for option, damage in table.items():
            num_bytes, vector = bytes_of_head(option), as_tuple(damage.on(kinds))
            for one in combined:
                nats = tuple(a + b for a, b in zip(one.nats, vector))
                label = one.label if damage.label == "measured" else damage.label
                grown.append(_Combination((*one.options, option), one.num_bytes + num_bytes, nats, label))
        combined = _fronts(grown)
    out = {KVOption(): NONE}
    for one in combined:
        if all(option.is_neutral for option in one.options):
            continue
        option = by_head(one.options)
        changed = sum(not o.is_neutral for o in one.options)
        label = "proxied" if changed > 1 else one.label  # several single changes: their sum was not measured
        probes = tuple(zip(kinds, one.nats[1:]))
        source = "KL of single heads' caches, added"
        out[option] = Damage(one.nats[0], label, source=source, probes=probes)
    return out


@dataclass(frozen=True)
class _Combination:
    options: tuple[KVOption, ...]
    num_bytes: int
    nats: tuple[float, ...]
    label: str


def _fronts(found: Sequence[_Combination]) -> list[_Combination]:
    """The union of the fronts of bytes against each probe, their sum and their worst."""
    width = len(found[0].nats)
    measures: list[Callable[[_Combination], float]] = [lambda c, k=k: c.nats[k] for k in range(width)]  # type: ignore[misc]
    measures += [lambda c: sum(c.nats), lambda c: max(c.nats)]
    kept: dict[tuple[KVOption, ...], _Combination] = {}
    for measure in measures:
        front: list[_Combination] = []
        for one in sorted(found, key=lambda c: (c.num_bytes, measure(c))):
            if not front or measure(one) < measure(front[-1]):
                front.append(one)
        most = max(2, MAX_OPTIONS // len(measures))
        if len(front) > most:
            front = [front[i * (len(front) - 1) // (most - 1)] for i in range(most)]
        kept |= {one.options: one for one in front}
    return list(kept.values())


def cache_damages(
    model: Model, heads: Mapping[str, Sequence[Mapping[KVOption, Damage]]], capacity_tokens: int
) -> dict[str, dict[KVOption, Damage]]:
    """`[site id][option]` for every layer, from its heads' tables."""
    out: dict[str, dict[KVOption, Damage]] = {}
    for site in model.attention:
        if site.id not in heads:
            out[site.id] = {KVOption(): NONE}
            continue
        one = _one_head(site)
        shape = {"batch_size": 1, "capacity_tokens": capacity_tokens, "dtype": model.dtype}
        out[site.id] = layer_options(heads[site.id], lambda option: option.stored_bytes(one, **shape))  # type: ignore[arg-type]  # noqa: B023
    return out


def dropped_share(site: AttentionSite, option: KVOption, capacity_tokens: int) -> float:
    """Tokens that a head of this option drops, of those that the model would look at; the mean where heads differ."""
    if option.heads:
        return fmean(dropped_share(site, head, capacity_tokens) for head in option.heads)
    regions = option.regions(site, capacity_tokens)
    whole = KVOption().regions(site, capacity_tokens).total_tokens
    return 1 - min(whole, regions.total_tokens + regions.demoted_tokens) / whole


def untried_nats(options: Mapping[AttentionSite, KVOption], capacity_tokens: int) -> float:
    """What the damages of a whole cache's heads hold for tasks that were not tried: measured ones are compared with it added."""
    return sum(
        UNTRIED_NATS * site.num_kv_heads * dropped_share(site, option, capacity_tokens)
        for site, option in options.items()
    )


def _one_head(site: AttentionSite) -> AttentionSite:
    """A KV head of the site, as a site of its own."""
    return replace(site, num_heads=site.num_heads // site.num_kv_heads, num_kv_heads=1)
