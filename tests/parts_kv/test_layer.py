"""A layer against plain attention over the tokens it should hold, whatever the chunks, rows and representation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parts_kv.recipes import build

from haversack.describe.site import AttentionSite
from haversack.errors import DoesNotFitError, UnsupportedModelError, UsageError
from haversack.ledger import total_bytes
from haversack.parts.base import all_parts, part_from_dict
from haversack.parts.kv.anchor_merging import AnchorMerge
from haversack.parts.kv.base import KVOption, KVPart, Selection, by_head
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.channels import ChosenChannels
from haversack.parts.kv.corrected import CorrectedKV
from haversack.parts.kv.depth_merged import DepthMergedKV
from haversack.parts.kv.elsewhere import Elsewhere
from haversack.parts.kv.episode_attention import EpisodeAttention
from haversack.parts.kv.far_values import FarValues
from haversack.parts.kv.fewer_channels import FewerKeyChannels
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.kernel_merging import KernelMerge
from haversack.parts.kv.key_cells import KeyCells
from haversack.parts.kv.latest_attention import LatestAttention
from haversack.parts.kv.low_precision import LowPrecision
from haversack.parts.kv.low_rank import LowRankKV
from haversack.parts.kv.merging import Merge
from haversack.parts.kv.non_uniform import NonUniformKV
from haversack.parts.kv.normalized_attention import NormalizedAttention
from haversack.parts.kv.nothing import NothingKV
from haversack.parts.kv.pages import PagedKV
from haversack.parts.kv.per_token import PerTokenKV
from haversack.parts.kv.persistence import Persistence
from haversack.parts.kv.plain import PlainKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.retrieval import Retrieving
from haversack.parts.kv.salience import SalientAttention
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.parts.kv.surprise import Surprise
from haversack.parts.kv.token_windows import TokenWindows
from haversack.parts.kv.voting_heads import VotingHeads

SCALING = 0.25
DIM = 32


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def site(num_heads: int = 4, num_kv_heads: int = 2, dim: int = DIM, window: int | None = None) -> AttentionSite:
    shape = (num_heads, num_kv_heads, dim, dim)
    return AttentionSite("layer", 0, "module", *shape, window_tokens=window, rope_theta=10000.0)


def tokens(batch: int, length: int, dim: int = DIM, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 4, length, dim, generator=generator)
    keys = torch.randn(batch, 2, length, dim, generator=generator)
    return query, keys, torch.randn(batch, 2, length, dim, generator=generator)


def reference(query, keys, values, hidden, softcap=None, sinks=None):
    """Softmax over everything at once, in float64."""
    keys, values = (x.double().repeat_interleave(2, dim=1) for x in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * SCALING
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ values, lse
    return scores.softmax(-1) @ values, lse


def run(layer, query, keys, values, steps, **kwargs):
    outputs, lses, done = [], [], 0
    for step in steps:
        part = slice(done, done + step)
        done += step
        output, lse = layer.step(query[:, :, part], keys[:, :, part], values[:, :, part], scaling=SCALING, **kwargs)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def hidden_for(length: int, sink_tokens: int = 0, window_tokens: int | None = None) -> torch.Tensor:
    position = torch.arange(length)
    distance = position[:, None] - position
    hidden = distance < 0
    if window_tokens is not None:
        hidden = hidden | ((distance > window_tokens) & (position >= sink_tokens))
    return hidden


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    sink_tokens=st.integers(0, 6),
    window_tokens=st.integers(1, 90),
    represent=st.sampled_from([PlainKV(), QuantizedKV(8, 8, 32, 0), QuantizedKV(8, 8, 32, 7)]),
    keep=st.booleans(),
    capped=st.booleans(),
    has_sinks=st.booleans(),
)
def test_attends_to_what_it_should_hold(steps, sink_tokens, window_tokens, represent, keep, capped, has_sinks):
    length = sum(steps)
    query, keys, values = tokens(2, length)
    option = KVOption(None if keep else SinksAndWindow(sink_tokens, window_tokens), represent)
    layer = option.build(site(), batch_size=2, capacity_tokens=length, dtype="F32")
    softcap, sinks = 5.0 if capped else None, torch.tensor([0.5, -1.0, 2.0, 0.0]) if has_sinks else None
    hidden = hidden_for(length) if keep else hidden_for(length, sink_tokens, window_tokens)
    expected, expected_lse = reference(query, keys, values, hidden, softcap, sinks)
    output, lse = run(layer, query, keys, values, steps, softcap=softcap, sinks=sinks)
    # 8 bits over a range of about 6 leave errors of 0.012 in keys and values; the plain layer only reorders sums
    tolerance = 1e-5 if represent.lossless else 0.03
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=0)
    assert layer.num_bytes() == layer.max_bytes()


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    first=st.integers(0, 40),
    new=st.integers(2, 700),
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    dim=st.sampled_from([16, 40, 64]),
    has_sinks=st.booleans(),
)
def test_new_tokens_attend_to_each_other(dtype, first, new, rows, groups, dim, has_sinks):
    """Through torch's flash attention, over what came before and learned sinks, longer than a block of queries: against float64."""
    generator = torch.Generator().manual_seed(new)
    length, heads = first + new, 2 * groups
    query, keys, values = (
        torch.randn(rows, length, n, dim, generator=generator).to(dtype).transpose(1, 2) for n in (heads, 2, 2)
    )
    sinks = torch.randn(heads, generator=generator) if has_sinks else None
    code = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    layer = KVOption().build(site(heads, 2, dim), batch_size=rows, capacity_tokens=length, dtype=code)
    layer.append(keys[:, :, :first], values[:, :, :first])
    output, lse = layer.attend(*(x[:, :, first:] for x in (query, keys, values)), scaling=SCALING, sinks=sinks)
    k, v = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    scores = (query[:, :, first:].double() @ k.transpose(-1, -2) * SCALING).masked_fill(
        hidden_for(length)[first:], -torch.inf
    )
    total = scores.logsumexp(-1)
    extra = None if sinks is None else sinks.double()[:, None].expand_as(total)
    weights = (scores - (total if extra is None else torch.logaddexp(total, extra))[..., None]).exp()
    # float32 sums; in 16 bits weights are rounded before they meet values, and the parts and their sum once more
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-18}[dtype]
    assert ((output.double() - weights @ v).abs() <= 3 * step * (weights @ v.abs()) + 1e-6).all()
    torch.testing.assert_close(lse.double(), total, atol=2e-4, rtol=0)


