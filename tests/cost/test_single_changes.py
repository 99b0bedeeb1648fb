"""Which options are measured at a site, and what their divergences make of the proxies of the others."""

import math

import pytest

from haversack.cost.damage import NONE, Damage
from haversack.cost.single_changes import MAX_SURVIVORS, corrected, survivors
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid


def option(bits, group_size=128, symmetric=True):
    return WeightOption(grid=IntegerGrid(bits, group_size, symmetric), rounding=HessianFeedback())


def proxies(**nats):
    table = {option(int(name[1:])): Damage(value, "proxied") for name, value in nats.items()}
    return {WeightOption(): NONE, **table}


def test_only_options_that_none_beats_are_measured():
    table = {option(2): Damage(0.5, "proxied"), option(3): Damage(0.6, "proxied"), option(4): Damage(0.1, "proxied")}
    assert set(survivors(table, lambda o: o.grid.bits if o.grid else 16)) == {option(2), option(4)}
    assert survivors(proxies(b8=1e-6), lambda o: o.grid.bits if o.grid else 16) == []


def test_a_long_front_is_thinned_and_keeps_its_ends():
    options = [option(b, g, s) for b in (2, 3, 4, 8) for g in (64, 128) for s in (True, False)]
    table = {o: Damage(1 / (place + 1), "proxied") for place, o in enumerate(options)}
    found = survivors(table, options.index)
    assert len(found) == MAX_SURVIVORS and {options[0], options[-1]} <= set(found)


def test_measured_options_are_measured_and_the_others_corrected():
    table = proxies(b2=0.4, b3=0.1, b4=0.025, b8=1e-4)
    found = corrected(table, {option(2): 0.8, option(4): 0.025})
    assert (found[option(2)].nats, found[option(2)].label) == (0.8, "measured")
    assert found[option(3)].label == "proxied"
    assert found[option(3)].nats == pytest.approx(0.1 * math.sqrt(2))  # half way between twice and once, in logarithms
    assert found[option(8)].nats == pytest.approx(1e-4)
    assert found[WeightOption()] == NONE


def test_sites_that_were_not_reached_follow_those_that_were():
    found = corrected(proxies(b4=0.02), {}, elsewhere=math.log(1.5))
    assert found[option(4)].nats == pytest.approx(0.03) and "other sites" in found[option(4)].source
    assert corrected(proxies(b4=0.02), {}) == proxies(b4=0.02)
