"""Every KV recipe keeps the bytes that it was given, at every step, and holds the same tokens in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.parts_kv.recipes import CAPACITY_TOKENS, SITES, asked, build, recipe_options, whole_cache_recipes

from haversack.errors import DoesNotFitError
from haversack.parts.kv.base import KVOption
from haversack.recipes.base import all_recipes


@pytest.mark.parametrize("recipe", whole_cache_recipes(), ids=lambda r: r.id)
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_recipe_fills_its_budget_and_never_passes_it(recipe, share):
    budget = asked(share)
    options = recipe.whole_cache(budget)
    assert len(options) == len(SITES)
    taken = budget.bytes_of(options)
    assert taken <= budget.num_bytes
    most = recipe.whole_cache(asked(40.0))  # what packs all it holds can't fill much
    assert taken > 0.4 * budget.num_bytes or options == most  # blocks, groups and whole heads come in steps
    for option in options:
        assert KVOption.from_dict(option.to_dict()) == option


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7])
def test_layers_share_all_there_is_by_what_eviction_costs_them(share):
    """No more than the budget, and with one more block for every layer more than it; where more is lost, more is kept."""
    budget = asked(share)
    options = all_recipes()["epicache"].whole_cache(budget)
    blocks = [option.score.block_tokens for option in options]
    more = [
        replace(option, score=replace(option.score, selected_tokens=option.score.selected_tokens + block))
        for option, block in zip(options, blocks, strict=True)
    ]
    assert budget.bytes_of(options) <= budget.num_bytes < budget.bytes_of(more)
    first, second, third = (option.score.held_tokens for option in options)
    assert first > third >= second  # as the made-up damages go


UNPACKED = [r for r in whole_cache_recipes() if all(o.represent.lossless for o in r.whole_cache(asked(40.0)))]  # type: ignore[misc]


@pytest.mark.parametrize("recipe", UNPACKED, ids=lambda r: r.id)
def test_with_room_for_everything_nothing_is_lost(recipe):
    """A recipe that does not pack whatever it holds is, with bytes to spare, the neutral cache, to the bit."""
    generator, length = torch.Generator().manual_seed(0), CAPACITY_TOKENS
    x = torch.randn(3, 1, 4, length, 32, generator=generator)
    outputs = []
    for option in (KVOption(), *recipe.whole_cache(asked(40.0))):
        layer = build(option, SITES[0], batch_size=1, capacity_tokens=length, dtype="F32")
        steps = [
            layer.step(x[0, :, :, s], x[1, :, :2, s], x[2, :, :2, s], scaling=0.2)[0]
            for s in (slice(0, 300), slice(300, length))
        ]
        outputs.append(torch.cat(steps, 2))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("recipe", whole_cache_recipes(), ids=lambda r: r.id)
def test_a_budget_below_the_smallest_form_is_refused_with_what_it_needs(recipe):
    with pytest.raises(DoesNotFitError, match=r"its smallest form .* takes") as error:
        recipe.whole_cache(asked(0.002))
    assert error.value.shortfall_bytes > 0


@pytest.mark.parametrize("option", recipe_options(), ids=lambda o: o.label)
def test_bytes_are_the_declared_ones_at_every_step(option):
    """Prefill in chunks, the one in flight included, and decoding: the slabs are all there is, and they never grow."""
    site, length = SITES[0], CAPACITY_TOKENS
    shape = {"batch_size": 1, "capacity_tokens": length, "dtype": "F32"}
    layer = build(option, site, **shape)
    generator = torch.Generator().manual_seed(0)
    planned, done = option.stored_bytes(site, **shape), 0
    for step in (100, 64, 40, 1, 1, 1, length - 207):
        x = torch.randn(3, 1, 4, step, 32, generator=generator)
        layer.step(x[0], x[1, :, :2], x[2, :, :2], scaling=0.2)
        done += step
        assert layer.num_bytes() == layer.max_bytes() == planned
        assert layer.seen_tokens() == (done,)


@pytest.mark.parametrize("option", recipe_options(), ids=lambda o: o.label)
def test_growth_beyond_the_plan_is_refused_or_held_in_the_same_bytes(option):
    site, length = SITES[0], CAPACITY_TOKENS
    layer = build(option, site, batch_size=1, capacity_tokens=length, dtype="F32")
    x = torch.randn(1, 2, length, 32, generator=torch.Generator().manual_seed(0))
    layer.append(x, x)
    held = layer.num_bytes()
    try:
        layer.append(x, x)
    except DoesNotFitError:
        assert layer.seen_tokens() == (length,)
    else:
        assert layer.seen_tokens() == (2 * length,)
    assert layer.num_bytes() == held
