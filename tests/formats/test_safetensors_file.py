"""Declared equals written; readers accept it; a kill at any point loses at most one tensor."""

import errno
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from haversack.describe.checkpoint import Checkpoint, torch_dtype
from haversack.errors import CheckpointError, OutputError
from haversack.formats import safetensors_file
from haversack.formats.safetensors_file import (
    SafetensorsWriter,
    file_order,
    hash_tensors,
    read_pieces,
    shards,
    total_file_bytes,
)
from haversack.ledger import DTYPE_BYTES, StoredTensor, total_bytes

DTYPES = sorted(DTYPE_BYTES)


def random_tensor(declared: StoredTensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if declared.dtype == "BOOL" else 256, (declared.num_bytes,), generator=generator)
    return raw.to(torch.uint8).view(torch_dtype(declared.dtype)).reshape(declared.shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


declarations = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=12
).map(lambda rows: [StoredTensor(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(rows)])


@settings(max_examples=40, deadline=None)
@given(declarations, st.randoms(use_true_random=False))
def test_written_in_any_order_reads_back_everywhere(tmp_path_factory, declared, rng):
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    tensors = {tensor.name: random_tensor(tensor, i) for i, tensor in enumerate(declared)}
    names = list(tensors)
    rng.shuffle(names)
    with SafetensorsWriter(path, declared, metadata={"format": "pt"}) as writer:
        for name in names:
            writer.write(name, tensors[name])
        hashes = writer.finish()
    assert path.stat().st_size == total_file_bytes(declared, {"format": "pt"})
    loaded = load_file(path)
    spans = Checkpoint.open(path).tensors
    assert {span.stored for span in spans.values()} == set(declared)
    assert dict(hash_tensors(spans.values())) == hashes
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor)
        assert b"".join(read_pieces(spans[name])) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        num_bytes = spans[name].num_bytes
        own = min(64, num_bytes & -num_bytes) if num_bytes else 1
        assert spans[name].start % own == 0
        if num_bytes % 64 == 0:
            assert spans[name].start % 64 == 0


def test_order_keeps_the_declared_order_within_an_alignment():
    declared = [StoredTensor(n, "U8", (b,)) for n, b in [("a", 3), ("b", 64), ("c", 128), ("d", 6), ("e", 64)]]
    assert [tensor.name for tensor in file_order(declared)] == ["b", "c", "e", "d", "a"]


@given(declarations, st.integers(1, 500))
def test_shards_keep_order_and_limit(declared, max_shard_bytes):
    cut = shards(declared, max_shard_bytes)
    assert [tensor for shard in cut for tensor in shard] == declared
    assert all(len(shard) == 1 or total_bytes(shard) <= max_shard_bytes for shard in cut)
    for before, after in itertools.pairwise(cut):
        assert total_bytes(before) + after[0].num_bytes > max_shard_bytes


def test_a_tensor_unlike_its_declaration_is_refused(tmp_path):
    with SafetensorsWriter(tmp_path / "a", [StoredTensor("t", "F16", (2, 2))]) as writer:
        for wrong in (torch.zeros(2, 2), torch.zeros(4, dtype=torch.float16)):
            with pytest.raises(ValueError, match="declared F16"):
                writer.write("t", wrong)
        with pytest.raises(ValueError, match="more than its 8 bytes"):
            writer.write_pieces("t", [b"123456", b"789"])
        with pytest.raises(ValueError, match="7 of its 8"):
            writer.write_pieces("t", [b"1234567"])
        assert writer.missing == ("t",)
        writer.write("t", torch.arange(4, dtype=torch.float16).reshape(2, 2).T)
        writer.finish()
    assert load_file(tmp_path / "a")["t"].equal(torch.tensor([[0, 2], [1, 3]], dtype=torch.float16))


