"""KL of single changes from cached layer inputs: a change of layer L runs layers L and after, one layer in memory at a time.

The layers' inputs are computed once. A change then starts from the input of its own layer, so that it costs half a
forward pass on average, and changes of one layer go through the rest together: each later layer is read once for all
of them. Divergence is of the unpacked model's next-token distribution from the changed one's, in nats per token.

Memory: one layer (or embedding, or head) in the compute dtype and the matrix that a change replaces; logits of
`HEAD_TOKENS` tokens, three times in float32, and one sequence's queries, keys, values and outputs of a layer. Disk: `tokens * hidden_size * itemsize` for every layer's input, and twice
for every change of the layer in hand; where heads change, queries, keys, values and outputs of every layer's attention.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from haversack.describe.site import AttentionSite, WeightSite
from haversack.engine.calibrate import check_token_ids
from haversack.engine.hidden_states import HiddenStates
from haversack.engine.kv_cache import DTYPE_NAMES, HaversackCache, KVPlan
from haversack.engine.layers import Attended, StreamedModel, matrix_view
from haversack.parts.kv.base import KVOption

HEAD_TOKENS = 512
ANSWER_TOKENS = 64
CHUNK_TOKENS = 256
"""Tokens that a changed cache takes at a time: what it holds of earlier ones is what a prefill in chunks reads."""


@dataclass(frozen=True)
class MatrixChange:
    """`site`'s matrix replaced by what `matrix` returns, `(out, in)`; asked for when its layer's turn comes."""

    key: str
    site: WeightSite
    matrix: Callable[[], torch.Tensor]

    @property
    def layer(self) -> int | None:
        return self.site.layer


@dataclass(frozen=True)
class CacheChange:
    """One layer's keys and values held as `option` says."""

    key: str
    site: AttentionSite
    option: KVOption

    @property
    def layer(self) -> int | None:
        return self.site.layer


@dataclass(frozen=True)
class HeadChange:
    """One KV head's keys and values held as `option` says, the layer's others as they are."""

    key: str
    site: AttentionSite
    head: int
    option: KVOption

    @property
    def layer(self) -> int | None:
        return self.site.layer


Change = MatrixChange | CacheChange | HeadChange


