"""The window hands out the right layer, never holds more than declared, survives broken passes and reports cut files."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.describe.checkpoint import CheckpointTensor
from haversack.engine import streaming
from haversack.engine.streaming import PAGE_BYTES, StreamWindow, window_tensors
from haversack.errors import CheckpointError
from haversack.formats.safetensors_file import SafetensorsWriter, layout
from haversack.ledger import StoredTensor, total_bytes


def layer(index: int, rows: int = 50) -> list[StoredTensor]:
    return [
        StoredTensor(f"layers.{index}.codes", "U8", (rows, 64)),
        StoredTensor(f"layers.{index}.scales", "F16", (rows, 3)),
        StoredTensor(f"layers.{index}.zeros", "U8", (rows, 1)),
    ]


def values(tensor: StoredTensor, index: int) -> torch.Tensor:
    dtype = {"U8": torch.uint8, "F16": torch.float16}[tensor.dtype]
    return (torch.arange(tensor.num_bytes) * 7 + index).to(torch.uint8).view(dtype).reshape(tensor.shape)


def write(folder, num_layers: int, rows=lambda index: 50) -> list[list[CheckpointTensor]]:
    layers = [layer(index, rows(index)) for index in range(num_layers)]
    halves = [layers[: num_layers // 2], layers[num_layers // 2 :]]
    groups: list[list[CheckpointTensor]] = []
    for shard, half in enumerate(halves):
        declared = [tensor for group in half for tensor in group]
        with SafetensorsWriter(folder / f"{shard}.safetensors", declared) as writer:
            for group in half:
                for tensor in group:
                    writer.write(tensor.name, values(tensor, len(groups)))
                groups.append([writer.spans[tensor.name] for tensor in group])
            writer.finish()
    return groups


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def check(tensors: dict[str, torch.Tensor], groups, index: int) -> None:
    assert set(tensors) == {tensor.name for tensor in groups[index]}
    for tensor in groups[index]:
        got = tensors[tensor.name]
        assert got.view(torch.uint8).equal(values(tensor.stored, index).view(torch.uint8))
        assert got.data_ptr() % (64 if tensor.name.endswith("codes") else got.element_size()) == 0


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_layers_come_in_order_and_wrap_around(tmp_path, direct, num_buffers):
    groups = write(tmp_path, 5, lambda index: 10 + 30 * index)
    with StreamWindow(groups, num_buffers, direct=direct) as window:
        for index in [*range(5)] * 3:
            check(window.acquire(index), groups, index)
            window.release(index)
        statistics = window.statistics
        assert window.window_bytes == total_bytes(window_tensors(groups, num_buffers))
    assert statistics.num_reads >= 15 and statistics.stall_seconds > 0 and statistics.read_seconds > 0
    data_bytes = sum(tensor.num_bytes for group in groups for tensor in group)
    assert statistics.bytes_read >= 3 * data_bytes


def test_the_next_layer_is_read_while_one_is_held(tmp_path):
    groups = write(tmp_path, 4)
    with StreamWindow(groups, 2) as window:
        window.acquire(0)
        deadline = time.monotonic() + 20
        while window.statistics.num_reads < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert window.statistics.num_reads == 2  # layer 1 is there; layer 2 has no buffer yet
        time.sleep(0.02)
        assert window.statistics.num_reads == 2
        before = window.statistics.stall_seconds
        window.acquire(1)
        assert window.statistics.stall_seconds - before < 0.02


def test_a_window_that_holds_all_layers_reads_each_once(tmp_path):
    groups = write(tmp_path, 3)
    with StreamWindow(groups, 8) as window:
        assert len(window.declared) == 3
        for index in [0, 1, 2, 0, 1, 2, 0, 2, 1, 0]:
            check(window.acquire(index), groups, index)
            window.release(index)
        assert window.statistics.num_reads == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30), st.integers(1, 4), st.integers(2, 4))
def test_any_order_gives_the_right_tensors(tmp_path_factory, steps, num_buffers, num_layers):
    groups = write(tmp_path_factory.mktemp("stream"), num_layers)
    with StreamWindow(groups, num_buffers) as window:
        for index, again in steps:
            index %= num_layers
            check(window.acquire(index), groups, index)
            if again:
                check(window.acquire(index), groups, index)
            window.release(index)
            window.release(index)  # releasing twice does nothing


def test_a_broken_pass_is_released_and_the_next_starts_at_the_first_layer(tmp_path):
    groups = write(tmp_path, 4)
    with StreamWindow(groups, 2) as window:
        for index in (0, 1):
            window.acquire(index)  # both held: the forward pass raised
        with pytest.raises(RuntimeError, match="hold 0, 1: release first"):
            window.acquire(2)
        window.release_all()
        for index in range(4):
            check(window.acquire(index), groups, index)
            window.release(index)


def test_the_window_is_planned_without_files_and_allocates_what_it_declares(tmp_path):
    declared = [layer(index, 10 + index) for index in range(3)]
    spans, _ = layout("not-written", [tensor for group in declared for tensor in group])
    planned = window_tensors([[spans[tensor.name] for tensor in group] for group in declared], 2)
    assert all(tensor.num_bytes % PAGE_BYTES == 0 for tensor in planned)
    groups = write(tmp_path, 3)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        window = StreamWindow(groups)
        for index in range(3):
            window.acquire(index)
            window.release(index)
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert held == window.window_bytes == total_bytes(window.declared)
    window.close()
    largest = max(sum(tensor.num_bytes for tensor in group) for group in groups)
    assert held <= 2 * (largest + 8 * PAGE_BYTES)


def test_a_file_cut_while_streaming_is_reported_and_stays_reported(tmp_path):
    groups = write(tmp_path, 4)
    for direct in (True, False):
        with StreamWindow(groups, 2, direct=direct) as window:
            window.acquire(0)
            os.truncate(groups[3][0].file, groups[3][1].stop - 1)
            with pytest.raises(CheckpointError, match=r"ends inside tensor 'layers\.[23]"):
                for index in range(1, 8):
                    window.release((index - 1) % 4)
                    window.acquire(index % 4)
            with pytest.raises(CheckpointError):
                window.acquire(0)


def test_a_missing_file_is_refused_at_once_and_leaves_nothing_open(tmp_path):
    groups = write(tmp_path, 4)
    groups[3][0].file.unlink()
    before = num_open_files()
    with pytest.raises(CheckpointError, match="can't be read"):
        StreamWindow(groups)
    assert num_open_files() == before


def test_closing_stops_threads_and_closes_files(tmp_path):
    groups = write(tmp_path, 4)
    threads, files = threading.active_count(), num_open_files()
    window = StreamWindow(groups)
    window.acquire(0)
    window.close()
    window.close()
    assert (threading.active_count(), num_open_files()) == (threads, files)
    with pytest.raises(RuntimeError, match="closed"):
        window.acquire(1)


def test_reads_larger_than_a_request_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE_BYTES", 2 * PAGE_BYTES)
    groups = write(tmp_path, 2, lambda index: 1000)
    with StreamWindow(groups, 1) as window:
        for index in (0, 1):
            check(window.acquire(index), groups, index)
            window.release(index)


def test_empty_layers_and_tensors_are_allowed(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, [StoredTensor("e", "F32", (0, 3)), StoredTensor("t", "U8", (5,))]) as writer:
        writer.write("e", torch.empty(0, 3))
        writer.write("t", torch.arange(5, dtype=torch.uint8))
        writer.finish()
    groups = [[writer.spans["e"]], [], [writer.spans["t"], writer.spans["e"]]]
    with StreamWindow(groups, 2) as window:
        for _ in range(2):
            for index, group in enumerate(groups):
                assert list(window.acquire(index)) == [tensor.name for tensor in group]
                window.release(index)
