"""Projected heads: orders that change nothing, directions that lose least, fewer key channels, blocks with one exponent, layers in pairs."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
import torch
from tests.parts_kv.recipes import build
from tests.parts_kv.test_layer import DIM, SCALING, hidden_for, one_thread, reference, run, site, tokens

from haversack.engine.channel_moments import ChannelMoments, least_loss, least_loss_by_frequency
from haversack.errors import UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.channels import ChosenChannels, by_falling
from haversack.parts.kv.depth_merged import DepthMergedKV
from haversack.parts.kv.fewer_channels import FewerKeyChannels
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.low_rank import LowRankKV, encoded
from haversack.parts.kv.plain import PlainKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.sinks import SinksAndWindow

__all__ = ["one_thread"]


def uneven(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys whose channels differ by two orders of magnitude, each head in its own way, and values with outlier channels."""
    query, keys, values = tokens(1, length, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    asked, held = (10 ** torch.empty(1, 2, 1, DIM).uniform_(-1, 1, generator=generator) for _ in range(2))
    values = values * torch.where(torch.arange(DIM) % 8 == 3, 20.0, 1.0)
    return query * asked.repeat_interleave(2, 1), keys * held, values


def whole(query, keys, values):
    return reference(query, keys, values, hidden_for(query.shape[2]))[0]


def error(option: KVOption, query, keys, values, steps) -> float:
    layer = build(option, site(), batch_size=1, capacity_tokens=sum(steps), dtype="F32")
    output, _ = run(layer, query, keys, values, steps)
    return float((output.double() - whole(query, keys, values)).norm())


# Chosen channels and blocks with one exponent


def orders(keys: torch.Tensor, values: torch.Tensor) -> ChosenChannels:
    energies = ([[float(x) for x in head] for head in x[0].square().mean(1)] for x in (keys, values))
    return ChosenChannels(*(by_falling(energy) for energy in energies))


def test_an_order_of_channels_changes_nothing_before_packing():
    query, keys, values = uneven(80)
    query = query / query.norm(dim=-1, keepdim=True)  # or logits of hundreds would show how sums round
    option = KVOption(project=orders(keys, values))
    assert option.project.key_channels[0] != option.project.key_channels[1]
    layer = option.build(site(), batch_size=1, capacity_tokens=80, dtype="F32")
    output, _ = run(layer, query, keys, values, [40, 1, 39])
    torch.testing.assert_close(output.double(), whole(query, keys, values), atol=2e-5, rtol=1e-5)
    assert torch.equal(layer.store.tensors["keys"].sort(-1).values, keys.sort(-1).values)


def test_an_order_folds_into_the_weights():
    """Rows of the value projection and columns of the output projection, reordered, store what the layer stores; of keys, where a rotation's pairs stay together and
    its speeds go along: the same outputs."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention, rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    hidden = torch.randn(1, 12, 64)
    cos, sin = rotary(hidden, torch.arange(12)[None])
    pairs = torch.randperm(16)
    order = torch.cat([pairs, pairs + 16])
    with torch.no_grad():
        expected = attention(hidden, (cos, sin), None)[0]
        rows = torch.cat([order, order + 32])
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight[rows])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
        found = attention(hidden, (cos[..., order], sin[..., order]), None)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_outliers_that_share_blocks_cost_less_at_the_same_bytes(bits):
    _, keys, values = uneven(128)
    plain, ordered = (
        KVOption(None, BlockFloatKV(bits, 16), project=p) for p in (ChosenChannels(), orders(keys, values))
    )
    errors = []
    for option in (plain, ordered):
        layer = option.build(site(), batch_size=1, capacity_tokens=128, dtype="F32")
        layer.append(keys, values)
        found = layer.store.packed.read(0, 4)
        expected = layer.projection.keys(keys), layer.projection.values(values)
        # over each channel's own deviation: what a large one loses must not drown the others, nor does it where queries are small there
        errors.append([float(((a - b) / b.std(2, keepdim=True)).norm()) for a, b in zip(found, expected)])
    assert all(after < 0.9 * before for before, after in zip(*errors)), errors
    sizes = {"batch_size": 1, "capacity_tokens": 128, "dtype": "F32"}
    numbers = 2 * 2 * DIM  # the order itself: a byte per channel, keys and values
    assert ordered.stored_bytes(site(), **sizes) == plain.stored_bytes(site(), **sizes) + numbers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 3e4])
def test_blocks_stay_within_the_stated_error(bits, scale):
    keys, values = (x * scale for x in tokens(2, 64)[1:])
    layer = KVOption(None, BlockFloatKV(bits)).build(site(), batch_size=2, capacity_tokens=64, dtype="F32")
    layer.append(keys, values)
    for found, x in zip(layer.packed.read(0, 2), (keys, values)):
        largest = x.abs().amax(-1, keepdim=True)
        step = 2.0 ** (largest.clamp_min(1e-37).log2().floor() - bits + 2)
        step = step.clamp_min(2.0**-126)
        assert (
            (found - x).abs() <= torch.where(x > x.new_tensor(2.0 ** (bits - 1) - 1.5) * step, step, step / 2)
        ).all()


def test_block_floats_take_an_exponent_for_each_block():
    sizes = {"batch_size": 1, "dtype": "BF16"}
    option = KVOption(None, BlockFloatKV(4, 32))
    more, less = (option.stored_bytes(site(dim=64), capacity_tokens=n, **sizes) for n in (64 + 3200, 64))
    assert more - less == 3200 * 2 * 2 * (64 * 4 // 8 + 2)


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (ChosenChannels(((0, 1),)), "of 1 heads, but layer has 2 KV heads"),
        (ChosenChannels(((0, 40), (1, 2))), "up to 40 of 2 heads"),
        (ChosenChannels((), ((0, 1), (1, 2))), "can't leave channels of values out"),
        (LowRankKV(16, 16, 3), "takes 3 heads together, but layer has 2"),
        (LowRankKV(33, 16), "key_rank is 33, but must be at most 32"),
        (LowRankKV(16, 16, key_basis="AAAAAAAA"), "numbers, but layer needs 1024 finite ones"),
        (LowRankKV(16, 16, key_basis="%"), "not float16 in base64"),
        (LowRankKV(1, 1, key_basis=base64.b64encode(b"\x00\x7c" * 64).decode()), "finite"),
    ],
)
def test_projections_for_other_heads_are_refused(project, message):
    with pytest.raises(UsageError, match=message):
        KVOption(project=project).build(site(), batch_size=1, capacity_tokens=8, dtype="F32")


# Fewer key channels


@pytest.mark.parametrize("score", [None, SinksAndWindow(4, 200)], ids=["all", "window"])
def test_key_bytes_fall_by_the_pruned_share_and_a_bit_map(score):
    """Alone and on top of eviction: of each group 13 of 32 channels go, and 4 bytes of bits come; the queries' energy once."""
    sizes = {"batch_size": 1, "capacity_tokens": 32 * 40, "dtype": "BF16"}
    thin, same = (KVOption(score, FewerKeyChannels(share, 32, 8)) for share in (13 / 32, 0.0))
    layer = thin.build(site(), **sizes)
    tokens_behind = layer.tensors["thin.keys"].shape[2]
    assert same.stored_bytes(site(), **sizes) - thin.stored_bytes(site(), **sizes) == 2 * tokens_behind * 13 * 2
    assert layer.tensors["kept_channels"].nbytes == 2 * tokens_behind // 32 * 4
    assert layer.tensors["query_energy"].nbytes == 2 * 4 * DIM
    everything = KVOption(score).stored_bytes(site(), **sizes)
    window = 0 if score is None else 2 * (tokens_behind + 39 - 200) * DIM * 2 * 2  # whole groups behind a window
    overhead = layer.tensors["kept_channels"].nbytes + layer.tensors["query_energy"].nbytes
    ring = 2 * (39 - 32 * 40 + tokens_behind) * DIM * 2 * 2 if score is None else window
    assert thin.stored_bytes(site(), **sizes) == everything + ring + overhead - 2 * tokens_behind * 13 * 2


def test_no_pruning_loses_nothing():
    query, keys, values = tokens(1, 150)
    assert error(KVOption(None, FewerKeyChannels(0.0, 32, 8)), query, keys, values, [100, 1, 49]) < 1e-4


@pytest.mark.parametrize(
    "score", [None, HeavyHitters(4, 92, 32, 32), SinksAndWindow(4, 124)], ids=["all", "heavy", "window"]
)
def test_channels_that_queries_use_are_worth_more_than_random_ones(score):
    """Chosen as tokens leave the window, or beforehand on top of any eviction: a fraction of what random channels lose."""
    query, keys, values = uneven(200)
    steps = [100, 60, 40]
    energy = query[0].square().mean(1).unflatten(0, (2, 2)).sum(1) * keys[0].square().mean(1)
    base = KVOption(score).build(site(), batch_size=1, capacity_tokens=200, dtype="F32")
    expected, _ = run(base, query, keys, values, steps)

    def lost(option: KVOption) -> float:
        layer = option.build(site(), batch_size=1, capacity_tokens=200, dtype="F32")
        return float((run(layer, query, keys, values, steps)[0] - expected).norm())

    random = [
        lost(KVOption(score, project=ChosenChannels(by_falling(torch.rand(2, DIM).tolist(), DIM - 12))))
        for _ in range(5)
    ]
    chosen = lost(KVOption(score, project=ChosenChannels(by_falling(energy.tolist(), DIM - 12))))
    assert chosen < 0.3 * min(random)
    if not isinstance(score, HeavyHitters):
        assert lost(KVOption(score, FewerKeyChannels(12 / DIM, 32, 8))) < 0.3 * min(random)


def test_channels_follow_the_latest_queries():
    """Queries that first use one half of the channels and then the other: groups that leave later keep the other half."""
    query, keys, values = tokens(1, 192)
    half = torch.arange(DIM) < DIM // 2
    query = torch.where((torch.arange(192) < 96)[:, None] == half, query, 0.01 * query)
    option = KVOption(None, FewerKeyChannels(0.5, 32, 0))
    layer = option.build(site(), batch_size=1, capacity_tokens=192, dtype="F32")
    run(layer, query, keys, values, [32] * 6)
    found = layer.packed.read(0, 6)[0].unflatten(2, (6, 32)).abs().sum(3) > 0  # (1, kv_heads, groups, head_dim)
    assert (found[:, :, :3] == half).all() and (found[:, :, 5] == ~half).all()


# Low rank


def moments(keys: torch.Tensor, queries: torch.Tensor, values: torch.Tensor) -> ChannelMoments:
    flat = [x[0].double().transpose(0, 1).flatten(1) for x in (keys, values)]
    q = queries[0].double()
    one = torch.eye(2 * DIM, dtype=torch.float64)
    return ChannelMoments(site(), q.mT @ q, *(x.mT @ x for x in flat), one, one, one)


def few_directions(
    length: int, rank: int, shared: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of `rank` directions per head, or of as many for both heads together, as outer products of each token's own numbers."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        inner = torch.randn(1, 1 if shared else 2, length, rank, generator=generator)
        out.append(inner.expand(-1, 2, -1, -1) @ torch.randn(1, 2, rank, DIM, generator=generator) / rank**0.5)
    return torch.randn(1, 4, length, DIM, generator=generator), out[0], out[1]


@pytest.mark.parametrize(("shared", "together"), [(False, 1), (True, 2)])
def test_keys_and_values_of_few_directions_are_stored_in_as_many_numbers(shared, together):
    query, keys, values = few_directions(100, 8, shared)
    part = moments(keys, query, values).fitted(LowRankKV(8, 8, together))
    option = KVOption(project=part)
    assert error(option, query, keys, values, [60, 1, 39]) < 0.02 * float(
        whole(query, keys, values).norm()
    )  # float16 bases
    pooled = error(KVOption(project=LowRankKV(8, 8, together)), query, keys, values, [60, 1, 39])
    assert pooled > 0.3 * float(whole(query, keys, values).norm())
    sizes = {"batch_size": 3, "capacity_tokens": 500, "dtype": "BF16"}
    bases = 4 * 2 * DIM * 8 * 2
    assert (
        option.stored_bytes(site(), **sizes) == KVOption().stored_bytes(site(), **sizes) * 8 // DIM // together + bases
    )


def test_full_rank_loses_nothing_but_the_rounding_of_bases():
    query, keys, values = tokens(1, 100)
    for together in (1, 2):
        part = moments(keys, query, values).fitted(LowRankKV(DIM * together, DIM * together, together))
        assert error(KVOption(project=part), query, keys, values, [60, 1, 39]) < 0.01 * float(
            whole(query, keys, values).norm()
        )


def test_more_directions_never_lose_more_and_calibrated_ones_less_than_principal_ones():
    query, keys, values = uneven(160)
    fitted = moments(keys, query, values)
    errors = [
        error(KVOption(project=fitted.fitted(LowRankKV(r, DIM))), query, keys, values, [160]) for r in (4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    blind = replace(fitted, queries=torch.eye(DIM, dtype=torch.float64).expand(4, -1, -1))
    assert errors[1] < error(KVOption(project=blind.fitted(LowRankKV(8, DIM))), query, keys, values, [160])


def test_two_heads_by_frequency_commute_with_rotation():
    """A basis that keeps to a speed's pairs gives the same logits wherever both tokens stand, as a rotary embedding should; any other depends on the place. The same stored numbers come
    of rotating first and of rotating, at the stored pairs' speeds, afterwards."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=4 * DIM, num_attention_heads=4, rope_parameters=rope))
    query, keys, values = uneven(64)

    def rotated(x: torch.Tensor, first: int) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, *rotary(x, torch.arange(first, first + 64)[None]))[0]

    fitted = moments(rotated(keys, 0), rotated(query, 0), values)
    change = {}
    for per_frequency in (True, False):
        part = fitted.fitted(LowRankKV(DIM, DIM, 2), per_frequency=per_frequency)
        projection = part.build(site(), "cpu")
        logits = [
            projection.queries(rotated(query, at)) @ projection.keys(rotated(keys, at)).repeat(1, 4, 1, 1).mT
            for at in (0, 1000)
        ]
        change[per_frequency] = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert change[True] < 1e-4 < 0.01 < change[False]


def test_every_frequency_kept_is_exact_and_losses_follow_the_singular_values():
    query, keys, values = tokens(1, 100)
    fitted = moments(keys, query, values)
    joint = torch.block_diag(*fitted.queries.unflatten(0, (2, 2)).sum(1))
    for find in (least_loss, lambda *a: least_loss_by_frequency(*a, DIM)):
        stored, asked = find(fitted.keys, joint, 2 * DIM)
        torch.testing.assert_close(asked @ stored.mT, torch.eye(2 * DIM, dtype=torch.float64), atol=1e-8, rtol=0)
    assert len(encoded(stored)) == -(-4 * DIM * DIM * 2 // 3) * 4


# Layers in pairs


def pair(part: DepthMergedKV, score=None) -> tuple[KVOption, KVOption]:
    return KVOption(score, part), KVOption(score, replace(part, is_deeper=True))


def two_layers(part: DepthMergedKV, keys, values, differ: float, length: int = 160):
    first, deeper = (o.build(site(), batch_size=1, capacity_tokens=length, dtype="F32") for o in pair(part))
    deeper.join(first)
    generator = torch.Generator().manual_seed(7)
    others = [2.0 * x + differ * torch.randn(x.shape, generator=generator) for x in (keys, values)]
    done = 0
    for step in (100, 1, length - 101):
        at = slice(done, done + step)
        first.append(keys[:, :, at], values[:, :, at])
        deeper.append(*(x[:, :, at] for x in others))
        done += step
    return first, deeper, others


def test_layers_of_one_direction_are_merged_without_loss():
    _, keys, values = tokens(1, 160)
    first, deeper, others = two_layers(DepthMergedKV(False, 0, 32, 0), keys, values, 0.0)
    for layer, expected in ((first, (keys, values)), (deeper, others)):
        for found, x in zip(layer.packed.read(0, 5), expected):
            torch.testing.assert_close(
                found, x, atol=0, rtol=4e-3
            )  # lengths in float16, and an arc of 1e-3 at the least


def test_the_tokens_that_differ_most_are_retained_by_both():
    _, keys, values = tokens(1, 160)
    part = DepthMergedKV(False, 0, 32, 0, 2)
    flipped = keys.clone()
    first, deeper = (o.build(site(), batch_size=1, capacity_tokens=160, dtype="F32") for o in pair(part))
    deeper.join(first)
    flipped[:, :, [40, 50]] *= -1
    first.append(keys, values)
    deeper.append(flipped, values)
    torch.testing.assert_close(first.packed.read(0, 5)[0], keys, atol=0, rtol=4e-3)
    torch.testing.assert_close(deeper.packed.read(0, 5)[0], flipped, atol=0, rtol=4e-3)
    assert torch.equal(deeper.packed.read(0, 5)[0][:, :, [40, 50]], flipped[:, :, [40, 50]])


def test_directions_meet_half_way_and_lengths_stay():
    _, keys, values = tokens(1, 160)
    first, deeper, others = two_layers(DepthMergedKV(False, 0, 32, 0, 1), keys, values, 1.0)
    found, its = first.packed.read(0, 5)[0], deeper.packed.read(0, 5)[0]
    torch.testing.assert_close(found.norm(dim=-1), keys.norm(dim=-1), atol=0, rtol=1e-3)
    torch.testing.assert_close(its.norm(dim=-1), others[0].norm(dim=-1), atol=0, rtol=1e-3)
    cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in ((found, keys), (its, others[0]))]
    retained = cosines[0] > 0.9999
    assert retained.sum() == 2 * 5  # one of each group and head
    torch.testing.assert_close(cosines[0][~retained], cosines[1][~retained], atol=1e-3, rtol=0)


def test_a_layer_turned_to_the_one_before_merges_what_shares_no_direction_as_it_is():
    """The deeper layer holds the first one's keys and values turned in all channels: turned back first, nothing is lost."""
    query, keys, values = tokens(1, 160)
    turn = torch.linalg.qr(torch.randn(2, DIM, DIM, generator=torch.Generator().manual_seed(3))).Q
    others = [x @ turn for x in (keys, values)]
    flat = [[x[0].double().transpose(0, 1).flatten(1) for x in some] for some in ((keys, values), others)]
    fitted = moments(others[0], query, others[1])
    fitted = replace(fitted, keys_with_before=flat[1][0].mT @ flat[0][0], values_with_before=flat[1][1].mT @ flat[0][1])
    options = pair(DepthMergedKV(False, 0, 32, 0, 1))
    errors = []
    for deeper in (options[1], replace(options[1], project=fitted.turned_to_before())):
        first, layer = (o.build(site(), batch_size=1, capacity_tokens=160, dtype="F32") for o in (options[0], deeper))
        layer.join(first)
        first.append(keys, values)
        layer.append(*others)
        found = layer.attend(query[:, :, -1:], scaling=SCALING)[0]
        expected = reference(query[:, :, -1:], *others, torch.zeros(1, 160, dtype=torch.bool))[0]
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < 0.01 < 0.3 < errors[0]


@pytest.mark.parametrize("bits", [0, 4])
def test_two_layers_hold_one_set_of_directions(bits):
    sizes = {"batch_size": 1, "dtype": "BF16"}
    first, deeper = pair(DepthMergedKV(False, bits, 64, 32, 4))
    wide = site(dim=64)
    grown = [
        sum(o.stored_bytes(wide, capacity_tokens=n, **sizes) for o in (first, deeper))
        for n in (95 + 64 * 110, 95 + 64 * 10)
    ]
    alone = KVOption(None, QuantizedKV(4, 4, 64, 32)) if bits else KVOption()
    one = [alone.stored_bytes(wide, capacity_tokens=n, **sizes) for n in (95 + 64 * 110, 95 + 64 * 10)]
    heads, groups = 2, 100
    lengths, retained, places = 2 * 2 * 2 * 64, 2 * 2 * 4 * 64 * 2, 2 * 4
    assert grown[0] - grown[1] == one[0] - one[1] + heads * groups * (lengths + retained + places)


def test_a_deeper_layer_alone_is_refused():
    _, keys, values = tokens(1, 160)
    option = KVOption(None, DepthMergedKV(True, 0, 32, 0))
    layer = option.build(site(), batch_size=1, capacity_tokens=160, dtype="F32")
    with pytest.raises(UsageError, match="was not joined"):
        layer.append(keys, values)
    plain = KVOption(None, PlainKV()).build(site(), batch_size=1, capacity_tokens=160, dtype="F32")
    with pytest.raises(UsageError, match="can't share directions"):
        layer.join(plain)
    with pytest.raises(UsageError, match="shares nothing"):
        KVOption(project=LowRankKV()).build(site(), batch_size=1, capacity_tokens=8, dtype="F32").join(plain)
    longer = KVOption(None, DepthMergedKV(False, 0, 32, 0)).build(
        site(), batch_size=1, capacity_tokens=320, dtype="F32"
    )
    with pytest.raises(UsageError, match="different tokens or heads"):
        layer.join(longer)