OPTIONS = [
    KVOption(),
    KVOption(SinksAndWindow(4, 30)),
    KVOption(None, QuantizedKV(2, 2, 32, 8)),
    KVOption(SinksAndWindow(4, 70), QuantizedKV(4, 2, 32, 8)),
    KVOption(HeavyHitters(4, 20, 8, 16)),
    KVOption(Persistence(0, 40, 0, 8)),
    KVOption(HeavyHitters(4, 20, 8, 32), demote=LowPrecision(2)),
    by_head([KVOption(), KVOption(SinksAndWindow(4, 30))]),
    by_head([KVOption(HeavyHitters(4, 20, 8, 16)), KVOption(None, QuantizedKV(4, 4, 32, 8))]),
    KVOption(VotingHeads(4, 20, 8, 16, voters=(1, 2))),
    KVOption(HeavyHitters(4, 20, 8, 16), demote=Merge(0.1)),
    KVOption(HeavyHitters(4, 20, 8, 32), PerTokenKV(8), LowPrecision(2)),
    KVOption(NormalizedAttention(4, 20, 8, 16), PerTokenKV(4)),
    KVOption(None, CorrectedKV(2, 2, 32, 8, 2, 8)),
    KVOption(None, NonUniformKV(3, 32, 8)),
    KVOption(LatestAttention(4, 20, 8, 16)),
    KVOption(TokenWindows(4, 20, 8, 16, window_tokens=4)),
    KVOption(HeavyHitters(4, 20, 8, 16), demote=KernelMerge(0.1)),
    KVOption(SinksAndWindow(4, 70), NonUniformKV(2, 32, 0, 2)),
    KVOption(EpisodeAttention(4, 20, 8, 16)),
    KVOption(Surprise(4, 20, 8, 16)),
    KVOption(SalientAttention(4, 20, 8, 16, num_directions=4)),
    KVOption(HeavyHitters(4, 20, 8, 16), demote=AnchorMerge()),
    KVOption(None, BlockFloatKV(4, 32, 8)),
    KVOption(HeavyHitters(4, 20, 8, 16), BlockFloatKV(8, 16)),
    KVOption(None, QuantizedKV(4, 4, 32, 8), project=ChosenChannels((tuple(range(31, -1, -1)), tuple(range(32))))),
    KVOption(LatestAttention(4, 20, 8, 16), project=ChosenChannels((tuple(range(20)), tuple(range(12, 32))))),
    KVOption(SinksAndWindow(4, 30), project=LowRankKV(16, 24)),
    KVOption(HeavyHitters(4, 20, 8, 32), PerTokenKV(8), LowPrecision(2), project=LowRankKV(32, 32, 2)),
    by_head([KVOption(project=LowRankKV(16, 16)), KVOption(SinksAndWindow(4, 30), FewerKeyChannels(0.4, 32, 8))]),
    KVOption(None, FewerKeyChannels(0.4, 32, 8)),
    KVOption(SinksAndWindow(4, 70), FewerKeyChannels(0.5, 32, 8, 4)),
    KVOption(None, DepthMergedKV(False, 0, 32, 8)),
    KVOption(None, DepthMergedKV(True, 0, 32, 8)),
    KVOption(SinksAndWindow(4, 70), DepthMergedKV(False, 4, 32, 8)),
    KVOption(SinksAndWindow(4, 70), DepthMergedKV(True, 4, 32, 8)),
    KVOption(None, PagedKV(8, 5)),
    KVOption(None, FarValues(8, 8, 32), project=LowRankKV(16, 32)),
    KVOption(None, KeyCells(8, 8, 32, scan_tokens=16, num_cells=8)),
    KVOption(SinksAndWindow(4, 30), Elsewhere()),
]


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if isinstance(option.score, Selection)], ids=lambda o: o.label
)
def test_heads_choose_the_same_tokens_in_any_chunks(option):
    """Blocks are cut by a sequence's own positions, so that prefill's chunks decide nothing."""
    length = 150
    query, keys, values = tokens(2, length)
    runs = []
    for steps in ([length], [7] * 21 + [3], [1] * length):
        layer = option.build(site(), batch_size=2, capacity_tokens=length, dtype="F32")
        output, _ = run(layer, query, keys, values, steps)
        runs.append((output, [getattr(layer, "store", layer).held_by_head(row) for row in range(2)]))
        assert (
            layer.num_bytes()
            == layer.max_bytes()
            < KVOption().stored_bytes(site(), batch_size=2, capacity_tokens=length, dtype="F32")
        )
    for output, held in runs[1:]:
        torch.testing.assert_close(output, runs[0][0], atol=1e-5, rtol=0)
        assert held == runs[0][1]


