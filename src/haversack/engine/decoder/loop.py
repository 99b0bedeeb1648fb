"""Greedy decoding by compiled steps, after a prefill by the model itself.

The loop gives the tokens that `model.generate(do_sample=False)` gives: the prompt, its padding and the first token are
generate's own, later tokens come from steps that round where the model rounds. Tables of positions are the model's own,
made for some positions ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from haversack.engine.attention import NAME
from haversack.engine.decoder.program import StepProgram
from haversack.engine.decoder.schedule import ALIGNMENT, constant_bytes, schedule_step
from haversack.engine.decoder.trace import Node, StepGraph, layers_of, tensors_in, trace_step
from haversack.engine.kv_cache import HaversackCache
from haversack.errors import UnsupportedModelError

LOOP = "compiled step"
"""Name of this loop in results; the other one is transformers' own."""

TABLE_TOKENS = 64
"""Positions that tables are made for at a time: one call of the model's Python per so many tokens."""

_CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings that depend on how long the sequence has become: their tables are made token by token."""


class Decoder:
    """Compiled steps of one model; programs are made per cache. Raises UnsupportedModelError naming what can't be."""

    def __init__(self, model: Any):
        if getattr(model, "haversack_window", None) is not None:
            raise UnsupportedModelError("its weights are streamed, and lie elsewhere at each step")
        self.model = model
        self.num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.graph: StepGraph = trace_step(model, self.num_layers, NAME)
        schedule_step(self.graph, 1)  # refuses now what would else be refused after the first token
        self._table_tokens = table_tokens(model.config)

    def steps(self, cache: HaversackCache, first_tokens: torch.Tensor) -> Steps:
        """Steps over a filled cache from `first_tokens` `(batch,)` on."""
        program = StepProgram(schedule_step(self.graph, first_tokens.shape[0]), cache)
        program.tokens[:, 0] = first_tokens
        return Steps(self, program)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        *,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int = 0,
        capacity_tokens: int | None = None,
        on_tokens: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, HaversackCache]:
        """Greedy tokens `(batch, prompt + new)` and the cache, which has room for `capacity_tokens` (default: for these).

        A finished sequence goes on with `pad_token_id`.
        """
        batch_size, num_prompt = input_ids.shape
        capacity_tokens = capacity_tokens or num_prompt + max_new_tokens - 1
        cache = HaversackCache(self.model.haversack_kv_plan, batch_size=batch_size, capacity_tokens=capacity_tokens)
        out = self.model.generate(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=pad_token_id,
        )
        tokens = out[:, num_prompt]
        chosen = [tokens]
        if on_tokens is not None:
            on_tokens(tokens)
        ends = torch.tensor(list(eos_token_ids), dtype=torch.int64)
        finished = torch.isin(tokens, ends)
        steps = None
        while len(chosen) < max_new_tokens and not bool(finished.all()):
            steps = steps or self.steps(cache, tokens)
            tokens = torch.where(finished, pad_token_id, steps.next_tokens(tokens))
            chosen.append(tokens)
            if on_tokens is not None:
                on_tokens(tokens)
            finished |= torch.isin(tokens, ends)
        return torch.cat([input_ids, torch.stack(chosen, 1)], 1), cache

    def tables(self, positions: torch.Tensor) -> dict[Node, torch.Tensor]:
        """The model's own functions of `positions` `(batch, tokens)` that layers get, by node of the graph."""
        return make_tables(self.model, self.num_layers, self.graph, positions)


def make_tables(model: Any, num_layers: int, graph: StepGraph, positions: torch.Tensor) -> dict[Node, torch.Tensor]:
    """What the model's own code makes of `positions` `(batch, tokens)` for its layers, which run aside."""
    if not graph.tables:
        return {}
    found: dict[int, Any] = {}
    width = model.get_input_embeddings().weight.shape[1]
    hidden = torch.zeros(*positions.shape, width, dtype=model.dtype, device=positions.device)
    given = {
        "attention_mask": torch.ones_like(positions),
        "position_ids": positions,
    }  # without, values would be asked for
    layers = layers_of(model, num_layers)
    wanted = {layer for layer, _ in graph.tables.values()}
    with torch.inference_mode(False), torch.no_grad(), _layers_aside(layers, wanted, found), suppress(_Enough):
        model.base_model(inputs_embeds=hidden, **given, use_cache=False)
    tables = {}
    for node, (layer, path) in graph.tables.items():
        value = dict(tensors_in(found[layer]))[path]
        if value.shape[:2] != positions.shape or value.shape[2:] != node.layout.shape[2:]:
            raise UnsupportedModelError(f"a table of positions has the shape {tuple(value.shape)}")
        tables[node] = value
    return tables


@contextmanager
def _layers_aside(layers: Iterable[Any], wanted: set[int], found: dict[int, Any]) -> Iterator[None]:
    """Layers that only note what they are given; the last one that is asked for ends the forward pass."""

    def forward_of(index: int) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if index in wanted:
                found[index] = (args, kwargs)
                if set(found) == wanted:
                    raise _Enough
            return args[0] if args else kwargs["hidden_states"]

        return forward

    for i, layer in enumerate(layers):
        layer.forward = forward_of(i)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def step_bytes(graph: StepGraph, batch_size: int, tables_bytes: int) -> int:
    """What steps for `batch_size` sequences allocate beside kernels' workspace: buffers, constants, scores, and `tables_bytes` while tables of
    positions are made. Raises UnsupportedModelError."""
    schedule = schedule_step(graph, batch_size)
    scores = 4 * batch_size * graph.logits.sizes[-1]
    return schedule.arena_bytes + ALIGNMENT + constant_bytes(graph) + tables_bytes + 2 * scores


class Steps:
    """Steps over one cache, one token per sequence each."""

    def __init__(self, decoder: Decoder, program: StepProgram):
        self.decoder = decoder
        self.program = program
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._used = self._made = 0
        self._scores = torch.empty(program.logits.shape, dtype=torch.float32)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocab_size)` after `tokens` `(batch,)`, valid until the next step."""
        program = self.program
        if self._used == self._made:
            self._tables = []  # the last ones go before the next are made
            ahead = torch.arange(self.decoder._table_tokens)
            tables = self.decoder.tables(program.positions + ahead)
            self._tables = [(program.table(node), value) for node, value in tables.items()]
            self._used, self._made = 0, len(ahead)
        for buffer, table in self._tables:
            buffer.copy_(table[:, self._used : self._used + 1])
        self._used += 1
        program.tokens[:, 0] = tokens
        program.run()
        return program.logits

    def follow(self) -> None:
        """Other tokens were stored or taken back since the last step."""
        self.program.follow()
        self._used = self._made = 0

    def next_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens `(batch,)` after `tokens`."""
        return self._scores.copy_(self.logits(tokens)).argmax(-1)


class _Enough(Exception):
    """Every table was seen."""


def table_tokens(config: Any) -> int:
    """Positions that a model's tables are made for at a time."""
    return 1 if _rope_changes(config) else TABLE_TOKENS


def _rope_changes(config: Any) -> bool:
    def kinds(nest: Any) -> Iterator[str]:
        if isinstance(nest, dict):
            for key, value in nest.items():
                if key in ("rope_type", "type") and isinstance(value, str):
                    yield value
                else:
                    yield from kinds(value)

    return any(kind in _CHANGING_ROPES for kind in kinds(config.to_dict()))
