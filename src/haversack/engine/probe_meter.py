"""What a cache loses on probes: KL of the answers' tokens from those of a whole cache, and exact match.

The reference is the same weights under the neutral cache, read in the same chunks, so that only the cache differs. A question
is asked after its context was read, and compressed as it was read; or also ahead of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from haversack.describe.site import AttentionSite
from haversack.engine.episodes import EpisodeCaches
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.reading import Reader
from haversack.parts.kv.base import KVOption
from haversack.probes.suite import Task, Turn

Asked = Literal["after", "before"]
"""Whether a question is read only after its context, or ahead of it too."""

CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Score:
    """One task's answers: nats per answer token, whether every answer was exact (None for real text, which has no right answer),
    the text's own negative log-likelihood per token, the bytes that the cache held when the context was read, and those that other
    episodes' caches took in files."""

    kind: str
    asked: Asked
    kl: float
    exact: bool | None
    nll: float
    held_bytes: int
    filed_bytes: int = 0


class ProbeMeter:
    """Asks `tasks` of a model whose attention function is ours. Memory: the model, one sequence's caches, and the reference's
    log-probabilities of every answer token, `4 vocab_size` bytes each."""

    def __init__(self, model: Any, sites: Sequence[AttentionSite], dtype: str, tasks: Iterable[Task]):
        self.model = model
        self.sites = tuple(sites)
        self.dtype = dtype
        self.tasks: list[tuple[Asked, Task]] = []
        for task in tasks:
            self.tasks.append(("after", task))
            if task.announced:
                self.tasks.append(("before", task.asked_before()))
        self.capacity_tokens = max(task.num_tokens for _, task in self.tasks)
        self._reference: dict[int, torch.Tensor] = {}

    def scores(
        self,
        options: Mapping[str, KVOption],
        asked: Sequence[Asked] = ("after", "before"),
        *,
        against_own: bool = True,
    ) -> list[Score]:
        """Every task under a cache whose layers hold what `options` says by site id; sites without one hold everything.

        The reference is made when it is first needed, by the weights as they are then; `against_own` False says that they
        are others now, so that a whole cache is no reference either.
        """
        out = []
        for i, (when, task) in enumerate(self.tasks):
            if when not in asked:
                continue
            if i not in self._reference:
                self._reference[i] = self._answers(task, {})[0]
            reference = self._reference[i]
            filed_bytes = 0
            if options or not against_own:
                found, held_bytes, filed_bytes = self._answers(task, options)
            else:
                found, held_bytes = reference, self.cache({}).plan.max_bytes()
            right = torch.tensor([token for turn in task.turns for token in turn.answer])
            kl = (reference.exp() * (reference - found)).sum(-1).mean()
            exact = None if task.kind.startswith("text") else bool((found.argmax(-1) == right).all())
            nll = -float(found.gather(1, right[:, None]).mean())
            out.append(Score(task.kind, when, max(0.0, float(kl)), exact, nll, held_bytes, filed_bytes))
        return out

    def cache(self, options: Mapping[str, KVOption]) -> HaversackCache:
        """An empty cache of the capacity that all tasks share."""
        chosen = tuple(options.get(site.id, KVOption()) for site in self.sites)
        return HaversackCache(KVPlan(self.sites, chosen, 1, self.capacity_tokens, self.dtype))

    def _answers(self, task: Task, options: Mapping[str, KVOption]) -> tuple[torch.Tensor, int, int]:
        """Log-probabilities before every answer token of all turns, `(answer tokens, vocab_size)` float32, and bytes held in memory and in files."""
        cache = self.cache(options)
        if cache.plan.episodes is not None:
            return self._answers_by_episode(task, cache.plan)
        Reader(self.model, cache, chunk_tokens=CHUNK_TOKENS).read_all(task.context)
        out = []
        for i, turn in enumerate(task.turns):
            copied = not task.in_a_row and i + 1 < len(task.turns)  # the last one needs no copy
            out.append(self._answer(turn, cache.copy() if copied else cache))
        return torch.cat(out), cache.num_bytes(), 0

    def _answers_by_episode(self, task: Task, plan: KVPlan) -> tuple[torch.Tensor, int, int]:
        """Every turn in the cache of the episode that its question is nearest to; of turns in a row those before are read again there."""
        out = []
        with tempfile.TemporaryDirectory() as folder:
            caches = EpisodeCaches(self.model, plan, Path(folder), model_fingerprint="as loaded")
            caches.read(task.context)
            for i, turn in enumerate(task.turns):
                cache = caches.answering(turn.question)
                for earlier in task.turns[:i] if task.in_a_row else ():
                    self._answer(earlier, cache)
                out.append(self._answer(turn, cache))
            return torch.cat(out), cache.num_bytes(), caches.num_bytes()

    def _answer(self, turn: Turn, cache: HaversackCache) -> torch.Tensor:
        ids = (*turn.question, *turn.answer)
        chunk_tokens = 1 if cache.plan.spares_steps else len(ids)
        reader = Reader(self.model, cache, chunk_tokens=chunk_tokens, all_logits=True)
        logits = torch.cat([reader.read(chunk) for chunk in reader.chunks(ids)])
        return logits[-len(turn.answer) - 1 : -1].float().log_softmax(-1)


def mean_kl(scores: Sequence[Score]) -> dict[str, float]:
    """Kind -> mean nats per answer token over its tasks, in the order of the suite; both ways of asking together."""
    kinds = dict.fromkeys(score.kind for score in scores)
    return {kind: fmean(score.kl for score in scores if score.kind == kind) for kind in kinds}


def worst(scores: Sequence[Score]) -> tuple[str, float]:
    """The kind of probe that loses most, and what it loses: what a cache is judged by."""
    return max(mean_kl(scores).items(), key=lambda item: item[1])
