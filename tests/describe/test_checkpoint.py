"""Checkpoint files read as hostile: everything that can lie is made to lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from haversack.describe.checkpoint import (
    MAX_HEADER_BYTES,
    Checkpoint,
    dtype_name,
    require_finite,
    torch_dtype,
)
from haversack.describe.site import TensorSlice
from haversack.errors import CheckpointError, HaversackError, ModelNotFoundError, UnsafeCheckpointError
from haversack.ledger import DTYPE_BYTES

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.arange(60, dtype=torch.float16).reshape(3, 4, 5),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(7.0),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def write_raw(file: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_whole_tensors_are_read_as_saved(folder):
    checkpoint = Checkpoint.open(folder)
    for name, value in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == value.dtype and read.shape == value.shape and torch.equal(read, value), name
    assert checkpoint.num_bytes + checkpoint.header_bytes == (folder / "model.safetensors").stat().st_size


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region_is_what_indexing_gives(data, tmp_path_factory):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    folder = tmp_path_factory.mktemp("region")
    save_file({"pad": torch.zeros(3, dtype=torch.uint8), "x": value}, folder / "model.safetensors")
    ranges = []
    for n in shape:
        start = data.draw(st.integers(0, n))
        ranges.append((start, data.draw(st.integers(start, n)), data.draw(st.integers(1, 3))))
    read = Checkpoint.open(folder).read_region("x", ranges)
    assert torch.equal(read, value[tuple(slice(*r) for r in ranges)])


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (TensorSlice("a"), TENSORS["a"]),
        (TensorSlice("a", ((1, 3),)), TENSORS["a"][1:3]),
        (TensorSlice("a", ((0, 4), (2, 4)), transposed=True), TENSORS["a"][:, 2:4].T),
        (TensorSlice("c", ((1, 2),), squeeze=True), TENSORS["c"][1]),
        (
            TensorSlice("c", ((2, 3), (0, 4), (1, 5)), squeeze=True, transposed=True, row_step=2),
            TENSORS["c"][2].T[1::2],
        ),
    ],
)
def test_slices(folder, piece, expected):
    checkpoint = Checkpoint.open(folder)
    read = checkpoint.read(piece)
    assert torch.equal(read, expected) and read.is_contiguous()
    converted = checkpoint.read(piece, torch.float64)
    assert converted.dtype == torch.float64 and torch.equal(converted, expected.double())


def test_a_row_block_is_read_alone(folder, monkeypatch):
    import os

    read_bytes = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, bufs, at: read_bytes.append(sum(map(len, bufs))) or original(fd, bufs, at)
    )
    checkpoint = Checkpoint.open(folder)
    checkpoint.read(TensorSlice("a", ((1, 3),)))
    checkpoint.read(TensorSlice("c", ((1, 2), (2, 3)), squeeze=True))
    assert read_bytes == [2 * 6 * 4, 5 * 2]


def test_dtype_names_are_complete():
    for name in DTYPE_BYTES:
        assert dtype_name(torch_dtype(name)) == name
        assert torch_dtype(name).itemsize == DTYPE_BYTES[name]


def test_slices_outside_the_tensor_are_refused(folder):
    checkpoint = Checkpoint.open(folder)
    for piece in (TensorSlice("a", ((0, 5),)), TensorSlice("a", ((-1, 2),)), TensorSlice("b", ((0, 1), (0, 1)))):
        with pytest.raises(CheckpointError):
            checkpoint.read(piece)
    with pytest.raises(CheckpointError, match="'nowhere' is not in"):
        checkpoint.read("nowhere")


GOOD = entry([2], 0, 8)
LIES = {
    "no header": (b"", b"", 0, "too few"),
    "header beyond the file": ({"a": GOOD}, bytes(8), 10_000, "claims 10000 bytes"),
    "header beyond the limit": ({"a": GOOD}, bytes(8), MAX_HEADER_BYTES + 1, "claims"),
    "header of 2^64 - 1 bytes": ({"a": GOOD}, bytes(8), 2**64 - 1, "claims"),
    "no JSON": (b"{'a': 1}  ", b"", None, "no valid JSON"),
    "no UTF-8": (b"\xff\xfe{}      ", b"", None, "no valid JSON"),
    "nested without end": (b"[" * 100_000, b"", None, "no valid JSON"),
    "no object": ([1, 2, 3], b"", None, "no JSON object"),
    "tensor is no object": ({"a": 3}, b"", None, "lacks"),
    "tensor without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "lacks"),
    "unknown dtype": ({"a": entry([2], 0, 8, "F33")}, bytes(8), None, "unknown dtype 'F33'"),
    "dtype is a list": ({"a": entry([2], 0, 8, [])}, bytes(8), None, "unknown dtype"),
    "shape is negative": ({"a": entry([-2], 0, 8)}, bytes(8), None, "shape"),
    "shape is text": ({"a": entry("2", 0, 8)}, bytes(8), None, "shape"),
    "shape is a boolean": ({"a": entry([True, 2], 0, 8)}, bytes(8), None, "shape"),
    "shape is huge": ({"a": entry([2**62, 2**62], 0, 8)}, bytes(8), None, "takes"),
    "offsets run backwards": ({"a": entry([2], 8, 0)}, bytes(8), None, "span"),
    "one offset": ({"a": {**GOOD, "data_offsets": [0]}}, bytes(8), None, "offsets"),
    "offsets are floats": ({"a": {**GOOD, "data_offsets": [0.0, 8.0]}}, bytes(8), None, "offsets"),
    "bytes do not match the shape": ({"a": entry([3], 0, 8)}, bytes(8), None, "takes 12 bytes"),
    "overlap": ({"a": GOOD, "b": entry([2], 4, 12)}, bytes(12), None, "overlaps"),
    "gap": ({"a": GOOD, "b": entry([2], 12, 20)}, bytes(20), None, "gap"),
    "gap at the start": ({"a": entry([2], 4, 12)}, bytes(12), None, "gap"),
    "truncated": ({"a": GOOD}, bytes(7), None, "truncated"),
    "bytes nobody owns": ({"a": GOOD}, bytes(9), None, "no tensor owns"),
    "a name twice": (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}', bytes(4), None, "twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused_in_one_sentence(lie, tmp_path):
    header, data, length, says = LIES[lie]
    write_raw(tmp_path / "model.safetensors", header, data, length)
    if lie == "no header":
        (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    assert "model.safetensors" in message and message.endswith(".") and "\n" not in message and len(message) < 500


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_a_damaged_header_never_gives_a_traceback(position, value, cut, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    file = folder / "model.safetensors"
    if not (folder / "sound").exists():
        save_file(TENSORS, folder / "sound")
    data = bytearray((folder / "sound").read_bytes())
    data[position % len(data)] = value
    file.write_bytes(data[: len(data) - cut])
    try:
        checkpoint = Checkpoint.open(folder)
    except HaversackError:
        return
    assert cut == 0
    for name in checkpoint.tensors:  # still sound: every tensor can be read
        checkpoint.read(name)


def test_shards_with_an_index(tmp_path):
    write_shards(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert {n: t.file.name[:7] for n, t in checkpoint.tensors.items()} == {"a": "model-0", "b": "model-0"}
    assert torch.equal(checkpoint.read("b"), TENSORS["b"])
    (tmp_path / "model.safetensors.index.json").unlink()
    assert Checkpoint.open(tmp_path).tensors == checkpoint.tensors


def write_shards(folder: Path, **weight_map: str) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": TENSORS["a"]}, folder / names[0])
    save_file({"b": TENSORS["b"]}, folder / names[1])
    index = {"weight_map": {"a": names[0], "b": names[1], **weight_map}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"x": "model-00003-of-00002.safetensors"}, "missing"),
        ({"x": "model-00001-of-00002.safetensors"}, "in no shard"),
        ({"b": "model-00001-of-00002.safetensors"}, "b"),
        ({"x": "../model.safetensors"}, "same folder"),
        ({"x": "pytorch_model.bin"}, "same folder"),
        ({"x": 3}, "same folder"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, says):
    write_shards(tmp_path, **weight_map)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', "\x00", "[" * 50_000])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a shard index"):
        Checkpoint.open(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path):
    write_shards(tmp_path)
    save_file({"a": TENSORS["a"], "foreign": TENSORS["b"]}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'foreign'"):
        Checkpoint.open(tmp_path)


def test_shards_without_an_index_must_be_all_there(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors and in two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UnsafeCheckpointError, match="sandboxed"):
        Checkpoint.open(tmp_path)


def test_no_weights_and_no_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelNotFoundError, match="There is no folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_file_that_shrinks_after_it_was_opened(folder):
    checkpoint = Checkpoint.open(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    last = max(checkpoint.tensors.values(), key=lambda t: t.stop)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        checkpoint.read(last.name)


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    digests = set()
    variants = [
        TENSORS,
        {**TENSORS, "a": TENSORS["a"] + 1},
        {**TENSORS, "a": TENSORS["a"].reshape(6, 4)},
        {"a": TENSORS["a"]},
    ]
    for i, tensors in enumerate(variants):
        (tmp_path / str(i)).mkdir()
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
        digests.add(Checkpoint.open(tmp_path / str(i)).fingerprint())
    assert len(digests) == 4
    # The same tensors in shards are the same checkpoint.
    save_file({k: v for k, v in TENSORS.items() if k != "a"}, tmp_path / "rest.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "a.safetensors")
    assert Checkpoint.open(tmp_path).fingerprint() in digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(dtype, bad):
    tensor = torch.randn(33, 7).to(dtype)
    assert require_finite(tensor, "x") is tensor
    tensor[5, 3] = bad
    with pytest.raises(CheckpointError, match=r"'x' holds 1 values that are NaN or infinite, of 231"):
        require_finite(tensor, "x")


def test_finite_values_whose_sum_overflows_pass():
    require_finite(torch.full((4, 4), 3e38), "x")
