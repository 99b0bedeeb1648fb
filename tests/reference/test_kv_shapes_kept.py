"""What other shapes of the cache cost the smaller shipped model, which has full heads: perplexity of foreign prose, as the methods' own claims are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from haversack import data
from haversack.describe.model import describe_model
from haversack.engine import attention
from haversack.engine.channel_moments import channel_moments
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.probe_meter import ProbeMeter
from haversack.engine.whole import load_whole
from haversack.jobs.run import open_tokenizer
from haversack.ledger import TIERS
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.channels import ChosenChannels, by_falling
from haversack.parts.kv.far_values import FarValues
from haversack.parts.kv.fewer_channels import FewerKeyChannels
from haversack.parts.kv.latest_attention import LatestAttention
from haversack.parts.kv.low_rank import LowRankKV
from haversack.parts.kv.pages import PagedKV
from haversack.probes.suite import make_suite
from haversack.recipes.minicache import paired

NUM_TOKENS = 512
SCORED_TOKENS = 256
"""The last of each window: before them most of the cache is in its other shape."""

WIDTH = 64


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Model()
    torch.set_num_threads(before)


class Model:
    """Model B, two windows of foreign prose, and moments of calibration text."""

    def __init__(self) -> None:
        folder = data.reference_model("b")
        self.described = describe_model(folder)
        self.module = load_whole(self.described, attention=attention.NAME).eval()
        read = open_tokenizer(folder)
        self.read = read
        self.windows = torch.tensor(read(data.text("foreign-prose")[:12000]).input_ids[: 2 * NUM_TOKENS]).view(2, -1)
        calibration = read(data.text("calibration")[:12000]).input_ids
        self.sites = self.described.attention
        texts = [calibration[:1024], calibration[1024:2048]]
        self.moments = channel_moments(self.module, self.sites, texts)
        self._caches: list[HaversackCache] = []
        self._queries: list[torch.Tensor] = []
        self.whole = self.perplexity([KVOption()] * len(self.sites))

    def perplexity(self, options: Sequence[KVOption], *, by_step: bool = False) -> float:
        """Of the scored tokens, which are read in chunks or, `by_step`, one at a time."""
        plan = KVPlan(self.sites, tuple(options), 2, NUM_TOKENS, self.described.dtype)
        cache = HaversackCache(plan)
        with torch.inference_mode():
            chunks = [
                self.module(input_ids=chunk, past_key_values=cache, use_cache=True).logits
                for chunk in self.chunks(by_step)
            ]
        assert all(cache.num_bytes(tier) == plan.max_bytes(tier) for tier in TIERS)
        logits = torch.cat(chunks, 1)[:, -SCORED_TOKENS - 1 : -1].float()
        right = self.windows[:, -SCORED_TOKENS:]
        return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), right.flatten()))

    def chunks(self, by_step: bool) -> list[torch.Tensor]:
        first, last = self.windows.split([NUM_TOKENS - SCORED_TOKENS, SCORED_TOKENS], 1)
        return [*first.split(64, 1), *last.split(1 if by_step else 64, 1)]

    def queries(self, layer: int) -> torch.Tensor:
        """Queries of the windows, `(2, heads, tokens, head_dim)`."""
        if not self._queries:

            def observe(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self._queries.append(query)
                return attention.haversack_attention(module, query, *args, **kwargs)

            with attention.registered(self.module, "observed queries", observe), torch.inference_mode():
                self.module(input_ids=self.windows, use_cache=False)
        return self._queries[layer]

    def stored(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the windows as a whole cache holds them."""
        if not self._caches:
            plan = KVPlan(self.sites, (KVOption(),) * len(self.sites), 2, NUM_TOKENS, self.described.dtype)
            self._caches.append(HaversackCache(plan))
            with torch.inference_mode():
                self.module(input_ids=self.windows, past_key_values=self._caches[0], use_cache=True)
        tensors = self._caches[0].planned[layer].store.tensors
        return tensors["keys"], tensors["values"]

    def bytes_of(self, options: Sequence[KVOption], num_tokens: int = NUM_TOKENS) -> int:
        return KVPlan(self.sites, tuple(options), 2, num_tokens, self.described.dtype).max_bytes()


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5])
def test_thin_keys_keep_perplexity_within_two_percent(model, share):
    found = model.perplexity([KVOption(None, FewerKeyChannels(share))] * len(model.sites))
    assert found < 1.02 * model.whole


