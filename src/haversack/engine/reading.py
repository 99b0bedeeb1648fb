"""Reading tokens into a planned cache, and telling its layers between two blocks what scores ask for.

Some scores can't tell from a block's own attention what tokens are worth: those of an episode want a guide's queries, which attend and are not stored; those by surprise want
how unlikely the model found each token. Then chunks end where blocks do; else they are as long as asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from haversack.engine.kv_cache import HaversackCache


class Reader:
    """Reads one sequence into `cache`, at most `chunk_tokens` at a time. `guide`, at most a block of tokens, attends after each block. `all_logits` makes every token's.

    Memory beside the cache: a forward pass over a chunk; where tokens are weighed by surprise the logits of all its tokens instead of the last one's, and then one
    row of them, `4 vocab_size` bytes, until the next chunk.
    """

    def __init__(
        self,
        model: Any,
        cache: HaversackCache,
        *,
        chunk_tokens: int,
        guide: Sequence[int] = (),
        all_logits: bool = False,
    ):
        self.model = model
        self.cache = cache
        self.guide = tuple(guide)
        self.chunk_tokens = chunk_tokens
        self._block_tokens = cache.plan.block_tokens
        self.weighs = any(score.weighed for score in cache.plan.selections)
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps else {}
        self._kept = {} if self.weighs or all_logits else self._last_only
        self._expected: torch.Tensor | None = None  # log-probabilities of the next token

    def chunks(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """The pieces in which `ids` are to be read, each before the next is asked for."""
        start = 0
        while start < len(ids):
            size = self.chunk_tokens
            if self._block_tokens is not None:
                size = min(size, self._block_tokens - self.cache.get_seq_length() % self._block_tokens)
            yield list(ids[start : start + size])
            start += size

    def read(self, chunk: Sequence[int]) -> torch.Tensor:
        """Store one piece; the logits that were made, the last token's at least: `(tokens, vocab)`."""
        logits = self._forward(chunk, self._kept)
        if self.weighs:
            self.cache.weigh(self._surprise(logits, chunk)[None])
        ends = self._block_tokens is not None and self.cache.get_seq_length() % self._block_tokens == 0
        if self.guide and ends:
            with self.cache.peeking():
                self._forward(self.guide, self._last_only)
        return logits

    def read_all(self, ids: Sequence[int]) -> None:
        for chunk in self.chunks(ids):
            self.read(chunk)

    def _forward(self, ids: Sequence[int], keep: dict[str, int]) -> torch.Tensor:
        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True, **keep)
        return out.logits[0]

    def _surprise(self, logits: torch.Tensor, chunk: Sequence[int]) -> torch.Tensor:
        """Nats of each token of a chunk under what was read before it, `(tokens,)`; the very first token, which nothing foretold, gets 0."""
        found = logits.float().log_softmax(-1)
        first = torch.zeros_like(found[:1]) if self._expected is None else self._expected[None]
        self._expected = found[-1].clone()
        before = torch.cat([first, found[:-1]])
        return -before.gather(1, torch.tensor(chunk)[:, None])[:, 0]