def test_a_head_keeps_what_was_attended_to():
    """Three tokens get all the attention of one head, other three of the other head; each keeps its own, sinks and the last, and the token that began a block."""
    length, loud = 97, ((20, 33, 47), (21, 50, 51))
    keys = torch.zeros(1, 2, length, DIM)
    for head, positions in enumerate(loud):
        keys[0, head, list(positions), 0] = 40.0
    query = torch.zeros(1, 4, length, DIM)
    query[..., 0] = 1.0
    layer = KVOption(HeavyHitters(2, 6, 8, 16)).build(site(), batch_size=1, capacity_tokens=length, dtype="F32")
    run(layer, query, keys, torch.zeros_like(keys), [length])
    for head, positions in enumerate(loud):
        assert {0, 1, *positions, *range(length - 9, length)} <= set(layer.held_by_head(0)[head])
        assert len(layer.held_by_head(0)[head]) == 17


def test_tokens_are_freed_when_their_room_is_needed():
    """A block's end frees nothing: whoever asks then sees a block more, and all of it can still be taken back."""
    query, keys, values = tokens(1, 70)
    layer = KVOption(HeavyHitters(4, 20, 8, 16)).build(site(), batch_size=1, capacity_tokens=200, dtype="F32")
    run(layer, query, keys, values, [64])
    assert [len(head) for head in layer.held_by_head(0)] == [48, 48]
    layer.crop(16)
    run(layer, *(x[:, :, 48:] for x in (query, keys, values)), [16, 1])
    assert [len(head) for head in layer.held_by_head(0)] == [33, 33]
    with pytest.raises(UsageError, match="can't be forgotten"):
        layer.crop(2)


def test_a_guide_decides_what_its_episode_keeps():
    """Queries that are not stored, of two kinds, look at other tokens; each makes the cache keep its own, and leaves nothing else behind."""
    length, loud = 64, {0: (20, 33), 1: (21, 40)}
    keys = torch.zeros(1, 2, length + 1, DIM)
    for channel, positions in loud.items():
        keys[:, :, list(positions), channel] = 40.0
    queries = torch.zeros(1, 4, length + 1, DIM)
    for channel, positions in loud.items():
        layer = KVOption(EpisodeAttention(2, 22, 8, 16)).build(site(), batch_size=1, capacity_tokens=200, dtype="F32")
        guide = torch.zeros(1, 4, 16, DIM)
        guide[..., channel] = 1.0
        for start in range(0, length, 16):
            part = slice(start, start + 16)
            layer.step(queries[:, :, part], keys[:, :, part], keys[:, :, part], scaling=SCALING)
            before = layer.tensors["keys"].clone()
            layer.peek(guide, torch.zeros(1, 2, 16, DIM), torch.zeros(1, 2, 16, DIM), scaling=SCALING)
            assert layer.seen_tokens() == (start + 16,) and torch.equal(layer.tensors["keys"], before)
            assert layer.num_bytes() == layer.max_bytes() and len(layer.held_by_head(0)[0]) <= 32 + 16
        layer.step(queries[:, :, -1:], keys[:, :, -1:], keys[:, :, -1:], scaling=SCALING)
        assert all(set(positions) <= set(head) for head in layer.held_by_head(0))
    with pytest.raises(UsageError, match="17 tokens can't be peeked at once; a block has 16"):
        layer.peek(queries[:, :, :17], keys[:, :, :17], keys[:, :, :17], scaling=SCALING)