def test_a_writer_resumes_where_it_stopped_and_trusts_no_damaged_tensor(tmp_path):
    declared = [StoredTensor(f"t{i}", "F32", (16,)) for i in range(4)]
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, declared) as writer:
        for tensor in declared[:3]:
            writer.write(tensor.name, torch.full((16,), 1.0))
        damaged = writer.spans["t1"].start
    with path.open("r+b") as file:
        file.seek(damaged)
        file.write(b"\xff")
    with writer.journal_path.open("ab") as journal:
        journal.write(b'{"tensor": "t3", "sha')  # the line a kill cut short
    with SafetensorsWriter(path, declared) as writer:
        assert writer.finished == {"t0", "t2"}
        for name in writer.missing:
            writer.write(name, torch.full((16,), 1.0))
        assert set(writer.finish()) == {"t0", "t1", "t2", "t3"}
    assert all(tensor.eq(1).all() for tensor in load_file(path).values())
    with SafetensorsWriter(path, [*declared[:3], StoredTensor("t3", "F32", (17,))]) as writer:
        assert writer.finished == frozenset()  # another declaration starts over
    writer.remove_journal()
    assert not writer.journal_path.exists()


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{src!r}]
from haversack.formats.safetensors_file import SafetensorsWriter
from haversack.ledger import StoredTensor
declared = [StoredTensor(f"t{{i}}", "U8", (65536,)) for i in range(120)]
print("ready", flush=True)
with SafetensorsWriter(Path({path!r}), declared) as writer:
    print(len(writer.finished), flush=True)
    for name in writer.missing:
        writer.write_pieces(name, [bytes([int(name[1:]) % 256]) * 65536])
    writer.finish()
"""


def test_killed_at_random_points_it_resumes_and_finishes(tmp_path):
    path = tmp_path / "a.safetensors"
    src = str(Path(safetensors_file.__file__).parents[2])
    script = KILLED.format(src=src, path=str(path))
    rng = random.Random(0)
    finished_before = []
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if attempt < 4:
            time.sleep(rng.uniform(0.0, 0.2))
            process.kill()
        rest = process.stdout.read().split()
        process.stdout.close()
        assert process.wait() in (0, -signal.SIGKILL) if attempt < 4 else process.wait() == 0
        finished_before += [int(word) for word in rest[:1]]
    assert finished_before == sorted(finished_before)  # nothing that was finished is redone
    loaded = load_file(path)
    assert all(loaded[f"t{i}"].eq(i % 256).all() and len(loaded[f"t{i}"]) == 65536 for i in range(120))


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    def full(fd, offset, num_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"needs 1\.00 MiB.* free; free some space"):
        SafetensorsWriter(tmp_path / "a", [StoredTensor("t", "U8", (2**20,))])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_keeps_what_is_finished(tmp_path, monkeypatch):
    declared = [StoredTensor("a", "U8", (64,)), StoredTensor("b", "U8", (64,))]
    with SafetensorsWriter(tmp_path / "a", declared) as writer:
        writer.write("a", torch.zeros(64, dtype=torch.uint8))
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OutputError, match="run again to resume"):
            writer.write("b", torch.zeros(64, dtype=torch.uint8))
        monkeypatch.undo()
    with SafetensorsWriter(tmp_path / "a", declared) as writer:
        assert writer.missing == ("b",)


def test_a_file_limit_of_the_system_is_explained(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="can't be written: File too large"):
            SafetensorsWriter(tmp_path / "a", [StoredTensor("t", "U8", (10_000,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_read_only_folder_is_explained(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may write anywhere, so the refusal is played
    with pytest.raises(OutputError, match="read-only"):
        SafetensorsWriter(tmp_path / "a", [StoredTensor("t", "U8", (1,))])


def test_a_file_cut_after_opening_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, [StoredTensor("t", "U8", (100,))]) as writer:
        writer.write("t", torch.zeros(100, dtype=torch.uint8))
        writer.finish()
    span = Checkpoint.open(path)["t"]
    os.truncate(path, span.stop - 1)
    with pytest.raises(CheckpointError, match="ends inside tensor 't'"):
        list(read_pieces(span))
    assert dict(hash_tensors([span])) == {"t": "cut short"}