def test_thin_keys_on_top_of_eviction_cost_two_percent_of_it_at_most(model):
    eviction = LatestAttention(4, 220, 128, 32)
    kept = WIDTH - int(0.4 * WIDTH)
    energies = [[[a * b for a, b in zip(*row)] for row in zip(m.query_energy, m.key_energy)] for m in model.moments]
    alone = model.perplexity([KVOption(eviction)] * len(model.sites))
    projects = [ChosenChannels(by_falling(energy, kept)) for energy in energies]
    stacked = [KVOption(eviction, project=project) for project in projects]
    assert model.perplexity(stacked) < 1.02 * alone
    slots = 2 * 4 * 4 * 384  # sequences, layers, heads, tokens
    numbers = 4 * 4 * kept  # which channels: a byte each
    taken = model.bytes_of([KVOption(eviction)] * len(model.sites)) - model.bytes_of(stacked)
    assert taken == slots * (WIDTH - kept) * 2 - numbers
    generator = torch.Generator().manual_seed(0)
    random = ChosenChannels(by_falling(torch.rand(4, WIDTH, generator=generator).tolist(), kept))
    assert model.perplexity([KVOption(eviction, project=random)] * len(model.sites)) > 1.5 * alone


@pytest.mark.parametrize("per_frequency", [True, False])
def test_half_the_kv_heads_by_directions_beat_the_mean_of_heads(model, per_frequency):
    """Perplexity before any tuning: within a tenth of the whole cache's, where pooled heads lose everything; what a token takes is halved exactly."""
    part = LowRankKV(WIDTH, WIDTH, 2)
    options = [KVOption(project=m.fitted(part, per_frequency=per_frequency)) for m in model.moments]
    assert model.perplexity(options) < 1.1 * model.whole
    assert model.perplexity([KVOption(project=part)] * len(model.sites)) > 2 * model.whole
    whole = [KVOption()] * len(model.sites)
    grown = [model.bytes_of(some, 1512) - model.bytes_of(some, 512) for some in (whole, options)]
    assert grown[0] == 2 * grown[1]


