"""Keys and values on another tier: what lies where, what a step fetches, and what is lost by what it does not."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

from haversack.describe.site import AttentionSite
from haversack.errors import DoesNotFitError, UsageError
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.elsewhere import Elsewhere
from haversack.parts.kv.far_values import FarValues
from haversack.parts.kv.key_cells import KeyCells
from haversack.parts.kv.low_rank import LowRankKV
from haversack.parts.kv.sinks import SinksAndWindow

HEADS, KV_HEADS, DIM, SCALING = 4, 2, 32, 0.25
LENGTH, WINDOW = 400, 8


def site(window: int | None = None) -> AttentionSite:
    return AttentionSite("layer", 0, "module", HEADS, KV_HEADS, DIM, DIM, window_tokens=window)


def tokens(length: int, batch_size: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(batch_size, heads, length, DIM, generator=generator) for heads in shapes)


def filled(option: KVOption, inputs: tuple[torch.Tensor, ...]):
    _, keys, values = inputs
    sizes = {"batch_size": len(keys), "capacity_tokens": LENGTH, "dtype": "F32"}
    layer = option.build(site(), **sizes)
    for some in torch.arange(keys.shape[2]).split(100):
        layer.append(keys[:, :, some], values[:, :, some])
    return layer


def exact(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last query to every token `(kv_heads, groups, tokens)`, and its output."""
    query, keys, values = inputs
    q = query[0, :, -1].unflatten(0, (KV_HEADS, -1))
    attention = (SCALING * q @ keys[0].mT).softmax(-1)
    return attention, attention @ values[0]


@pytest.mark.parametrize("rank", [0, 16])
def test_the_device_holds_low_rank_keys_and_a_window_and_the_disk_the_values(rank):
    inputs = tokens(LENGTH)
    option = KVOption(None, FarValues(32, WINDOW, 32), project=LowRankKV(rank) if rank else None)
    layer = filled(option, inputs)
    sizes = {"batch_size": 1, "capacity_tokens": LENGTH, "dtype": "F32"}
    window, behind = WINDOW + 31, (LENGTH - WINDOW) // 32 * 32
    bases = KV_HEADS * 2 * DIM * rank * 2
    device = KV_HEADS * (window * ((rank or DIM) + DIM) + behind * (rank or DIM)) * 4 + bases
    assert layer.num_bytes() == layer.max_bytes() == option.stored_bytes(site(), **sizes) == device
    disk = KV_HEADS * behind * DIM * 4
    assert layer.num_bytes("disk") == option.stored_bytes(site(), tier="disk", **sizes) == disk


def test_under_an_index_the_device_holds_the_window_and_the_cells():
    option = KVOption(None, KeyCells(32, WINDOW, 32, scan_tokens=64, num_cells=8))
    layer = filled(option, tokens(LENGTH))
    behind = (LENGTH - WINDOW) // 32 * 32
    device = KV_HEADS * ((WINDOW + 31) * 2 * DIM * 4 + 8 * (DIM + 1) * 4 + behind)
    assert layer.num_bytes() == layer.max_bytes() == device
    assert layer.num_bytes("disk") == KV_HEADS * behind * 2 * DIM * 4


STEPS = [
    (FarValues(32, WINDOW, 32), 32 * DIM),
    (KeyCells(32, WINDOW, 32, scan_tokens=64, num_cells=8), (64 + 32) * DIM),
]


@pytest.mark.parametrize(("part", "numbers"), STEPS, ids=lambda x: getattr(x, "id", ""))
def test_a_step_fetches_what_was_declared_at_any_length(part, numbers):
    for length in (200, 300, LENGTH):
        inputs = tokens(length, batch_size=2)
        layer = filled(KVOption(None, part), inputs)
        before = layer.fetched_bytes
        layer.attend(inputs[0][:, :, -1:], scaling=SCALING)
        fetched = layer.fetched_bytes - before
        assert fetched == 2 * KV_HEADS * numbers * 4
        most = KVOption(None, part).link_bytes(site(), batch_size=2, capacity_tokens=LENGTH, dtype="F32")
        put_away = 2 * KV_HEADS * 32 * DIM * 4 * len(part.far)
        assert most == fetched + put_away


