"""Resident tensors are private, aligned and exactly declared; mapped ones are the file's pages; cut files are refused."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from haversack.describe.checkpoint import Checkpoint, CheckpointTensor
from haversack.errors import CheckpointError
from haversack.formats.safetensors_file import SafetensorsWriter
from haversack.formats.tiers import map_file, read_resident
from haversack.ledger import StoredTensor, total_bytes

TENSORS = {
    "codes": torch.arange(64 * 100, dtype=torch.uint8).reshape(100, 64),
    "scales": torch.randn(3, 7).to(torch.float16),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
    "odd": torch.arange(5, dtype=torch.int8),
}
DECLARED = [
    StoredTensor("codes", "U8", (100, 64)),
    StoredTensor("scales", "F16", (3, 7)),
    StoredTensor("empty", "F32", (0, 5)),
    StoredTensor("scalar", "BF16", ()),
    StoredTensor("odd", "I8", (5,)),
]


@pytest.fixture
def spans(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, DECLARED) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.finish()
    return Checkpoint.open(path).tensors


@pytest.mark.parametrize("bring", [read_resident, map_file])
def test_both_tiers_hold_what_was_written(spans, bring):
    brought = bring(spans.values())
    assert set(brought) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert brought[name].dtype == tensor.dtype and brought[name].equal(tensor)
    assert brought["codes"].data_ptr() % 64 == 0


def test_resident_bytes_are_the_declared_bytes(spans):
    read_bytes = []
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        brought = read_resident(spans.values(), read_bytes.append)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in brought.values()}
    assert sum(storages.values()) == total_bytes(DECLARED) == sum(read_bytes) == allocated


def test_mapping_takes_no_private_memory(tmp_path):
    path = tmp_path / "big.safetensors"
    declared = [StoredTensor("t", "U8", (32 << 20,))]
    with SafetensorsWriter(path, declared) as writer:
        writer.write_pieces("t", [bytes(32 << 20)])
        writer.finish()
    # RLIMIT_DATA is what `--cap` sets: a map must not count against it, resident tensors must.
    code = """
import resource, sys, torch
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.measure_machine import own_pages
from haversack.formats.tiers import map_file, read_resident
torch.ones(1).sum()
spans = Checkpoint.open(sys.argv[1]).tensors.values()
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (8 << 20),) * 2)
before = own_pages()[0]
assert int(map_file(spans)["t"].max()) == 0
assert own_pages()[0] - before < 4 << 20, "mapped pages became private"
try:
    read_resident(spans)
    raise SystemExit("the limit did not count resident tensors")
except RuntimeError as error:
    assert "allocate" in str(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("bring", [read_resident, map_file])
def test_a_cut_or_missing_file_is_refused(spans, bring):
    path = spans["codes"].file
    os.truncate(path, spans["codes"].stop - 3)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        bring(spans.values())
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        bring(spans.values())


def test_a_tensor_between_elements_is_refused_mapped_and_read_resident(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.uint8)}, path)
    spans = Checkpoint.open(path).tensors
    odd = CheckpointTensor("x", path, "F16", (1,), spans["a"].start + 1, spans["a"].start + 3)
    with pytest.raises(CheckpointError, match="no multiple of its 2-byte elements"):
        map_file([odd])
    assert read_resident([odd])["x"].view(torch.uint8).tolist() == [1, 1]
