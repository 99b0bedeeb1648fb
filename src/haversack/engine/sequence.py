"""One sequence in a planned cache that can be read on from, and taken back: what an answer and a chat are made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from haversack.engine.decoder.loop import Decoder, Steps
from haversack.engine.episodes import guide_for
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.reading import Reader
from haversack.errors import UsageError


class TokenSequence(Protocol):
    """The whole contract of a sequence: a loop that decodes needs no more of a model than this."""

    tokens: list[int]
    """What the cache holds, in order; `read` appends."""

    def read(self, ids: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """Store tokens and return the last one's logits `(vocab,)`; None if `stopped` said so between two chunks."""

    def rewind(self, num_tokens: int) -> int:
        """Keep the first `num_tokens`, or none where the cache can't go back; how many are kept."""


class PlannedSequence:
    """A sequence of batch 1 through transformers' own forward, chunked as planned; single tokens by `decoder`'s steps.

    Where the plan sorts texts into episodes, a prompt that outgrows its cache is read with the guide of the episode that its last segment, what is asked, belongs to.
    It holds at most `capacity_tokens` (default: the plan's). Raises DoesNotFitError for more than the plan's bytes hold.
    """

    def __init__(
        self, model: PreTrainedModel, plan: KVPlan, capacity_tokens: int | None = None, decoder: Decoder | None = None
    ):
        self.model = model
        self.cache = HaversackCache(plan, batch_size=1, capacity_tokens=capacity_tokens)
        self.tokens: list[int] = []
        self._steps: Steps | None = None
        self._stepped = 0  # tokens that the cache held after the last step
        self._reader = Reader(model, self.cache, chunk_tokens=plan.prefill_chunk_tokens or plan.capacity_tokens)
        self._decoder = None if self._reader.weighs else decoder  # whose steps tell layers nothing

    def read(self, ids: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        if self._decoder is not None and self.tokens and len(ids) == 1:
            return self._step(self._decoder, ids[0])
        if not self.tokens:
            self._reader.guide = guide_for(self.model, self.cache.plan, ids)
        logits = None
        for chunk in self._reader.chunks(ids):
            if stopped():
                return None
            logits = self._reader.read(chunk)[-1]
            self.tokens += chunk
        return logits

    def _step(self, decoder: Decoder, token: int) -> torch.Tensor:
        given = torch.tensor([token])
        if self._steps is None:
            self._steps = decoder.steps(self.cache, given)
        elif self._stepped != len(self.tokens):
            self._steps.follow()
        logits = self._steps.logits(given)[0]
        self.tokens.append(token)
        self._stepped = len(self.tokens)
        return logits

    def rewind(self, num_tokens: int) -> int:
        self._stepped = -1
        surplus = len(self.tokens) - num_tokens
        try:
            if surplus > 0:
                for layer in self.cache.planned:
                    layer.crop(surplus)
        except UsageError:  # tokens were dropped or packed for those that go: only the beginning is certain
            num_tokens = 0
        if num_tokens == 0:
            self.cache.reset()
        self.tokens = self.tokens[:num_tokens]
        return num_tokens
