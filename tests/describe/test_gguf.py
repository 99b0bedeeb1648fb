"""GGUF files: blocks of every type, headers that lie, models that are not read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from haversack.describe.gguf_blocks import dequantize
from haversack.describe.gguf_families import checkpoint_name, file_name
from haversack.describe.gguf_file import NUMBERS, TYPES, GgufFile
from haversack.describe.model import describe_model
from haversack.errors import CheckpointError, UnsupportedModelError

LOW_BIT = [block.name for block in TYPES.values() if block.num_values > 1]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, value: int | str | float) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    return text(key) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))


LLAMA = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def save(file: Path, metadata: dict = LLAMA, tensors: dict | None = None, *, version: int = 3, cut: int = 0) -> Path:
    """A file of zeros: `tensors` maps a name to (shape as in the file, type, offset)."""
    tensors = {"token_embd.weight": ((32, 8), 0, 0)} if tensors is None else tensors
    data = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    data += b"".join(pair(*item) for item in metadata.items())
    for name, (shape, kind, offset) in tensors.items():
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    data += bytes(-len(data) % 32) + bytes(32 * 8 * 4)
    file.write_bytes(data[: len(data) - cut])
    return file


@pytest.mark.parametrize("kind", LOW_BIT)
def test_blocks_stand_for_what_ggml_says(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'haversack[dev]'")
    block, rng = TYPES[NUMBERS[kind]], np.random.default_rng(0)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block.num_values, block.num_bytes)
    raw = rng.integers(0, 256, (5, 3 * block.num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(raw), kind).numpy()
    assert found.shape == expected.shape == (5, 3 * block.num_values)
    assert np.array_equal(found, expected, equal_nan=True)


def test_a_block_by_hand() -> None:
    block = np.zeros(18, np.uint8)
    block[:2] = np.array([0.5], np.float16).view(np.uint8)
    block[2] = 0x3F  # column 0 has code 15, column 16 code 3
    values = dequantize(torch.from_numpy(block)[None], "Q4_0")[0]
    assert values[0] == 0.5 * (15 - 8) and values[16] == 0.5 * (3 - 8) and values[1] == -4


def test_names_go_there_and_back() -> None:
    for name in ("token_embd.weight", "output_norm.weight", "blk.12.attn_q.bias", "blk.3.ffn_down.weight"):
        there = checkpoint_name(name)
        assert there is not None and file_name(there) == name
    assert checkpoint_name("rope_freqs.weight") is None and checkpoint_name("blk.0.ssm_a.weight") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 9}, "version 9"),
        ({"cut": 100}, "ends beyond the file"),
        ({"cut": 1100}, "bytes are due|ends beyond"),
        ({"tensors": {"a": ((32, 8), 99, 0)}}, "GGUF type 99"),
        ({"tensors": {"a": ((31, 8), 2, 0)}}, "no whole number of Q4_0 blocks"),
        ({"tensors": {"a": ((32, 8), 0, 0), "b": ((32, 8), 0, 64)}}, "overlaps"),
        ({"tensors": {"a": ((2**40, 2**20), 0, 0)}}, "ends beyond"),
        ({"tensors": {"a": ((1, 1, 1, 1, 1), 0, 0)}}, "5 axes"),
        ({"metadata": {**LLAMA, "general.alignment": 7}}, "alignment is 7"),
    ],
)
def test_headers_that_lie_are_refused(changes: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        GgufFile.open(save(tmp_path / "m.gguf", **changes))


def test_counts_beyond_sense_and_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1))
    with pytest.raises(CheckpointError, match="claims 1152921504606846976 tensors"):
        GgufFile.open(file)
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="does not begin as one"):
        describe_model(file)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({**LLAMA, "general.architecture": "mamba"}, "architecture 'mamba', but llama, qwen2, qwen3"),
        ({**LLAMA, "llama.expert_count": 8}, "several experts"),
        ({**LLAMA, "llama.rope.scaling.type": "yarn"}, "scaled rotations"),
        ({k: v for k, v in LLAMA.items() if "block_count" not in k}, "does not say its block_count"),
        ({**LLAMA, "llama.rope.dimension_count": 8}, "different widths"),
    ],
)
def test_models_that_are_not_read_are_refused_by_name(metadata: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        describe_model(save(tmp_path / "m.gguf", metadata))


def test_missing_matrices_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks .* parameters"):
        describe_model(save(tmp_path / "m.gguf"))