def test_a_guide_sees_what_attending_sees():
    query, keys, values = tokens(2, 70)
    for option in (
        KVOption(),
        KVOption(EpisodeAttention(4, 20, 8, 16)),
        by_head([KVOption(), KVOption(SinksAndWindow(4, 30))]),
        KVOption(EpisodeAttention(4, 20, 8, 16), project=LowRankKV(16, 24)),
    ):
        layer = option.build(site(), batch_size=2, capacity_tokens=90, dtype="F32")
        run(layer, query, keys, values, [60])
        new = [x[:, :, 60:] for x in (query, keys, values)]
        expected = layer.attend(*new, scaling=SCALING)
        assert all(torch.equal(a, b) for a, b in zip(layer.peek(*new, scaling=SCALING), expected))


def test_what_surprised_stays_until_it_fades():
    """Weights come by row; a token twice as surprising as the others outlives them, and with a fast decay later ones outlive it."""
    length = 160
    query, keys, values = tokens(2, length)
    held = {}
    for decay in (1.0, 0.5):
        layer = KVOption(Surprise(2, 22, 8, 16, decay=decay)).build(
            site(), batch_size=2, capacity_tokens=300, dtype="F32"
        )
        for start in range(0, length, 16):
            part = slice(start, start + 16)
            layer.step(*(x[:, :, part] for x in (query, keys, values)), scaling=SCALING)
            weights = torch.ones(2, 16)
            if start == 16:
                weights[0, 3] = weights[1, 5] = 2.0
            layer.weigh(weights)
            assert layer.num_bytes() == layer.max_bytes()
        held[decay] = [layer.held_by_head(row) for row in range(2)]
    for row, place in enumerate((19, 21)):
        assert all(place in head for head in held[1.0][row])
        assert all(place not in head for head in held[0.5][row])


def test_repeated_frames_are_freed_first():
    """Pictures of 24 tokens of which 4 are new each time: at room for two pictures, the new tokens of old ones stay, and what is repeated goes."""
    generator = torch.Generator().manual_seed(0)
    background, num_frames = torch.randn(1, 2, 20, DIM, generator=generator), 5
    background[..., 12:] = 0  # a picture that stands still fills few directions
    frames = []
    for _ in range(num_frames):
        new = torch.zeros(1, 2, 4, DIM)
        new[..., 12:] = torch.randn(1, 2, 4, DIM - 12, generator=generator)
        frames.append(torch.cat([background, new], 2))
    values = torch.cat(frames, 2)
    query, keys, _ = tokens(1, values.shape[2] + 1)
    values = torch.cat([values, values[:, :, -1:]], 2)
    kept = {}
    for number in (12, 0):
        score = SalientAttention(0, 24, 24, 24, num_directions=number)
        layer = KVOption(score).build(site(), batch_size=1, capacity_tokens=300, dtype="F32")
        run(layer, query, keys, values, [24] * num_frames + [1])
        old = [[p for p in head if p < 24 * (num_frames - 1)] for head in layer.held_by_head(0)]
        kept[number] = [sum(p % 24 >= 20 for p in head) for head in old]
        assert all(len(head) == 24 for head in old)
    assert kept[12] == [16, 16]  # all that was ever new
    assert all(some < 16 for some in kept[0])


def test_demoted_tokens_are_still_attended_to():
    length = 200
    query, keys, values = tokens(2, length)
    option = KVOption(HeavyHitters(4, 20, 8, 32), demote=LowPrecision(8))
    layer = option.build(site(), batch_size=2, capacity_tokens=length, dtype="F32")
    output, _ = run(layer, query, keys, values, [50, 50, 99, 1])
    expected, _ = reference(query, keys, values, hidden_for(length))
    torch.testing.assert_close(output.double(), expected, atol=0.03, rtol=0)  # 8 bits over a range of about 6
    dropped = KVOption(HeavyHitters(4, 20, 8, 32)).build(site(), batch_size=2, capacity_tokens=length, dtype="F32")
    without, _ = run(dropped, query, keys, values, [50, 50, 99, 1])
    assert (without.double() - expected).abs().max() > 0.1


def test_merging_from_above_one_is_dropping_to_the_bit():
    length, score = 200, HeavyHitters(4, 20, 8, 32)
    query, keys, values = tokens(2, length)
    outputs = {}
    for demote in (None, Merge(2.0), Merge(0.0)):
        layer = KVOption(score, demote=demote).build(site(), batch_size=2, capacity_tokens=length, dtype="F32")
        outputs[demote], _ = run(layer, query, keys, values, [100, 99, 1])
    assert torch.equal(outputs[None], outputs[Merge(2.0)])
    assert not torch.equal(outputs[None], outputs[Merge(0.0)])


