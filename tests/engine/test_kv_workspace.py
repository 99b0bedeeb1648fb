"""What the allocator reports while attending and appending, against what the options declare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.parts_kv.recipes import build

from allocations import peak_bytes
from haversack.describe.site import AttentionSite
from haversack.parts.kv.anchor_merging import AnchorMerge
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.channels import ChosenChannels
from haversack.parts.kv.corrected import CorrectedKV
from haversack.parts.kv.depth_merged import DepthMergedKV
from haversack.parts.kv.elsewhere import Elsewhere
from haversack.parts.kv.far_values import FarValues
from haversack.parts.kv.fewer_channels import FewerKeyChannels
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.kernel_merging import KernelMerge
from haversack.parts.kv.key_cells import KeyCells
from haversack.parts.kv.low_precision import LowPrecision
from haversack.parts.kv.low_rank import LowRankKV
from haversack.parts.kv.merging import Merge
from haversack.parts.kv.non_uniform import NonUniformKV
from haversack.parts.kv.pages import PagedKV
from haversack.parts.kv.per_token import PerTokenKV
from haversack.parts.kv.persistence import Persistence
from haversack.parts.kv.plain import PlainKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.salience import SalientAttention
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.parts.kv.token_windows import TokenWindows

OPTIONS = {
    "plain": KVOption(),
    "window": KVOption(SinksAndWindow(4, 700)),
    "two-bit": KVOption(None, QuantizedKV(2, 2, 64, 64)),
    "heavy": KVOption(HeavyHitters(4, 412, 96, 64)),
    "heavy-demoted": KVOption(HeavyHitters(4, 412, 96, 64), demote=LowPrecision(2)),
    "heavy-per-token": KVOption(HeavyHitters(4, 412, 96, 64), PerTokenKV(4)),
    "heavy-merged": KVOption(HeavyHitters(4, 412, 96, 64), demote=Merge(0.1)),
    "heavy-kernel-merged": KVOption(HeavyHitters(4, 412, 96, 64), demote=KernelMerge(0.1)),
    "heavy-anchors": KVOption(HeavyHitters(4, 412, 96, 64), demote=AnchorMerge()),
    "salient": KVOption(SalientAttention(4, 412, 96, 64)),
    "stretches": KVOption(TokenWindows(4, 412, 96, 64)),
    "persistent": KVOption(Persistence(4, 412, 96, 64)),
    "corrected": KVOption(None, CorrectedKV(2, 2, 64, 0)),
    "tables": KVOption(None, NonUniformKV(3, 64, 0, 2)),
    "block-float": KVOption(None, BlockFloatKV(4, 32, 32)),
    "heavy-block-float": KVOption(HeavyHitters(4, 412, 96, 64), BlockFloatKV(4)),
    "thin-keys": KVOption(None, FewerKeyChannels(0.4)),
    "thin-keys-packed": KVOption(SinksAndWindow(4, 700), FewerKeyChannels(0.4, 64, 32, 4)),
    "chosen-channels": KVOption(
        HeavyHitters(4, 412, 96, 64), project=ChosenChannels()
    ),  # of as many heads as the site has
    "low-rank": KVOption(project=LowRankKV(32, 32)),
    "low-rank-packed": KVOption(None, QuantizedKV(4, 4, 64, 64), project=LowRankKV(48, 64, 2)),
    "paged": KVOption(None, PagedKV(32, 16)),
    "far-values": KVOption(None, FarValues(256), project=LowRankKV(32, 64)),
    "elsewhere": KVOption(SinksAndWindow(4, 700), Elsewhere()),
    "key-cells": KVOption(None, KeyCells(128)),
    "merged": KVOption(None, DepthMergedKV()),
    "merged-deeper": KVOption(None, DepthMergedKV(True, 4)),
    "by-head": by_head(
        [
            KVOption(SinksAndWindow(4, 300)),
            *[KVOption(None, QuantizedKV(4, 4, 32, 32))] * 2,
            KVOption(SinksAndWindow(4, 300)),
        ]
    ),
    "window-four-bit": KVOption(SinksAndWindow(4, 700), QuantizedKV(4, 4, 32, 32)),
}
TIGHT = ("plain", "window", "two-bit", "heavy", "window-four-bit")
"""What is declared of these is no more than half again of what is used; of the others sums of bounds."""

SITES = {
    "grouped": AttentionSite("layer", 0, "module", 8, 2, 64, 64, rope_theta=10000.0),
    "full": AttentionSite("layer", 0, "module", 4, 4, 96, 96, window_tokens=600, softcap=30.0),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("new_tokens", [1, 4, 96, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_peak_stays_within_the_declared_workspace(name, site, dtype, new_tokens, padded):
    option, site, batch_size, capacity = OPTIONS[name], SITES[site], 2, 2048
    if option.heads:
        option = by_head(option.heads[: site.num_kv_heads])
    code = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    sizes = {"batch_size": batch_size, "capacity_tokens": capacity, "dtype": code}
    if option.project is not None and name == "chosen-channels":
        channels = (tuple(range(40)),) * site.num_kv_heads
        option = replace(option, project=ChosenChannels(channels))
    layer = build(option, site, **sizes)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch_size, heads, tokens, site.key_head_dim, dtype=dtype)

    real = None
    if padded:
        real = torch.ones(batch_size, 1400, dtype=torch.bool)
        real[0, :37] = False
    layer.append(random(site.num_kv_heads, 1400), random(site.num_kv_heads, 1400), real)
    query, keys, values = (random(h, new_tokens) for h in (site.num_heads, site.num_kv_heads, site.num_kv_heads))

    def step() -> None:
        for _ in range(64 if new_tokens == 1 else 1):  # in one of them a group of tokens is packed
            layer.step(query, keys, values, scaling=0.1, softcap=site.softcap)

    measured = peak_bytes(step)
    output_bytes = query.numel() * query.element_size()
    declared = option.workspace_bytes(site, new_tokens=new_tokens, **sizes)
    assert measured <= declared + output_bytes
    # One packed group of one row at a time, and rows that stand differently take turns; 1,400 tokens don't fill a demoted block of 1,024;
    # float32 slabs may need no copy. Else what is declared is not padded, for plans waste it.
    rows_take_turns = padded and ("heavy" in name or (new_tokens == 1 and "bit" in name))
    if dtype == torch.bfloat16 and not rows_take_turns and name in TIGHT:
        assert declared <= 1.5 * (measured - output_bytes)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_decode_step_never_makes_the_whole_cache(bits):
    """At 8,192 tokens, all that a step allocates is a fraction of the cache in 16 bits, and does not grow with it."""
    peaks = {}
    for tokens in (4096, 8192):
        option, site = KVOption(None, QuantizedKV(bits, bits, 64, 64)), SITES["grouped"]
        layer = option.build(site, batch_size=1, capacity_tokens=tokens + 1, dtype="BF16")
        layer.append(*(torch.randn(1, 2, tokens, 64, dtype=torch.bfloat16) for _ in range(2)))
        query, new = torch.randn(1, 8, 1, 64).bfloat16(), torch.randn(1, 2, 1, 64).bfloat16()
        peaks[tokens] = peak_bytes(lambda: layer.attend(query, new, new, scaling=0.1))  # noqa: B023
    assert peaks[8192] == peaks[4096] < 8192 * 2 * 2 * 64 * 2 / 2


def test_reordering_beams_takes_a_bounded_workspace():
    site = SITES["grouped"]
    layer = KVOption(None, PlainKV()).build(site, batch_size=4, capacity_tokens=4096, dtype="BF16")
    layer.append(*(torch.randn(4, 2, 4096, 64, dtype=torch.bfloat16) for _ in range(2)))
    measured = peak_bytes(lambda: layer.reorder(torch.tensor([1, 0, 3, 3])))
    assert measured < layer.num_bytes() / 20