class Downstream:
    """Measures changes of one model on fixed tokens `(sequences, tokens)`; its files lie in `scratch` until `close`.

    `scored` names places `(sequences, tokens)` bool whose predictions are measured apart: a probe's answers (default: "text",
    everywhere). Answers stand in the last `ANSWER_TOKENS`, which a cache reads after all before was stored.
    """

    def __init__(
        self,
        model: StreamedModel,
        token_ids: torch.Tensor,
        scratch: str | Path,
        scored: Mapping[str, torch.Tensor] | None = None,
    ):
        check_token_ids(token_ids, model.described)
        self.model, self.token_ids = model, token_ids
        self.num_sequences, num_tokens = token_ids.shape
        everywhere = torch.ones(token_ids.shape, dtype=torch.bool)
        self.scored = dict(scored) if scored is not None else {"text": everywhere}
        edges = range(0, num_tokens, CHUNK_TOKENS)
        if scored is not None and num_tokens > ANSWER_TOKENS:
            edges = (*range(0, num_tokens - ANSWER_TOKENS, CHUNK_TOKENS), num_tokens - ANSWER_TOKENS)  # type: ignore[assignment]
        self._chunks = [slice(a, b) for a, b in itertools.pairwise((*edges, num_tokens))]
        self._folder = Path(scratch)
        self._how: dict[Path, dict] = {}  # how the attention of files attends
        self._states = HiddenStates(self._folder, num_tokens, model.described.hidden_size, model.compute_dtype)
        self._prepare()

    def close(self) -> None:
        shutil.rmtree(self._folder)

    @torch.no_grad()
    def _prepare(self) -> None:
        """Every layer's input; what an earlier run finished is kept."""
        if "clean-0" not in self._states:
            with self.model.before_layers() as embed:
                hidden = self._states.create("clean-0", self.num_sequences)
                for i in range(self.num_sequences):
                    hidden[i : i + 1] = embed(self.token_ids[i : i + 1])
            self._states.finish("clean-0")
        for layer in range(self.model.num_layers):
            if f"clean-{layer + 1}" not in self._states:
                after = self._states.create(f"clean-{layer + 1}", self.num_sequences)
                with self.model.layer(layer):
                    self._advance(layer, self._clean(layer), after)
                self._states.finish(f"clean-{layer + 1}")

    def measure(self, changes: Sequence[Change]) -> dict[str, float]:
        """Nats per token of each change alone, by key, over all scored places. All are of one layer, or all of no layer."""
        counts = {name: int(places.sum()) for name, places in self.scored.items()}
        found = self.measure_apart(changes)
        return {
            key: sum(nats * counts[name] for name, nats in by_name.items()) / sum(counts.values())
            for key, by_name in found.items()
        }

    @torch.no_grad()
    def measure_apart(self, changes: Sequence[Change]) -> dict[str, dict[str, float]]:
        """The same, by key and by name of scored places."""
        where = {change.layer for change in changes}
        assert len(where) == 1, "changes of one layer go through the rest together"
        layer = where.pop()
        states = [self._states.create(f"change-{i}", self.num_sequences) for i in range(len(changes))]
        if layer is None:
            self._start_outside(changes, states)
        else:
            with self.model.layer(layer):
                heads = [(change, state) for change, state in zip(changes, states) if isinstance(change, HeadChange)]
                if heads:
                    self._advance_heads(heads)
                for change, state in zip(changes, states, strict=True):
                    if isinstance(change, HeadChange):
                        continue
                    if isinstance(change, CacheChange):
                        self._advance_cached(change, state)
                    else:
                        with self._replaced(change):
                            self._advance(layer, self._clean(layer), state)
        for later in range(0 if layer is None else layer + 1, self.model.num_layers):
            with self.model.layer(later):
                for state in states:
                    self._advance(later, state, state)
        return self._divergences(changes, states)

    def _clean(self, layer: int) -> torch.Tensor:
        return self._states.open(f"clean-{layer}", self.num_sequences)

    def _advance(self, layer: int, hidden: torch.Tensor, after: torch.Tensor) -> None:
        for i in range(self.num_sequences):
            after[i : i + 1] = self.model.run_layer(layer, hidden[i : i + 1])

    def _advance_cached(self, change: CacheChange, after: torch.Tensor) -> None:
        hidden, sites = self._clean(change.site.layer), self.model.described.attention
        options = tuple(change.option if site.id == change.site.id else KVOption() for site in sites)
        plan = KVPlan(sites, options, 1, self.token_ids.shape[1], DTYPE_NAMES[self.model.compute_dtype])
        for i in range(self.num_sequences):
            cache = HaversackCache(plan)
            for part in self._chunks:
                after[i : i + 1, part] = self.model.run_layer_cached(change.site.layer, hidden[i : i + 1, part], cache)

    def _advance_heads(self, changes: Sequence[tuple[HeadChange, torch.Tensor]]) -> None:
        """Heads don't know each other: under each option all are attended to at once, and each change takes its head's share of that."""
        site = changes[0][0].site
        groups = site.num_heads // site.num_kv_heads
        hidden = self._clean(site.layer)
        for i in range(self.num_sequences):
            plain = self._attended(site.layer, i)
            held = {option: self._attended_cached(site, plain, option) for option in {c.option for c, _ in changes}}
            for change, after in changes:
                own = slice(change.head * groups, (change.head + 1) * groups)
                output = plain.output.clone()
                output[:, :, own] = held[change.option][:, :, own]
                after[i : i + 1] = self.model.run_layer_given(site.layer, hidden[i : i + 1], output)

    def _attended(self, layer: int, sequence: int) -> Attended:
        """What the layer's attention gets and gives unchanged: computed once, then read from a file."""
        file = self._folder / f"attended-{layer}-{sequence}"
        if file not in self._how:
            found = self.model.attended_in(layer, self._clean(layer)[sequence : sequence + 1])
            self._how[file] = found.how
            names = ("query", "key", "value", "output")
            save_file({name: getattr(found, name).contiguous() for name in names}, str(file))
        return Attended(**load_file(str(file)), how=self._how[file])

    def _attended_cached(self, site: AttentionSite, plain: Attended, option: KVOption) -> torch.Tensor:
        dtype = DTYPE_NAMES[self.model.compute_dtype]
        layer = option.build(site, batch_size=1, capacity_tokens=self.token_ids.shape[1], dtype=dtype)
        parts = [
            layer.step(plain.query[:, :, part], plain.key[:, :, part], plain.value[:, :, part], **plain.how)[0]
            for part in self._chunks
        ]
        return torch.cat(parts, 2).transpose(1, 2)

    def _start_outside(self, changes: Sequence[Change], states: Sequence[torch.Tensor]) -> None:
        """First hidden states under a changed embedding; a changed head alone starts from the plain ones."""
        with self.model.before_layers() as embed:
            for change, state in zip(changes, states, strict=True):
                assert isinstance(change, MatrixChange), "caches belong to layers"
                if not self._is_loaded(change.site):
                    state.copy_(self._clean(0))
                    continue
                with self._replaced(change):
                    for i in range(self.num_sequences):
                        state[i : i + 1] = embed(self.token_ids[i : i + 1])

    def _divergences(self, changes: Sequence[Change], states: Sequence[torch.Tensor]) -> dict[str, dict[str, float]]:
        last = self._clean(self.model.num_layers)
        total = {change.key: dict.fromkeys(self.scored, 0.0) for change in changes}
        any_scored = torch.stack([*self.scored.values()]).any(0)
        with self.model.after_layers() as logits_of:
            for i in range(self.num_sequences):
                for some in any_scored[i].nonzero().squeeze(-1).split(HEAD_TOKENS):
                    reference = logits_of(last[i : i + 1, some]).float().log_softmax(-1)
                    p = reference.exp()
                    for change, state in zip(changes, states, strict=True):
                        with self._replaced(change):
                            changed = logits_of(state[i : i + 1, some]).float().log_softmax(-1)
                        nats = changed.neg_().add_(reference).mul_(p).sum(-1)[0]
                        for name, places in self.scored.items():
                            total[change.key][name] += float(nats[places[i, some]].sum())
        counts = {name: int(places.sum()) for name, places in self.scored.items()}
        return {key: {name: nats / counts[name] for name, nats in row.items()} for key, row in total.items()}

    def _is_loaded(self, site: WeightSite) -> bool:
        return not self.model.module.get_parameter(f"{site.module}.{site.parameter}").is_meta

    @contextmanager
    def _replaced(self, change: Change) -> Iterator[None]:
        """The change's matrix in place of its site's, where that is loaded; a tied one is replaced at both ends."""
        if not isinstance(change, MatrixChange) or not self._is_loaded(change.site):
            yield
            return
        parameter = self.model.module.get_parameter(f"{change.site.module}.{change.site.parameter}")
        view = matrix_view(parameter, change.site.module_slice)
        before = view.clone()
        view.copy_(change.matrix())
        try:
            yield
        finally:
            view.copy_(before)
