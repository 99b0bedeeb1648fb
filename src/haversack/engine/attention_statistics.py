"""What a model's heads look at, measured on probes: the figures that budgets per layer and per head are shared by.

One forward pass per task with a whole cache gives the attention of the last `WINDOW_TOKENS` queries; the matrix of all
queries never exists. What a head is worth to the answers is measured directly: that head alone holds sinks and a window, and
the answers' tokens diverge by so much. Everything is computed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from haversack.codecs.codebooks import codebook
from haversack.describe.site import AttentionSite
from haversack.engine.attention import haversack_attention, registered
from haversack.engine.channel_moments import ChannelMoments, channel_moments
from haversack.engine.probe_meter import ProbeMeter
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.latest_attention import LatestAttention
from haversack.parts.kv.non_uniform import NonUniformKV, center_and_deviation, furthest, turned, turns_of, without
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.probes.suite import Task

WINDOW_TOKENS = 32
"""Queries whose attention stands for what later ones will look at (Li et al. 2024, arXiv 2404.14469, and many since)."""

GRID = 64
"""Points of a cumulative curve, beyond its beginning at 0."""

LLOYD_STEPS = 30

EVICTING = KVOption(LatestAttention(4, 60, 64, 32))
"""What a layer's sensitivity to eviction is measured with: 128 tokens, half of them the latest."""

_NAME = "haversack-statistics"