def test_a_kernel_merges_near_keys_more_than_far_ones():
    """Two freed tokens point where a kept one does; the nearer one leaves more of its value, and a threshold above 1 leaves nothing."""
    kept = (torch.eye(2, DIM)[None, None], torch.zeros(1, 1, 2, DIM))
    freed_keys = torch.stack([1.5 * torch.eye(2, DIM)[1], 3 * torch.eye(2, DIM)[1]])[None, None]
    freed_values = torch.zeros(1, 1, 2, DIM)
    freed_values[0, 0, 0, 0] = freed_values[0, 0, 1, 1] = 1.0
    open_to, places = torch.tensor([[[False, True]]]), (torch.tensor([[[0, 9]]]), torch.tensor([[[4, 5]]]))
    _, values = KernelMerge(0.5).merge(kept, (freed_keys, freed_values), open_to, places, places)
    near, far = torch.exp(-torch.tensor([0.5, 2.0]).div(1.25).square() / 2)  # distances over their mean
    torch.testing.assert_close(values[0, 0, 1, :2], torch.stack([near, far]) / (1 + near + far))
    assert torch.equal(values[0, 0, 0], kept[1][0, 0, 0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(KernelMerge(2.0).merge(kept, (freed_keys, freed_values), open_to, places, places), kept)
    )


def test_windows_are_kept_whole():
    """One token of a stretch gets all the attention of the latest queries; its neighbours stay with it."""
    length, loud = 97, 42
    keys = torch.zeros(1, 2, length, DIM)
    keys[0, :, loud, 0] = 40.0
    query = torch.zeros(1, 4, length, DIM)
    query[..., 0] = 1.0
    score = TokenWindows(0, 8, 8, 16, window_tokens=4)
    layer = KVOption(score).build(site(), batch_size=1, capacity_tokens=length, dtype="F32")
    run(layer, query, keys, torch.zeros_like(keys), [length])
    assert all({40, 41, 42, 43} <= set(head) for head in layer.held_by_head(0))


def test_a_freed_token_lives_on_in_the_one_most_like_it():
    """One kept token has the freed one's key, but little of its value: half of that comes over, weighted alike."""
    kept_keys, kept_values = torch.eye(3, DIM)[None, None], torch.zeros(1, 1, 3, DIM)
    freed_keys, freed_values = torch.eye(3, DIM)[None, None, 1:2] * 5, torch.ones(1, 1, 1, DIM)
    open_to, places = torch.tensor([[[False, True, True]]]), (torch.tensor([[[0, 8, 9]]]), torch.tensor([[[4]]]))
    keys, values = Merge(0.5).merge((kept_keys, kept_values), (freed_keys, freed_values), open_to, places, places)
    torch.testing.assert_close(values[0, 0, 1], torch.full((DIM,), 0.5))
    torch.testing.assert_close(keys[0, 0, 1], kept_keys[0, 0, 1] * 3)
    assert torch.equal(values[0, 0, [0, 2]], kept_values[0, 0, [0, 2]])
    assert torch.equal(keys[0, 0, [0, 2]], kept_keys[0, 0, [0, 2]])


def test_merging_into_packed_tokens_is_refused():
    with pytest.raises(UsageError, match=r"kv\.merge changes kept tokens"):
        KVOption(HeavyHitters(4, 20, 8, 32), PerTokenKV(4), Merge())


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "+".join(p.id for p in o.parts))
def test_padded_rows_are_as_alone(option):
    """Left padding of different lengths: the same tokens, the same codes, the same output to rounding."""
    lengths, total = (61, 97, 100), 100
    query, keys, values = tokens(3, total)
    real = torch.stack([torch.arange(total) >= total - n for n in lengths])
    layer = build(option, site(), batch_size=3, capacity_tokens=total + 5, dtype="F32")
    outputs, done = [], 0
    for step in (32, 32, 32, 1, 1, 2):
        part = slice(done, done + step)
        done += step
        mask = real[:, part]
        q, k, v = query[:, :, part], keys[:, :, part], values[:, :, part]
        outputs.append(layer.step(q, k, v, scaling=SCALING, real=mask)[0])
    together = torch.cat(outputs, 2)
    for row, length in enumerate(lengths):
        alone = build(option, site(), batch_size=1, capacity_tokens=total + 5, dtype="F32")
        part = slice(total - length, total)
        steps = [length % 32, *[32] * (length // 32 - 1), 16, 16] if length % 32 else [32] * (length // 32)
        output, _ = run(alone, *(x[row : row + 1, :, part] for x in (query, keys, values)), [s for s in steps if s])
        assert alone.held_positions(0) == layer.held_positions(row)
        for name in alone.tensors:
            if name.split(".")[-1] in ("keys", "values"):  # slots of these that are free hold what was there before
                continue
            if "projection" in name.split("."):  # which no sequence has a row of
                continue
            torch.testing.assert_close(layer.tensors[name][row], alone.tensors[name][0], atol=1e-5, rtol=0)
        probe = query[row : row + 1, :, -1:]
        after = layer.attend(query[:, :, -1:], scaling=SCALING)[0][row : row + 1]
        torch.testing.assert_close(after, alone.attend(probe, scaling=SCALING)[0], atol=1e-5, rtol=0)
        if not any(
            isinstance(
                part,
                (
                    QuantizedKV,
                    CorrectedKV,
                    NonUniformKV,
                    BlockFloatKV,
                    FewerKeyChannels,
                    DepthMergedKV,
                    PagedKV,
                    Retrieving,
                ),
            )
            for part in option.parts
        ):  # packed tokens depend on what was plain when a query came, so on the chunks; pages are a chunk's
            torch.testing.assert_close(together[row, :, part], output[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "+".join(p.id for p in o.parts))
def test_declared_tensors_are_the_ones_made(option):
    for dtype in ("F32", "BF16", "F16"):
        declared = option.stored(site(), batch_size=3, capacity_tokens=300, dtype=dtype)
        layer = build(option, site(), batch_size=3, capacity_tokens=300, dtype=dtype)
        assert {t.name: t.shape for t in declared} == {k: tuple(t.shape) for k, t in layer.tensors.items()}
        assert total_bytes(declared) == layer.num_bytes() == layer.max_bytes()


def test_correcting_takes_off_most_of_what_two_bits_lose():
    """Keys with two channels that are large in every token, and values of which few are far out, as in the source."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 128, DIM, generator=generator)
    keys[..., 3] *= 8
    values[torch.rand(values.shape, generator=generator) < 0.005] *= 12
    errors = []
    for represent in (QuantizedKV(2, 2, 32, 0), CorrectedKV(2, 2, 32, 0, 2, 0), CorrectedKV(2, 2, 32, 0, 4, 16)):
        layer = KVOption(None, represent).build(site(), batch_size=1, capacity_tokens=128, dtype="F32")
        layer.append(keys, values)
        found = layer.packed.read(0, 4)
        errors.append([float((a - b).norm()) for a, b in zip(found, (keys, values))])
    for plain, ranked, both in zip(*errors):
        assert both < ranked < plain
        assert both < 0.75 * plain


def test_keys_are_packed_as_they_were_before_rotation():
    """Keys that a model's own rotary embedding made of one direction come back as one, which a scale and a zero hold, wherever their group begins."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=4 * DIM, num_attention_heads=4, rope_parameters=rope))
    keys = torch.randn(1, 2, 1, DIM, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 97, -1)
    _, keys = apply_rotary_pos_emb(keys, keys, *rotary(keys, torch.arange(100, 197)[None]))
    errors = []
    for before_rotation in (True, False):
        option = KVOption(None, NonUniformKV(2, 32, 0, 0, before_rotation))
        layer = option.build(site(), batch_size=1, capacity_tokens=97, dtype="F32")
        layer.append(keys, torch.zeros_like(keys))
        errors.append(float((layer.packed.read(0, 3)[0] - keys[:, :, 1:]).abs().max()))  # the first token is kept whole
        torch.testing.assert_close(layer.tensors["keys"][:, :, 0], keys[:, :, 0])
    assert errors[0] < 2e-3 < 0.2 < errors[1]


def test_outliers_of_every_vector_are_kept_as_they_are():
    """A far number in each token's values, and in each channel of a group of keys: exact to float16, and the rest no worse for it."""
    _, keys, values = tokens(1, 65)
    values = values.clone()
    values[:, :, 1:, 5] = 60.0
    found = {}
    for count in (0, 1):
        option = KVOption(None, NonUniformKV(2, 64, 0, count))
        layer = option.build(site(), batch_size=1, capacity_tokens=65, dtype="F32")
        layer.append(keys, values)
        found[count] = layer.packed.read(0, 1)[1] - values[:, :, 1:]
    assert found[1][..., 5].abs().max() == 0
    others = [i for i in range(DIM) if i != 5]
    assert found[1][..., others].norm() < 0.2 * found[0][..., others].norm()


def test_tables_of_another_length_or_order_are_refused():
    for table in ((0.0, 1.0), (0.0, 2.0, 1.0, 3.0)):
        with pytest.raises(UsageError, match=r"key_table is .* must be 4 rising values"):
            NonUniformKV(2, key_table=table)


@pytest.mark.parametrize("dim", [64, 128])
def test_two_bit_groups_of_64_take_a_sixth(dim):
    wide = site(dim=dim)
    option = KVOption(None, QuantizedKV(2, 2, 64, 64))
    plain = KVOption()
    more = [o.stored_bytes(wide, batch_size=1, capacity_tokens=64 + 64 * 100, dtype="BF16") for o in (option, plain)]
    less = [o.stored_bytes(wide, batch_size=1, capacity_tokens=64 + 64 * 10, dtype="BF16") for o in (option, plain)]
    assert (more[0] - less[0]) * 6 <= more[1] - less[1]


def test_native_window_bounds_the_slab():
    option, windowed = KVOption(), site(window=16)
    assert option.stored(windowed, batch_size=1, capacity_tokens=1000, dtype="BF16")[0].shape[2] == 15
    query, keys, values = tokens(1, 60)
    layer = option.build(windowed, batch_size=1, capacity_tokens=60, dtype="F32")
    output, _ = run(layer, query, keys, values, [20, 1, 1, 30, 8])
    expected, _ = reference(query, keys, values, hidden_for(60, 0, 15))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


def test_growth_beyond_the_plan_is_refused_before_anything_is_written():
    _, keys, values = tokens(2, 12)
    layer = KVOption().build(site(), batch_size=2, capacity_tokens=10, dtype="F32")
    layer.append(keys[:, :, :8], values[:, :, :8])
    before = layer.tensors["keys"].clone()
    with pytest.raises(DoesNotFitError, match="12 tokens was asked of a cache planned for 10"):
        layer.append(keys[:, :, 8:], values[:, :, 8:])
    assert torch.equal(layer.tensors["keys"], before)
    assert layer.seen_tokens() == (8, 8)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "+".join(p.id for p in o.parts))
def test_reordered_rows_go_on_as_their_source(option):
    query, keys, values = tokens(3, 80)
    layer = build(option, site(), batch_size=3, capacity_tokens=90, dtype="F32")
    run(layer, query, keys, values, [70, 5, 5])
    probe, *_ = tokens(3, 1, seed=1)
    before, _ = layer.attend(probe, scaling=SCALING)
    order = torch.tensor([2, 0, 2])
    grown = layer.resized(torch.tensor([0, 0, 1, 2]))
    assert grown.batch_size == 4
    torch.testing.assert_close(grown.attend(probe[[0, 0, 1, 2]], scaling=SCALING)[0], before[[0, 0, 1, 2]])
    layer.reorder(order)
    torch.testing.assert_close(layer.attend(probe[order], scaling=SCALING)[0], before[order])


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "+".join(p.id for p in o.parts))
def test_state_goes_on_in_another_layer(option):
    query, keys, values = tokens(2, 80)
    layer = build(option, site(), batch_size=2, capacity_tokens=90, dtype="F32")
    run(layer, query, keys, values, [70, 5])
    other = build(option, site(), batch_size=2, capacity_tokens=90, dtype="F32")
    other.load_state(layer.state())
    rest = tuple(x[:, :, 75:] for x in (query, keys, values))
    for a, b in zip(run(layer, *rest, [4, 1]), run(other, *rest, [4, 1])):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match=r"saved cache's \S+ is .* needs"):
        build(option, site(), batch_size=1, capacity_tokens=90, dtype="F32").load_state(layer.state())