@pytest.mark.parametrize(
    "part", [FarValues(400, WINDOW, 32), KeyCells(400, WINDOW, 32, scan_tokens=400)], ids=lambda p: p.id
)
@pytest.mark.parametrize("num_queries", [1, 4, 40])
def test_where_everything_is_read_nothing_is_lost(part, num_queries):
    inputs = tokens(LENGTH)
    outputs = [
        filled(option, inputs).attend(inputs[0][:, :, -num_queries:], scaling=SCALING)[0]
        for option in (KVOption(None, part), KVOption())
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("read_tokens", [4, 32, 128])
def test_what_is_lost_is_at_most_the_unread_share_of_the_spread_of_values(read_tokens):
    inputs = tokens(LENGTH)
    layer = filled(KVOption(None, FarValues(read_tokens, WINDOW, 32)), inputs)
    found = layer.attend(inputs[0][:, :, -1:], scaling=SCALING)[0][0, :, 0].unflatten(0, (KV_HEADS, -1))
    attention, expected = exact(inputs)
    q = SCALING * inputs[0][:, :, -1].unflatten(1, (KV_HEADS, -1))
    until = layer.packed_until[0]
    places, _ = layer.behind.chosen(q, torch.full((1, 1, 1), until), None, None)
    read = torch.zeros(KV_HEADS, LENGTH).scatter_(1, places[0], 1.0)
    read[:, until:] = 1.0
    unread = (attention * (1 - read)[:, None]).sum(-1)
    values = inputs[2][0]
    spread = torch.cdist(values, values).amax((1, 2))[:, None]
    assert ((found - expected).norm(dim=-1) <= unread * spread + 1e-5).all()
    most = (
        attention[..., :until].mean(1).topk(read_tokens, -1).values.sum(-1)
    )  # no other choice leaves less for the group
    torch.testing.assert_close((attention * read[:, None])[..., :until].sum(-1).mean(1), most, atol=0.02, rtol=0)


@pytest.mark.parametrize("part", [part for part, _ in STEPS], ids=lambda p: p.id)
def test_a_needle_far_back_is_fetched(part):
    inputs = tokens(LENGTH)
    query, keys, values = inputs
    query[:, 1::2, -1] = query[:, ::2, -1]
    keys[:, :, 77] = 6.0 * query[:, ::2, -1]
    found = filled(KVOption(None, part), inputs).attend(query[:, :, -1:], scaling=SCALING)[0]
    torch.testing.assert_close(found[:, :, 0], values[:, :, 77].repeat_interleave(2, 1), atol=0.05, rtol=0)


def test_the_more_is_scanned_the_more_of_the_best_keys_are_found():
    query, keys, values = tokens(LENGTH)
    until = torch.full((1, 1, 1), (LENGTH - WINDOW) // 32 * 32)
    recalls = []
    for scanned in (16, 64, 160, 384):
        layer = filled(
            KVOption(None, KeyCells(16, WINDOW, 32, scan_tokens=scanned, num_cells=16)), (query, keys, values)
        )
        hits = 0
        for at in range(LENGTH - 20, LENGTH):
            q = query[:, ::2, at : at + 1]
            places, found = layer.behind.chosen(q, until, None, None)
            torch.testing.assert_close(found, keys.gather(2, places[..., None].expand(-1, -1, -1, DIM)))
            best = (q @ keys[:, :, : int(until)].mT)[:, :, 0].topk(16, -1).indices
            hits += int((places[..., None] == best[..., None, :]).sum())
        recalls.append(hits / (20 * KV_HEADS * 16))
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.5 and recalls[3] == 1.0


def test_what_drops_old_tokens_or_fits_in_the_window_stays_on_the_device():
    for option, its, capacity in (
        (KVOption(None, FarValues(32, 64, 32)), site(), 90),
        (KVOption(SinksAndWindow(4, 100), FarValues(32, 8, 32)), site(), LENGTH),
        (KVOption(None, KeyCells(32, 8, 32)), site(window=100), LENGTH),
    ):
        declared = option.stored(its, batch_size=1, capacity_tokens=capacity, dtype="F32")
        assert [(t.name, t.tier) for t in declared] == [("keys", "device"), ("values", "device")]
        assert option.link_bytes(its, batch_size=1, capacity_tokens=capacity, dtype="F32") == 0


def test_some_heads_may_have_values_elsewhere():
    option = by_head([KVOption(None, FarValues(32, WINDOW, 32)), KVOption(SinksAndWindow(4, 60))])
    inputs = tokens(LENGTH)
    layer = filled(option, inputs)
    sizes = {"batch_size": 1, "capacity_tokens": LENGTH, "dtype": "F32"}
    for tier in ("device", "disk"):
        assert layer.num_bytes(tier) == option.stored_bytes(site(), tier=tier, **sizes) > 0
    other = layer.resized(torch.tensor([0, 0]))
    assert other.num_bytes("disk") == 2 * layer.num_bytes("disk")
    one, two = (
        x.attend(inputs[0][:, :, -1:].repeat(n, 1, 1, 1), scaling=SCALING)[0] for x, n in ((layer, 1), (other, 2))
    )
    torch.testing.assert_close(two[1], one[0])


def test_files_have_no_name_and_are_gone_with_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    layer = filled(KVOption(None, FarValues(32, WINDOW, 32)), tokens(LENGTH))
    assert mapped() and not list(tmp_path.iterdir())
    del layer
    gc.collect()
    assert not mapped()


def test_a_full_disk_is_refused_before_anything_is_held(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFitError, match=r"behind.values don't fit into .*: No space left on device; set TMPDIR"):
        filled(KVOption(None, FarValues(32, WINDOW, 32)), tokens(LENGTH))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FarValues(0), "read_tokens is 0, but must be 1 or more"),
        (lambda: FarValues(recent_tokens=-1), "recent_tokens is -1"),
        (lambda: FarValues(group_size=48), "group_size is 48, but must be 32 or 64"),
        (lambda: FarValues(tier="tape"), "tier is 'tape', but must be disk or host"),
        (lambda: KeyCells(64, scan_tokens=63), r"scan_tokens is 63, but must be at least read_tokens \(64\)"),
        (lambda: KeyCells(num_cells=65), r"num_cells is 65, but must be 1 to group_size \(64\)"),
        (lambda: filled(KVOption(None, FarValues(32, 8, 32, "host")), tokens(9)), "main memory is the device here"),
    ],
)
def test_bad_fields_are_refused_by_name(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# Everything elsewhere


@pytest.mark.parametrize("attends_there", [True, False])
@pytest.mark.parametrize("score", [None, SinksAndWindow(4, 100)], ids=["all", "window"])
def test_what_a_drive_attends_to_comes_out_as_here_and_only_queries_and_outputs_cross(attends_there, score):
    query, keys, values = tokens(LENGTH, batch_size=2)
    outputs = []
    for represent in (None, Elsewhere(attends_there)):
        option = KVOption(score) if represent is None else KVOption(score, represent)
        layer = option.build(site(), batch_size=2, capacity_tokens=LENGTH, dtype="F32")
        steps = [torch.arange(LENGTH - 3), *torch.arange(LENGTH - 3, LENGTH).split(1)]
        before = 0
        for some in steps:
            before = getattr(layer, "crossed_bytes", 0)
            outputs.append(layer.step(query[:, :, some], keys[:, :, some], values[:, :, some], scaling=SCALING)[0])
    for plain, away in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.equal(plain, away)
    assert layer.num_bytes() == layer.max_bytes() == 0
    held = LENGTH if score is None else 104
    assert layer.num_bytes("disk") == 2 * KV_HEADS * held * 2 * DIM * 4
    new = KV_HEADS * 2 * DIM * 4
    queries, outputs_and_lse = HEADS * DIM * 4, HEADS * (DIM + 1) * 4
    fetched = queries + outputs_and_lse if attends_there else min(held, LENGTH - 1) * KV_HEADS * 2 * DIM * 4
    assert layer.crossed_bytes - before == 2 * (new + fetched)
    most = option.link_bytes(site(), batch_size=2, capacity_tokens=LENGTH, dtype="F32")
    assert most - (layer.crossed_bytes - before) == (
        0 if attends_there or score else 2 * new
    )  # a full cache has one token more
