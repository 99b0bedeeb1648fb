"""Layers stored in pairs, thin keys and projections under plain transformers: generate, beams, padding, copies, saved caches, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.engine.test_kv_generate import FAMILIES, logits_in_chunks, one_thread, plan_for, prompt

from haversack.engine.attention import NAME
from haversack.engine.channel_moments import channel_moments
from haversack.engine.decoder.loop import Decoder
from haversack.engine.generation import install_kv_plan
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.reach import observe_sites, small_copy
from haversack.errors import PlanError
from haversack.ledger import total_bytes
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.channels import ChosenChannels, by_falling
from haversack.parts.kv.depth_merged import DepthMergedKV
from haversack.parts.kv.fewer_channels import FewerKeyChannels
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.low_rank import LowRankKV

__all__ = ["one_thread"]

PAIR = tuple(KVOption(None, DepthMergedKV(deeper, 0, 32, 8)) for deeper in (False, True))


@pytest.fixture(params=["llama", "gemma2", "gpt_oss"])
def model(request):
    return small_copy(FAMILIES[request.param])


@pytest.fixture
def llama():
    return small_copy(FAMILIES["llama"])


def pairs(model, **sizes) -> KVPlan:
    """Every two layers that hold the same tokens stored together; others as they are."""
    plan = plan_for(model, KVOption(), **sizes)
    options = [KVOption()] * len(plan.sites)
    for i, (one, other) in enumerate(zip(plan.sites, plan.sites[1:])):
        if one.window_tokens == other.window_tokens and not options[i].represent.joins:
            options[i : i + 2] = PAIR
    return KVPlan(
        plan.sites, tuple(options), plan.batch_size, plan.capacity_tokens, plan.dtype, plan.prefill_chunk_tokens
    )


def test_pairs_of_layers_generate_within_their_bytes_whatever_the_rows(llama):
    long, short = prompt(1, 100), prompt(1, 50, seed=1)  # whole chunks: what is packed depends on them
    tokens = torch.cat([long, torch.cat([torch.zeros(1, 50, dtype=torch.long), short], 1)])
    mask = torch.ones_like(tokens)
    mask[1, :50] = 0
    plan = pairs(llama, batch_size=2, capacity_tokens=140, chunk=50)
    assert plan.options[1].represent.joins
    install_kv_plan(llama, plan)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = llama.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(together[:1], llama.generate(long, **settings))
    assert torch.equal(together[1:, 50:], llama.generate(short, **settings))
    result = llama.generate(long, return_dict_in_generate=True, **settings)
    assert result.past_key_values.num_bytes() == total_bytes(plan.stored(1, 107)) <= plan.max_bytes()


@pytest.mark.parametrize(
    "option",
    [
        KVOption(None, FewerKeyChannels(0.4, 32, 8)),
        KVOption(None, BlockFloatKV(4)),
        KVOption(project=LowRankKV(12, 12)),
    ],
    ids=lambda o: o.label,
)
def test_every_family_is_reached_in_any_shape(model, option):
    """Sliding windows, softcaps, sinks: chunks and single tokens end where one chunk does, as far as nothing was packed before it was read."""
    plan = plan_for(model, option, capacity_tokens=160, batch_size=2)
    model.set_attn_implementation(NAME)
    tokens = prompt(2, 150)
    found = [logits_in_chunks(model, tokens, HaversackCache(plan), steps) for steps in ((150,), (150 - 3, 1, 1, 1))]
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0][:, :147], found[1][:, :147], atol=1e-4, rtol=1e-4)
    cache = HaversackCache(plan)
    logits_in_chunks(model, tokens, cache, (64, 64, 22))
    assert cache.num_bytes() == plan.max_bytes()


def test_pairs_of_layers_decode_in_the_traced_loop_as_in_generate(llama):
    """Groups of tokens leave the windows of both layers while steps are compiled."""
    plan = pairs(llama, batch_size=2, capacity_tokens=120, chunk=16)
    install_kv_plan(llama, plan)
    llama.generation_config.eos_token_id = None
    ids = prompt(2, 37)
    expected = llama.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert torch.equal(Decoder(llama).generate(ids, torch.ones_like(ids), 60)[0], expected)


def test_beams_reorder_pairs_and_copies_go_their_own_way(llama):
    tokens = prompt(2, 70)
    plan = pairs(llama, batch_size=6, capacity_tokens=140)
    llama.set_attn_implementation(NAME)
    cache = HaversackCache(plan, batch_size=6)
    with torch.inference_mode():
        logits_in_chunks(llama, tokens, cache, (70,))
    twins = cache.copy(), copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    order = torch.tensor([5, 0, 0, 3, 2, 1])
    cache.reorder_cache(order)
    rest = prompt(6, 40, seed=2)
    found = logits_in_chunks(llama, rest, cache, (33, 1, 6))
    for row in range(6):
        alone = twins[row % 2].copy()
        alone.batch_select_indices(torch.tensor([int(order[row]) // 3]))
        expected = logits_in_chunks(llama, rest[row : row + 1], alone, (33, 1, 6))
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_saved_pairs_and_projections_go_on_only_with_their_plan(llama, tmp_path):
    llama.set_attn_implementation(NAME)
    tokens = prompt(1, 90)
    projected = plan_for(llama, KVOption(HeavyHitters(2, 6, 8, 4), project=LowRankKV(8, 8)), capacity_tokens=100)
    plans = (
        pairs(llama, capacity_tokens=100),
        projected,
        plan_for(llama, KVOption(None, FewerKeyChannels(0.4, 32, 8)), capacity_tokens=100),
    )
    for i, plan in enumerate(plans):
        cache, path = HaversackCache(plan), tmp_path / f"{i}.safetensors"
        logits_in_chunks(llama, tokens[:, :80], cache, (80,))
        cache.save(path, model_fingerprint="abc")
        expected = logits_in_chunks(llama, tokens[:, 80:], cache, (9, 1))
        loaded = HaversackCache.load(path, KVPlan.from_dict(plan.to_dict()), model_fingerprint="abc")
        assert torch.equal(logits_in_chunks(llama, tokens[:, 80:], loaded, (9, 1)), expected)
        with pytest.raises(PlanError, match="another plan"):
            HaversackCache.load(path, plans[i - 1], model_fingerprint="abc")


def test_layers_that_share_nothing_are_refused_when_they_are_planned(llama):
    sites = observe_sites(llama)
    first, deeper = PAIR
    for options, found in (
        ((deeper, *[KVOption()] * (len(sites) - 1)), "but there is none"),
        ((KVOption(), deeper, *[KVOption()] * (len(sites) - 2)), "is stored as 'kv.plain'"),
        ((KVOption(None, DepthMergedKV(False, 4, 32, 8)), deeper, *[KVOption()] * (len(sites) - 2)), "at 4 bits"),
    ):
        with pytest.raises(PlanError, match=f"shares the directions of the layer before it.*{found}"):
            KVPlan(sites, options, 1, 100, "F32")
    assert KVPlan(sites, (first, deeper, *[KVOption()] * (len(sites) - 2)), 1, 100, "F32").max_bytes()


def test_moments_are_those_of_what_the_cache_gets(llama):
    """Projections that are fitted to a model's own text lose less of it than as many random channels, or the mean of two heads."""
    text = prompt(1, 120)[0].tolist()
    sites = observe_sites(llama)
    llama.set_attn_implementation(NAME)
    moments = channel_moments(llama, sites, [text])
    tokens = torch.tensor([text])

    def lost(options) -> float:
        plan = KVPlan(sites, tuple(options), 1, 120, "F32")
        found = logits_in_chunks(llama, tokens, HaversackCache(plan), (120,))
        return float((found - whole).norm() / whole.norm())

    whole = logits_in_chunks(llama, tokens, HaversackCache(plan_for(llama, KVOption(), capacity_tokens=120)), (120,))
    halves = [m.fitted(LowRankKV(m.site.key_head_dim // 2, m.site.value_head_dim // 2)) for m in moments]
    paired = [m.fitted(LowRankKV(0, 0, 2)) for m in moments]
    energy = [[[a * b for a, b in zip(*row)] for row in zip(m.query_energy, m.key_energy)] for m in moments]
    widths = [site.key_head_dim for site in sites]
    chosen = [ChosenChannels(by_falling(e, w // 2)) for e, w in zip(energy, widths)]
    least = [ChosenChannels(by_falling([[-x for x in head] for head in e], w // 2)) for e, w in zip(energy, widths)]
    assert lost(KVOption(project=p) for p in halves) < lost(
        [KVOption(project=LowRankKV(w // 2, w // 2)) for w in widths]
    )
    assert lost(KVOption(project=p) for p in paired) < lost([KVOption(project=LowRankKV(0, 0, 2))] * len(sites))
    assert lost(KVOption(project=p) for p in chosen) < lost(KVOption(project=p) for p in least)