def test_crop_takes_back_only_what_is_still_there():
    query, keys, values = tokens(1, 50)
    layer = KVOption().build(site(), batch_size=1, capacity_tokens=50, dtype="F32")
    run(layer, query, keys, values, [40])
    layer.crop(7)
    assert layer.seen_tokens() == (33,)
    output, _ = run(layer, *(x[:, :, 33:] for x in (query, keys, values)), [17])
    expected, _ = reference(query, keys, values, hidden_for(50))
    torch.testing.assert_close(output.double(), expected[:, :, 33:], atol=1e-5, rtol=0)
    dropped = KVOption(SinksAndWindow(2, 10)).build(site(), batch_size=1, capacity_tokens=50, dtype="F32")
    run(dropped, query, keys, values, [40])
    with pytest.raises(UsageError, match="can't be forgotten"):
        dropped.crop(1)
    packed = KVOption(None, QuantizedKV(2, 2, 32, 4)).build(site(), batch_size=1, capacity_tokens=50, dtype="F32")
    run(packed, query, keys, values, [40])
    packed.crop(8)  # 32 are packed, 8 are not
    with pytest.raises(UsageError, match="can't be forgotten"):
        packed.crop(1)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([8, 4, 2]),
    dim=st.sampled_from([16, 48, 64, 80, 96]),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 100),
)
def test_packed_tokens_stay_within_the_stated_error(bits, dim, scale, shift, seed):
    _, keys, values = (x * scale + shift for x in tokens(2, 64, dim, seed))
    narrow = site(dim=dim)
    layer = KVOption(None, QuantizedKV(bits, bits, 32, 0)).build(narrow, batch_size=2, capacity_tokens=64, dtype="F32")
    layer.append(keys, values)
    assert layer.packed_until == [64, 64]
    found_keys, found_values = layer.packed.read(0, 2)
    assert ((found_keys - keys).abs() <= error_bound(keys.unflatten(2, (2, 32)), bits, 3).flatten(2, 3)).all()
    for start in range(0, dim, 32):
        part = values[..., start : start + 32]
        assert ((found_values[..., start : start + 32] - part).abs() <= error_bound(part, bits, 3)).all()


