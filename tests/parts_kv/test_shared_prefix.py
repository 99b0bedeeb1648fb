"""What is shared between sequences, and what a step reads: as one softmax over everything, at bytes and reads that don't grow."""

from __future__ import annotations

import pytest
import torch
from tests.parts_kv.test_layer import DIM, SCALING, one_thread, run, site, tokens

from haversack.errors import DoesNotFitError, UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.pages import PagedKV
from haversack.parts.kv.shared_prefix import SharedPrefixKV

__all__ = ["one_thread"]

PREFIX = 40
SHARED = KVOption(None, SharedPrefixKV(PREFIX))


def shared(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of which the first are the same in every sequence."""
    out = tokens(batch, length)
    for x in out:
        x[1:, :, :PREFIX] = x[:1, :, :PREFIX]
    return out


def built(option: KVOption, batch: int, length: int):
    return option.build(site(), batch_size=batch, capacity_tokens=length, dtype="F32")


@pytest.mark.parametrize("steps", [[100], [30, 1, 69], [PREFIX, 20, 40], [1] * 100], ids=len)
@pytest.mark.parametrize("kwargs", [{}, {"softcap": 5.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str)
def test_prefix_and_suffix_together_are_one_softmax(steps, kwargs):
    inputs = shared(3, 100)
    expected = run(built(KVOption(), 3, 100), *inputs, steps, **kwargs)
    layer = built(SHARED, 3, 100)
    for found, plain in zip(run(layer, *inputs, steps, **kwargs), expected):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    assert layer.seen_tokens() == (100,) * 3 and layer.held_positions(1) == tuple(range(100))


def test_the_prefix_takes_the_same_bytes_for_any_batch():
    sizes = {"capacity_tokens": 100, "dtype": "BF16"}
    taken = [SHARED.stored_bytes(site(), batch_size=n, **sizes) for n in (1, 2, 16)]
    one_token = 2 * 2 * DIM * 2
    assert [n - PREFIX * one_token for n in taken] == [n * (100 - PREFIX) * one_token for n in (1, 2, 16)]
    layer = SHARED.build(site(), batch_size=16, device="cpu", **sizes)
    assert layer.num_bytes() == layer.max_bytes() == taken[2]


def test_padded_rows_read_the_prefix_where_they_stand():
    """Rows of different lengths reach the prefix's end in different chunks; each ends as it would alone."""
    lengths, total = (61, 97, 100), 100
    query, keys, values = tokens(3, total)
    for row, length in enumerate(lengths):
        for x in (query, keys, values):
            start = total - length
            x[row, :, start : start + PREFIX] = x[2, :, :PREFIX]
    real = torch.stack([torch.arange(total) >= total - n for n in lengths])
    layer, done, outputs = built(SHARED, 3, total), 0, []
    for step in (32, 32, 32, 1, 1, 2):
        at = slice(done, done + step)
        done += step
        part = (query[:, :, at], keys[:, :, at], values[:, :, at])
        outputs.append(layer.step(*part, scaling=SCALING, real=real[:, at])[0])
    together = torch.cat(outputs, 2)
    for row, length in enumerate(lengths):
        at = slice(total - length, total)
        alone = run(built(KVOption(), 1, total), *(x[row : row + 1, :, at] for x in (query, keys, values)), [length])[0]
        torch.testing.assert_close(together[row, :, at], alone[0], atol=1e-5, rtol=0)
    assert layer.seen_tokens() == lengths


@pytest.mark.parametrize("before", [20, 70])
def test_rows_are_reordered_copied_saved_and_taken_back(before):
    query, keys, values = shared(3, 100)
    layer, order = built(SHARED, 3, 100), torch.tensor([2, 0, 2])
    run(layer, *(x[:, :, :before] for x in (query, keys, values)), [before])
    rest = tuple(x[:, :, before:] for x in (query, keys, values))
    expected = run(layer.resized(torch.arange(3)), *rest, [100 - before])[0]
    twin = built(SHARED, 3, 100)
    twin.load_state(layer.state())
    assert torch.equal(run(twin, *rest, [100 - before])[0], expected)
    layer.reorder(order)
    moved = tuple(x[order] for x in rest)
    torch.testing.assert_close(run(layer, *moved, [100 - before])[0], expected[order], atol=1e-5, rtol=0)
    layer.crop(30)
    again = tuple(x[:, :, 70:] for x in (query[order], keys[order], values[order]))
    torch.testing.assert_close(run(layer, *again, [30])[0], expected[order][:, :, -30:], atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="of the shared prefix"):
        layer.crop(61)


def test_sequences_that_begin_otherwise_or_grow_too_long_are_refused_before_anything_is_written():
    query, keys, values = shared(3, 100)
    other = keys.clone()
    other[1, :, 25] += 1.0
    layer = built(SHARED, 3, 100)
    with pytest.raises(UsageError, match="sequence 1 does not begin with the 40 tokens"):
        layer.step(query, other, values, scaling=SCALING)
    assert layer.seen_tokens() == (0, 0, 0) and not layer.tensors["prefix.keys"].any()
    with pytest.raises(DoesNotFitError, match="101 tokens was asked"):
        layer.append(torch.cat([keys, keys[:, :, :1]], 2), torch.cat([values, values[:, :, :1]], 2))
    assert layer.seen_tokens() == (0, 0, 0)
    with pytest.raises(UsageError, match="prefix is not read yet"):
        layer.attend(query[:, :, :1], scaling=SCALING)


def test_nothing_is_shared_where_tokens_are_dropped_or_the_prefix_is_all():
    short = SHARED.stored(site(), batch_size=2, capacity_tokens=PREFIX, dtype="F32")
    windowed = SHARED.stored(site(window=16), batch_size=2, capacity_tokens=100, dtype="F32")
    assert [t.name for t in short] == [t.name for t in windowed] == ["keys", "values"]


# Pages


def test_a_step_reads_as_many_pages_at_any_length():
    inputs = tokens(2, 400)
    for length in (100, 200, 400):
        layer = built(KVOption(None, PagedKV(8, 6)), 2, length)
        run(layer, *(x[:, :, :length] for x in inputs), [60, length - 61, 1])
        assert layer.read_tokens == 48
    exact = built(KVOption(None, PagedKV(8, 50)), 2, 400)
    torch.testing.assert_close(
        run(exact, *inputs, [300, 99, 1])[0],
        run(built(KVOption(), 2, 400), *inputs, [300, 99, 1])[0],
        atol=1e-6,
        rtol=0,
    )


def test_the_pages_with_the_needle_are_read():
    """One key far back that the queries look for; sinks and the last pages are read anyway."""
    length, loud = 300, 123
    query, keys, values = tokens(1, length)
    keys[:, :, loud] = 6.0 * query[:, ::2, -1]
    keys[:, :, loud + 50] = -6.0 * query[:, ::2, -1]
    layer, whole = (built(option, 1, length) for option in (KVOption(None, PagedKV(8, 5)), KVOption()))
    query[:, 1::2, -1] = query[:, ::2, -1]
    found, expected = (run(one, query, keys, values, [length - 1, 1])[0][:, :, -1] for one in (layer, whole))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert (expected - values[:, :, loud].repeat_interleave(2, 1)).abs().max() < 0.05
    pages = layer._chosen(query[:, :, -1:], None)
    last = (length - 1) // 8
    assert all({0, loud // 8, last, last - 1} <= set(head) for head in pages[0].tolist())


def test_more_pages_are_never_far_worse_and_bounds_are_bounds():
    query, keys, values = tokens(1, 256)
    whole = run(built(KVOption(), 1, 256), query, keys, values, [255, 1])[0][:, :, -1]
    errors = []
    for read_pages in (5, 12, 20, 31):
        layer = built(KVOption(None, PagedKV(8, read_pages)), 1, 256)
        errors.append(float((run(layer, query, keys, values, [255, 1])[0][:, :, -1] - whole).norm()))
        for name, best in (
            ("page_least", keys.unflatten(2, (-1, 8)).amin(3)),
            ("page_largest", keys.unflatten(2, (-1, 8)).amax(3)),
        ):
            assert torch.equal(layer.tensors[name], best)
    assert errors[0] > 2 * errors[3] and errors[1] > errors[3]


def test_too_few_pages_are_refused():
    with pytest.raises(UsageError, match="read_pages is 3, but must be 4 or more"):
        PagedKV(32, 3)
    with pytest.raises(UsageError, match="page_tokens is 2"):
        PagedKV(2)
    with pytest.raises(UsageError, match="prefix_tokens is 0"):
        SharedPrefixKV(0)