def test_directions_that_queries_weigh_cost_little_at_three_quarters(model):
    options = [KVOption(project=m.fitted(LowRankKV(WIDTH * 3 // 4, WIDTH * 3 // 4))) for m in model.moments]
    assert model.perplexity(options) < 1.05 * model.whole


@pytest.mark.parametrize("bits", [0, 4])
def test_the_deepest_two_layers_share_directions_once_they_are_turned(model, bits):
    """Within 4% of the whole cache's perplexity, in the model's dtype and at 4 bits; merged as they are they lose more than twice as much."""
    turned = paired([m.turned_to_before() for m in model.moments], 1, bits, 64, 32)
    as_they_are = [replace(option, project=None) for option in turned]
    lost, more = (model.perplexity(options) / model.whole - 1 for options in (turned, as_they_are))
    assert 2 * lost < more
    assert lost < 0.04


@pytest.mark.parametrize("bits", [3, 4])
def test_ordered_channels_lose_less_in_blocks_of_the_same_bytes(model, bits):
    """The error of stored keys and values, each channel over its own mean square, as the sum over layers."""
    errors = {True: 0.0, False: 0.0}
    for i, (site, m) in enumerate(zip(model.sites, model.moments)):
        keys, values = model.stored(i)
        for ordered in errors:
            project = (
                ChosenChannels(by_falling(m.key_energy), by_falling(m.value_energy)) if ordered else ChosenChannels()
            )
            option = KVOption(None, BlockFloatKV(bits, 16), project=project)
            layer = option.build(site, batch_size=2, capacity_tokens=NUM_TOKENS, dtype=model.described.dtype)
            layer.append(keys, values)
            for found, x in zip(
                layer.store.packed.read(0, 15), (layer.projection.keys(keys), layer.projection.values(values))
            ):
                x = x[:, :, : found.shape[2]].float()
                errors[ordered] += float(((found - x).square().mean(2) / x.square().mean(2)).mean())
    assert errors[True] < errors[False]


def test_needles_are_found_in_the_pages_that_are_read(model):
    """Sixteen pages of sixteen tokens are read per step, of three dozen: every needle that a whole cache finds is found, and bytes grow by the bounds alone."""
    needles = [
        task
        for task in make_suite(model.read, data.text("foreign-prose"), context_tokens=512, num_per_kind=3)
        if task.kind == "needle"
    ]
    meter = ProbeMeter(model.module, model.sites, model.described.dtype, needles)
    paged = {site.id: KVOption(None, PagedKV(16, 16)) for site in model.sites}
    whole, found = (meter.scores(options, asked=("after",)) for options in ({}, paged))
    assert any(score.exact for score in whole)
    assert all(after.exact or not before.exact for before, after in zip(whole, found))
    pages = -(-meter.capacity_tokens // 16)
    assert pages > 2 * 16
    assert found[0].held_bytes - whole[0].held_bytes == pages * 2 * 4 * 4 * WIDTH * 2  # keys, layers, heads


def shadowed(model, rank: int, read_tokens: int) -> list[KVOption]:
    values = FarValues(read_tokens, 16, 32)
    return [KVOption(represent=values, project=m.fitted(LowRankKV(rank))) for m in model.moments]


def test_low_rank_keys_choose_the_values_that_full_keys_would(model):
    """Of the sixteen tokens that each head attends to most, at an eighth of the values fetched, at least 0.95; real queries, chosen through keys of three quarters of their channels."""
    hits, total = 0, 0
    for i, option in enumerate(shadowed(model, WIDTH * 3 // 4, NUM_TOKENS // 8)):
        site, (keys, values), queries = model.sites[i], model.stored(i), model.queries(i)
        layer = option.build(site, batch_size=2, capacity_tokens=NUM_TOKENS, dtype=model.described.dtype)
        for some in torch.arange(NUM_TOKENS - 1).split(64):
            layer.append(keys[:, :, some], values[:, :, some])
        until = layer.store.packed_until[0]
        asked = WIDTH**-0.5 * layer.projection.queries(queries[:, :, -1:]).float()
        places, _ = layer.store.behind.chosen(asked, torch.full((2, 1, 1), until), None, None)
        best = (queries[:, :, -1:].float() @ keys[:, :, :until].float().mT)[:, :, 0].topk(16, -1).indices
        hits += int((places[..., None] == best[..., None, :]).sum())
        total += best.numel()
    assert hits >= 0.95 * total


def test_values_elsewhere_keep_perplexity_at_a_fixed_number_fetched(model):
    """An eighth of the values behind the window per step, keys of three quarters of their channels; and the bytes of either tier as declared."""
    options = shadowed(model, WIDTH * 3 // 4, NUM_TOKENS // 8)
    found = model.perplexity(options, by_step=True)
    assert found < 1.05 * model.whole
    window, behind = 16 + 31, (NUM_TOKENS - 16) // 32 * 32
    plan = KVPlan(model.sites, tuple(options), 2, NUM_TOKENS, model.described.dtype)
    rank, rows = WIDTH * 3 // 4, 2 * len(model.sites) * 4
    bases = len(model.sites) * 4 * 2 * WIDTH * rank * 2
    assert plan.max_bytes() == rows * (window * (rank + WIDTH) + behind * rank) * 2 + bases
    assert plan.max_bytes("disk") == rows * behind * WIDTH * 2