def error_bound(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Half a step, and the rounding of zero and scale to float16: relative 2^-11, at least half of its smallest 2^-24."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = 2**bits - 1
    rounding = 2.0**-11 * (low.abs() + high - low) + (levels + 1) * 2.0**-25
    return (((high - low) / levels / 2 + rounding) * 1.001).expand_as(x)


def test_more_bits_are_never_worse():
    query, keys, values = tokens(1, 192)
    expected, _ = reference(query[:, :, -1:], keys, values, torch.zeros(1, 192, dtype=torch.bool))
    errors = []
    for bits in (2, 4, 8):
        option = KVOption(None, QuantizedKV(bits, bits, 32, 0))
        layer = option.build(site(), batch_size=1, capacity_tokens=192, dtype="F32")
        layer.append(keys, values)
        errors.append((layer.attend(query[:, :, -1:], scaling=SCALING)[0] - expected).norm().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_nothing_held_counts_tokens_and_gives_zeros():
    query, keys, values = tokens(2, 12)
    option = KVOption(represent=NothingKV())
    sizes = {"batch_size": 2, "capacity_tokens": 64, "dtype": "F32"}
    layer = option.build(site(), **sizes)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :5] = False
    output, lse = layer.step(query, keys, values, scaling=SCALING, real=real)
    assert not output.any() and output.shape == query.shape and bool((lse == -torch.inf).all())
    assert layer.seen_tokens() == (12, 7) and layer.held_positions(0) == ()
    assert layer.num_bytes() == layer.max_bytes() == option.stored_bytes(site(), **sizes) == 0
    layer.crop(3)
    other = layer.resized(torch.tensor([1, 1, 0]))
    assert other.seen_tokens() == (4, 4, 9)
    other.load_state(other.state())
    other.reset()
    assert other.seen_tokens() == (0, 0, 0)


def test_options_and_parts_survive_a_plan_file():
    for option in (*OPTIONS, KVOption(represent=NothingKV())):
        assert KVOption.from_dict(option.to_dict()) == option
    for part in all_parts().values():
        if issubclass(part, KVPart):
            assert part_from_dict(part().to_dict()) == part()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizedKV(key_bits=3), "key_bits is 3"),
        (lambda: QuantizedKV(group_size=48), "group_size is 48"),
        (lambda: QuantizedKV(recent_tokens=-1), "recent_tokens is -1"),
        (lambda: SinksAndWindow(window_tokens=0), "window_tokens is 0"),
        (lambda: SinksAndWindow(sink_tokens=-1), "sink_tokens is -1"),
        (lambda: EpisodeAttention(num_episodes=0), "num_episodes is 0, but must be 1 or more"),
        (lambda: EpisodeAttention(segment_tokens=0), "segment_tokens is 0"),
        (lambda: Surprise(decay=0.0), "decay is 0.0, but must be above 0 and at most 1"),
        (lambda: Surprise(4, 200, 60, 64), r"sinks, selected and recent tokens \(264\) are whole blocks of 64"),
        (lambda: SalientAttention(saliency=-1.0), "saliency is -1.0"),
        (lambda: SalientAttention(num_directions=-1), "num_directions is -1"),
        (lambda: BlockFloatKV(bits=5), "bits is 5"),
        (lambda: BlockFloatKV(block_size=20), "block_size is 20"),
        (lambda: FewerKeyChannels(pruned_share=1.0), "pruned_share is 1.0"),
        (lambda: FewerKeyChannels(bits=3), "bits is 3"),
        (lambda: DepthMergedKV(retained_tokens=65), "retained_tokens is 65"),
        (lambda: DepthMergedKV(deeper_share=1.5), "deeper_share is 1.5"),
        (lambda: ChosenChannels(((0, 0),)), "distinct channels"),
        (lambda: ChosenChannels(((0, 1), (2,))), "as many"),
        (lambda: LowRankKV(key_rank=-1), "key_rank is -1"),
        (lambda: LowRankKV(heads_together=0), "heads_together is 0"),
        (lambda: by_head([KVOption(represent=DepthMergedKV(True)), KVOption()]), "shares its store with another"),
    ],
)
def test_bad_fields_are_refused_by_name(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_sites_that_cannot_be_reached_are_refused():
    shared = AttentionSite("layer", 3, "module", 4, 2, 32, 32, shares_with=1)
    with pytest.raises(UnsupportedModelError, match="reuses another layer"):
        KVOption().stored(shared, batch_size=1, capacity_tokens=8, dtype="BF16")


def test_listing_the_parts_does_not_import_torch():
    code = (
        "import sys, pkgutil, importlib, haversack.parts.kv as kv\n"
        "for module in pkgutil.iter_modules(kv.__path__, 'haversack.parts.kv.'): importlib.import_module(module.name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
