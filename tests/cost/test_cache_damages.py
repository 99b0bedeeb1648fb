"""Options of layers from those of their heads: damages add up for each probe, and what is beaten everywhere drops out."""

import itertools

import pytest

from haversack.cost.cache_damages import head_options, layer_options
from haversack.cost.damage import NONE, Damage
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.sinks import SinksAndWindow


def window(tokens):
    return KVOption(SinksAndWindow(0, tokens))


def damage(text, needle, label="measured"):
    return Damage(text, label, probes=(("needle", needle),))


SIZES = {KVOption(): 100, window(10): 10, window(20): 20, window(40): 40}


def test_one_head_retrieves_and_the_other_does_not():
    retrieves = {KVOption(): NONE, window(10): damage(0.1, 5.0), window(20): damage(0.05, 4.0)}
    streams = {KVOption(): NONE, window(10): damage(0.1, 0.0), window(20): damage(0.01, 0.0)}
    found = layer_options([retrieves, streams], SIZES.__getitem__)
    mixed = by_head([KVOption(), window(10)])
    assert found[KVOption()] == NONE
    assert (found[mixed].nats, dict(found[mixed].probes), found[mixed].label) == (0.1, {"needle": 0.0}, "measured")
    both = found[window(10)]  # equal options are one option for the layer
    assert (both.nats, dict(both.probes), both.label) == (pytest.approx(0.2), {"needle": 5.0}, "proxied")


def test_every_combination_that_none_beats_is_kept():
    tables = [
        {KVOption(): NONE, window(10): damage(0.3, 1.0), window(20): damage(0.2, 3.0), window(40): damage(0.05, 0.5)},
        {KVOption(): NONE, window(10): damage(0.1, 0.2), window(20): damage(0.4, 0.3), window(40): damage(0.5, 0.1)},
    ]
    found = layer_options(tables, SIZES.__getitem__)

    def facts(options):
        parts = [table[option].on(("needle",)) for table, option in zip(tables, options)]
        return sum(SIZES[o] for o in options), sum(p[0] for p in parts), sum(p[1] for p in parts)

    every = {options: facts(options) for options in itertools.product(*tables)}
    for options, (size, text, needle) in every.items():
        least_worst = all(s > size or max(t, n) > max(text, needle) for o, (s, t, n) in every.items() if o != options)
        if least_worst:
            assert by_head(options) in found
    beaten = by_head([window(20), window(20)])  # by 10 and 10 at fewer bytes, in text, in the needle and in both
    assert beaten not in found


def test_head_options_are_distinct_and_smaller_than_a_whole_cache():
    from haversack.describe.site import AttentionSite

    site = AttentionSite("layer", 0, "module", 4, 1, 64, 64)
    options = head_options(1024)
    assert len(set(options)) == len(options)
    whole = KVOption().stored_bytes(site, batch_size=1, capacity_tokens=1024, dtype="BF16")
    shares = [o.stored_bytes(site, batch_size=1, capacity_tokens=1024, dtype="BF16") / whole for o in options]
    assert max(shares) < 0.6 and min(shares) < 0.04
