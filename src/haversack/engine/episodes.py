"""Episodes of a long text: its segments sorted by topic, and one compressed cache for each, of which a question takes the nearest.

A text that outgrows its cache is read once per episode, block by block, with that episode's guide; what the guide does not look at is freed. So each cache holds what its own
topic needs. At most one of them is in memory; the others lie in files. Source: Kim et al. 2025, arXiv 2509.17396. Differs in that segments and questions are
embedded by the model's own input embedding, weighed by how rare a token is among segments, where the source takes a sentence encoder.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.reading import Reader
from haversack.errors import UsageError

STARTS = 8
"""Of k-means, each from other segments, always the same ones."""


@dataclass(frozen=True)
class Topics:
    """Episodes of one text: `centroids` `(episodes, width)` of unit length, and the typical segment of each as its guide.

    `table` `(vocab, width)` holds what a token adds to a segment's embedding, `middle` `(width,)` the mean over segments, which tells nothing apart.
    """

    centroids: torch.Tensor
    guides: tuple[tuple[int, ...], ...]
    segments: tuple[int, ...]
    """The episode of every segment, in the text's order."""
    model: Any
    rarity: torch.Tensor
    middle: torch.Tensor

    def nearest(self, ids: Sequence[int]) -> int:
        """The episode whose centroid is nearest to these tokens, by cosine."""
        return int((self.centroids @ _unit(_embedded(self.model, ids, self.rarity) - self.middle)).argmax())


def find_topics(model: Any, ids: Sequence[int], *, num_episodes: int, segment_tokens: int, guide_tokens: int) -> Topics:
    """Segments of `segment_tokens` clustered by k-means (from several starts, the same at every call) into at most `num_episodes` episodes.

    A guide is the beginning, at most `guide_tokens`, of the segment nearest to its centroid. Raises UsageError for a text without a token.
    """
    if not ids:
        raise UsageError("a text without a token has no episodes.")
    pieces = [ids[start : start + segment_tokens] for start in range(0, len(ids), segment_tokens)]
    rarity = _rarity(pieces, model.get_input_embeddings().weight.shape[0])
    found = torch.stack([_embedded(model, piece, rarity) for piece in pieces])
    middle = found.mean(0) if len(pieces) > 1 else torch.zeros_like(found[0])
    found = torch.nn.functional.normalize(found - middle, dim=-1)
    count = min(num_episodes, len(pieces))
    labels = _clusters(found, count)
    order = sorted(set(labels.tolist()))
    centroids = torch.stack([_unit(found[labels == label].mean(0)) for label in order])
    typical = [int((found @ c - 2.0 * (labels != label)).argmax()) for c, label in zip(centroids, order)]
    return Topics(
        centroids,
        tuple(tuple(pieces[i][:guide_tokens]) for i in typical),
        tuple(order.index(label) for label in labels.tolist()),
        model,
        rarity,
        middle,
    )


def guide_for(model: Any, plan: KVPlan, ids: Sequence[int]) -> tuple[int, ...]:
    """The guide to read a prompt with, whose last segment is what is asked: its episode's. None where every layer that wants one has room for the whole prompt."""
    score = plan.episodes
    if score is None or len(ids) <= min(s.held_tokens + s.block_tokens for s in plan.selections):
        return ()
    assert plan.block_tokens is not None
    topics = find_topics(
        model,
        ids[: -score.segment_tokens] or ids,
        num_episodes=score.num_episodes,
        segment_tokens=score.segment_tokens,
        guide_tokens=plan.block_tokens,
    )
    return topics.guides[topics.nearest(ids[-score.segment_tokens :])]


class EpisodeCaches:
    """One cache per episode of a text, in files of `folder` that bear the plan's and the model's fingerprints.

    Memory: one cache of the plan's bytes, with the block that is being read. Files: as many bytes for each episode. Raises UsageError for a plan without episodes.
    """

    def __init__(self, model: Any, plan: KVPlan, folder: Path, *, model_fingerprint: str):
        if plan.episodes is None or plan.block_tokens is None:
            raise UsageError(
                "no layer of this plan's cache sorts texts into episodes; plan one with the recipe epicache."
            )
        self.model, self.plan, self.folder = model, plan, folder
        self.topics: Topics | None = None
        self._score, self._block_tokens = plan.episodes, plan.block_tokens
        self._fingerprint = model_fingerprint

    def read(self, ids: Sequence[int]) -> None:
        """Read a text once per episode; caches that were here before are replaced."""
        self.topics = find_topics(
            self.model,
            ids,
            num_episodes=self._score.num_episodes,
            segment_tokens=self._score.segment_tokens,
            guide_tokens=self._block_tokens,
        )
        for episode, guide in enumerate(self.topics.guides):
            cache = HaversackCache(self.plan, batch_size=1)
            Reader(self.model, cache, chunk_tokens=self._block_tokens, guide=guide).read_all(ids)
            cache.save(self._path(episode), model_fingerprint=self._fingerprint)
            del cache  # or two would be in memory while the next one is read

    def answering(self, question: Sequence[int]) -> HaversackCache:
        """A cache as the question's episode left it: another one at every call. Raises UsageError before a text was read."""
        if self.topics is None:
            raise UsageError("these caches are empty: read a text first.")
        path = self._path(self.topics.nearest(question))
        return HaversackCache.load(path, self.plan, model_fingerprint=self._fingerprint)

    def num_bytes(self) -> int:
        """Bytes of all episodes' files."""
        count = 0 if self.topics is None else len(self.topics.guides)
        return sum(self._path(episode).stat().st_size for episode in range(count))

    def _path(self, episode: int) -> Path:
        return self.folder / f"episode-{episode}.safetensors"


def _clusters(points: torch.Tensor, count: int) -> torch.Tensor:
    """The cluster of each point `(points,)`, of the start with the least squared distances."""
    from scipy.cluster.vq import kmeans2

    best, labels = math.inf, torch.zeros(len(points), dtype=torch.int64)
    for start in range(STARTS):
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a cluster may end empty
            centers, found = kmeans2(points.numpy(), count, minit="++", iter=50, missing="warn", rng=start)
        error = float((points - torch.from_numpy(centers)[found]).square().sum())
        if error < best:
            best, labels = error, torch.from_numpy(found).long()
    return labels


def _rarity(pieces: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """What a token weighs in an embedding, `(vocab,)`: the logarithm of how few segments hold it; 0 where none does, for such a token tells no segments apart."""
    holding = torch.zeros(vocab_size)
    for piece in pieces:
        holding[torch.tensor(sorted(set(piece)))] += 1
    return torch.where(holding > 0, torch.log1p(len(pieces) / holding.clamp_min(1)), 0.0)


def _embedded(model: Any, ids: Sequence[int], rarity: torch.Tensor) -> torch.Tensor:
    """The mean of the tokens' unit embeddings by their rarity, float32 `(width,)`; 0 where all weigh nothing."""
    tokens = torch.tensor(list(ids))
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(model.get_input_embeddings()(tokens).float(), dim=-1)
    weight = rarity[tokens][:, None]
    return ((rows * weight).sum(0) / weight.sum().clamp_min(1e-12)).clone()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm().clamp_min(1e-12)