class AttentionStatistics:
    """Statistics of one model on `tasks`; layers and heads in the order of `sites`."""

    def __init__(
        self,
        model: Any,
        sites: Sequence[AttentionSite],
        dtype: str,
        tasks: Sequence[Task],
        *,
        streaming_tokens: int = 64,
    ):
        self.sites = tuple(sites)
        self._model = model
        self._dtype = dtype
        self._tasks = tuple(tasks)
        self._streaming = KVOption(SinksAndWindow(4, streaming_tokens))

    @cached_property
    def mass(self) -> torch.Tensor:
        """`(layers, GRID)`: share of the attention that the most attended i / GRID of all tokens get, mean over KV heads and tasks."""
        return torch.stack([torch.stack([_curve(p) for p in of_layer]).mean(0) for of_layer in zip(*self._last)])

    @cached_property
    def dispersion(self) -> list[float]:
        """Entropy of the mean attention over tokens, nats, by layer (Qin et al. 2025, arXiv 2503.12491)."""
        return [fmean(_entropy(p.mean(1)) for p in of_layer) for of_layer in zip(*self._last)]

    @cached_property
    def shift(self) -> list[float]:
        """Variance of a token's attention over the queries, summed over tokens, by layer (the same)."""
        return [fmean(float(p.var(1).sum(-1).mean()) for p in of_layer) for of_layer in zip(*self._last)]

    @cached_property
    def retrieval(self) -> list[list[float]]:
        """`[layer][query head]`: attention that the query before an answer's token gives to that token where the context
        states it, mean over answers (Wu et al. 2024, arXiv 2404.15574, by mass instead of by rank)."""
        total = torch.zeros(len(self.sites), max(site.num_heads for site in self.sites))
        count = 0
        for task, of_task in zip(self._tasks, self._last):
            turn = task.turns[0]
            stated = _last_place(task.context, turn.answer)
            if stated is None:
                continue
            count += 1
            for layer, p in enumerate(of_task):
                asked = p[:, -len(turn.answer) :, stated : stated + len(turn.answer)]  # (heads, answer, answer)
                total[layer, : p.shape[0]] += asked.diagonal(dim1=1, dim2=2).mean(1)
        return [(total[i, : site.num_heads] / max(1, count)).tolist() for i, site in enumerate(self.sites)]

    @cached_property
    def head_damage(self) -> list[list[float]]:
        """`[layer][KV head]`: mean nats per answer token with that head alone held to sinks and a window."""
        found = []
        for site in self.sites:
            row = []
            for head in range(site.num_kv_heads):
                options = [self._streaming if i == head else KVOption() for i in range(site.num_kv_heads)]
                row.append(self._damage(site, by_head(options)))
            found.append(row)
        return found

    @cached_property
    def eviction_damage(self) -> list[float]:
        """By layer, mean nats per answer token where that layer alone keeps what the latest queries attended to (`EVICTING`)."""
        return [self._damage(site, EVICTING) for site in self.sites]

    def _damage(self, site: AttentionSite, option: KVOption) -> float:
        return fmean(score.kl for score in self._meter.scores({site.id: option}, asked=("after",)))

    @cached_property
    def _meter(self) -> ProbeMeter:
        return ProbeMeter(self._model, self.sites, self._dtype, self._tasks)

    def tables(self, part: NonUniformKV) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """By layer, the values for keys and for values that lose least under `part`, a number's error weighted by its squared gradient: the diagonal of
        the Fisher information of the tasks' own tokens (Hooper et al. 2024, arXiv 2401.18079, section 3.2)."""
        usual = codebook(f"max{part.bits}").ordered
        collected: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = [[[], []] for _ in self.sites]
        for layer, keys, values in self._with_gradients:
            whole = keys[0].shape[2] // part.group_size * part.group_size
            turns = turns_of(part, self.sites[layer])
            grouped = [x[:, :, :whole].unflatten(2, (-1, part.group_size)) for x in keys]
            key, gradient = (x if turns is None else turned(x, turns, back=True) for x in grouped)
            of_keys = _normalized(key.transpose(3, 4), gradient.transpose(3, 4), part.num_outliers)
            collected[layer][0].append(of_keys)
            collected[layer][1].append(_normalized(*values, part.num_outliers))

        def table(some: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, ...]:
            return _weighted_means(torch.cat([x for x, _ in some]), torch.cat([w for _, w in some]), usual)

        return [(table(of_keys), table(of_values)) for of_keys, of_values in collected]

    @cached_property
    def channels(self) -> tuple[ChannelMoments, ...]:
        """By layer, second moments of queries, keys and values over the tasks' contexts."""
        return channel_moments(self._model, self.sites, [task.context for task in self._tasks])

    @cached_property
    def _with_gradients(self) -> list[tuple[int, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
        """Of every task and layer: keys and values `(1, kv_heads, tokens, head_dim)`, each with the gradient of the tokens' log-likelihood there."""
        out = []
        for task in self._tasks:
            turn = task.turns[0]
            ids = torch.tensor([[*task.context, *turn.question, *turn.answer]])
            seen: dict[int, list[torch.Tensor]] = {}

            def observe(
                module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
            ) -> Any:
                number = getattr(module, "layer_idx", None)
                moved = [torch.zeros_like(x, dtype=torch.float32, requires_grad=True) for x in (key, value)]
                seen[len(seen) if number is None else int(number)] = [key.detach(), value.detach(), *moved]  # noqa: B023
                key, value = (x + shift.to(x.dtype) for x, shift in zip((key, value), moved))
                return haversack_attention(module, query, key, value, *args, **kwargs)

            with registered(self._model, _NAME, observe), torch.enable_grad():
                logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
                moved = [x for layer in sorted(seen) for x in seen[layer][2:]]
                gradients = torch.autograd.grad(loss, moved)
            for i, layer in enumerate(sorted(seen)):
                key, value = (x.float() for x in seen[layer][:2])
                out.append((layer, (key, gradients[2 * i]), (value, gradients[2 * i + 1])))
        return out

    @cached_property
    def _last(self) -> list[list[torch.Tensor]]:
        """`[task][layer]`: probabilities of the last queries, `(heads, queries, tokens)`, each over the tokens before it."""
        out = []
        for task in self._tasks:
            turn = task.turns[0]
            ids = torch.tensor([[*task.context, *turn.question, *turn.answer[:-1]]])
            seen: dict[int, torch.Tensor] = {}

            def observe(
                module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
            ) -> Any:
                number = getattr(module, "layer_idx", None)
                seen[len(seen) if number is None else int(number)] = _probabilities(query, key, kwargs)  # noqa: B023
                return haversack_attention(module, query, key, value, *args, **kwargs)

            with registered(self._model, _NAME, observe), torch.inference_mode():
                self._model(input_ids=ids, use_cache=False, logits_to_keep=1)
            out.append([seen[layer] for layer in sorted(seen)])
        return out


def _probabilities(query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Of the last queries of the first sequence: `(heads, queries, tokens)` float32."""
    num_tokens = query.shape[2]
    first = max(0, num_tokens - WINDOW_TOKENS)
    q, k = query[0, :, first:].float(), key[0].float()
    scores = q @ k.repeat_interleave(q.shape[0] // k.shape[0], dim=0).transpose(-1, -2)
    scores = scores * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    if (softcap := kwargs.get("softcap")) is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(first, num_tokens)[:, None] - torch.arange(num_tokens)
    hidden = distance < 0
    if (window := kwargs.get("sliding_window")) is not None:
        hidden |= distance >= window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _normalized(x: torch.Tensor, gradient: torch.Tensor, num_outliers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of vectors (last axis) as a table stands for them, and what an error there weighs; outliers, which are stored apart, weigh nothing."""
    weight = gradient.square()
    if num_outliers:
        places = furthest(x, num_outliers)
        x, weight = without(x, places), weight.scatter(-1, places, 0.0)
    center, deviation = center_and_deviation(x)
    return ((x - center) / deviation).flatten(), (weight * deviation.square()).flatten()


def _weighted_means(x: torch.Tensor, weight: torch.Tensor, start: torch.Tensor) -> tuple[float, ...]:
    """Rising values, as many as in `start`, near the least weighted squared error (Lloyd 1982, "Least squares quantization in PCM")."""
    table, weight = start.double(), weight.double()
    for _ in range(LLOYD_STEPS):
        nearest = torch.bucketize(x, ((table[1:] + table[:-1]) / 2).float())
        mass = torch.zeros_like(table).scatter_add_(0, nearest, weight)
        total = torch.zeros_like(table).scatter_add_(0, nearest, weight * x)
        table = torch.where(mass > 0, total / mass.clamp_min(1e-300), table)
    return tuple(table.tolist())


def _curve(p: torch.Tensor) -> torch.Tensor:
    mass = p.mean(1).sort(-1, descending=True).values.cumsum(-1).mean(0)
    places = torch.arange(1, GRID + 1) * len(mass) // GRID - 1
    return mass[places.clamp_min(0)]


def _entropy(p: torch.Tensor) -> float:
    return float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean())


def _last_place(context: Sequence[int], answer: Sequence[int]) -> int | None:
    """Where the context holds the answer for the last time."""
    for start in range(len(context) - len(answer), -1, -1):
        if tuple(context[start : start + len(answer)]) == tuple(answer):
            return start
    return None
