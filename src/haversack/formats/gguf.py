"""A packed folder written as one GGUF file, which llama.cpp runs.

    2 to 4-bit integers, symmetric, and 2 and 3-bit ones with zero points     Q4_0: the same values
    4-bit integers with zero points                                           Q5_0: the same values
    8-bit integers, symmetric                                                 Q8_0: the same values
    as is, or lossless codes                                                  the 16-bit matrix
    anything else                                                             what the caller asks for: Q8_0 of the matrix that the plan's
                                                                              option stands for, or that matrix in the model's dtype

GGUF's simple types have one float16 per 32 columns, so that larger groups repeat their scale: the same values in more bytes. llama.cpp
rounds the inputs of such products to 8 bits per 32 columns as it goes. Its caches are its own: no plan of a cache is said.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.gguf_families import Family, family_for, file_name, is_rotated, metadata_from
from haversack.describe.gguf_file import ARRAY, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, SCALARS, STRING, TYPES
from haversack.describe.site import WeightSite
from haversack.errors import OutputError
from haversack.formats.export import Change, Integers, Packed, integers_of, is_integer
from haversack.formats.output import check_output_file, sync_folder
from haversack.formats.safetensors_file import explained
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid

if TYPE_CHECKING:
    import torch

NAME = "gguf"
VERSION = 3
BLOCK_COLUMNS = 32

_FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
"""Types of tokens."""

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
"""How text is cut before it is tokenized, by its expression in tokenizer.json, as llama.cpp names it."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its name, shape and type in the file, and the site or the plain tensor that it is made of."""

    name: str
    shape: tuple[int, ...]
    kind: str
    site: WeightSite | None = None
    rest: str = ""

    @property
    def num_bytes(self) -> int:
        block = TYPES[NUMBERS[self.kind]]
        num_values = 1
        for length in self.shape:
            num_values *= length
        return num_values // block.num_values * block.num_bytes


def write(
    packed: Packed, output: Path, *, otherwise_bits: int = 8, progress: Callable[[int, int], None] | None = None
) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    """Write the file; sites that had to be changed, and notes. Holds one matrix at a time; the file gets its name when it is
    whole. Raises UnsupportedModelError for a family that GGUF is not written for, and OutputError."""
    family = family_for(packed.config, packed.model.name)
    check_output_file(output)
    if output.exists():
        raise OutputError(f"{output} exists already; choose another output or remove it first.")
    tensors = [*_matrices(packed, otherwise_bits), *_plain(packed)]
    tokenizer, notes = _tokenizer(packed)
    metadata = {**metadata_from(packed.config, family), "general.name": packed.model.name, **tokenizer}
    header, offsets = _header(metadata, tensors)
    num_bytes = offsets[-1] + tensors[-1].num_bytes
    partial = output.with_name(output.name + ".partial")
    tell = progress or (lambda done, total: None)
    with explained(output, num_bytes, resumable=False):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.truncate(num_bytes)
                file.write(header)
                for done, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
                    tell(done, len(tensors))
                    data = _data(packed, tensor, family)
                    assert data.numel() == tensor.num_bytes, f"{tensor.name} is not what was declared"
                    file.seek(offset)
                    file.write(data.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(output)
            sync_folder(output.absolute().parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    tell(len(tensors), len(tensors))
    return tuple(_changes(packed, tensors)), tuple(notes)


def _matrices(packed: Packed, otherwise_bits: int) -> Iterator[_Tensor]:
    for site in packed.model.weights:
        name = file_name(f"{site.module}.{site.parameter}")
        assert name is not None, f"{site.id} has no name in GGUF"
        kind = _same_values(packed.option(site), site) or _otherwise(packed.option(site), site, otherwise_bits)
        yield _Tensor(name, (site.out_features, site.in_features), kind, site=site)


def _same_values(option: WeightOption, site: WeightSite) -> str | None:
    """The type that holds an option's integers as they are, or None where there is none."""
    grid = option.grid
    if option.transforms or option.corrections or not is_integer(grid) or site.in_features % BLOCK_COLUMNS:
        return None
    if (grid.group_size or site.in_features) % BLOCK_COLUMNS:
        return None
    symmetric = not isinstance(grid, IntegerGrid) or grid.symmetric
    if grid.bits == 8:
        return "Q8_0" if symmetric else None
    return "Q4_0" if symmetric or grid.bits < 4 else "Q5_0"


def _otherwise(option: WeightOption, site: WeightSite, bits: int) -> str:
    keeps_all = option.lossless and not option.keeps_codes
    return _FLOATS[site.dtype] if keeps_all or bits == 16 or site.in_features % BLOCK_COLUMNS else "Q8_0"


def _plain(packed: Packed) -> Iterator[_Tensor]:
    """Norms and biases: llama.cpp wants them in 32 bits."""
    for name, tensor in packed.folder.rest_tensors().items():
        known = file_name(name)
        assert known is not None, f"{name} has no name in GGUF"
        yield _Tensor(known, tensor.shape, "F32", rest=name)


def _data(packed: Packed, tensor: _Tensor, family: Family) -> torch.Tensor:
    """The tensor's bytes, uint8."""
    import torch

    if tensor.site is None:
        values, order = packed.rest(tensor.rest).float(), None
    else:
        values, order = None, None
    if family.pairs and is_rotated(tensor.name):
        key_value = ".attn_k." in tensor.name
        heads = packed.config.get("num_key_value_heads") if key_value else None
        order = _paired(tensor.shape[0], heads or packed.config["num_attention_heads"])
    if tensor.site is None:
        assert values is not None
        return (values if order is None else values[order]).contiguous().reshape(-1).view(torch.uint8)
    rows = slice(None) if order is None else order
    option = packed.option(tensor.site)
    if _same_values(option, tensor.site) == tensor.kind:
        integers = integers_of(option, packed.tensors(tensor.site), tensor.site.in_features)
        assert integers is not None
        return _blocks_of(integers, rows, tensor.kind)
    matrix = packed.matrix(tensor.site)[rows]
    if tensor.kind == "Q8_0":
        return _q8_0(matrix)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.kind]
    return matrix.to(plain).contiguous().reshape(-1).view(torch.uint8)


def _paired(num_rows: int, num_heads: int) -> torch.Tensor:
    """Which of transformers' rows is each row of the file: the two halves of a head in turns."""
    import torch

    return torch.arange(num_rows).view(num_heads, 2, -1).transpose(1, 2).flatten()


def _blocks_of(integers: Integers, rows: slice | torch.Tensor, kind: str) -> torch.Tensor:
    """Blocks of 32 integers under their group's scale."""
    import torch

    codes, columns = integers.codes[rows], integers.codes.shape[1]
    group = torch.arange(0, columns, BLOCK_COLUMNS) // integers.group_size
    scales, zeros = integers.scales[rows][:, group], integers.zeros[rows][:, group]
    middle = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind]
    steps = codes.unflatten(1, (-1, BLOCK_COLUMNS)).short() - zeros.unsqueeze(-1).short() + middle  # (rows, blocks, 32)
    return _packed(scales, steps, kind)


def _packed(scales: torch.Tensor, steps: torch.Tensor, kind: str) -> torch.Tensor:
    """The bytes of blocks of float16 scales `(rows, blocks)` and integers `(rows, blocks, 32)`."""
    import torch

    scale = scales.contiguous().unsqueeze(-1).view(torch.uint8)
    if kind == "Q8_0":
        return torch.cat([scale, steps.to(torch.int8).view(torch.uint8)], -1).reshape(-1)
    codes = steps.to(torch.uint8)
    parts = [scale]
    if kind == "Q5_0":
        bits = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
        parts.append(bits.sum(-1, dtype=torch.uint8))
    low = codes & 15
    parts.append(low[..., :16] | low[..., 16:] << 4)
    return torch.cat(parts, -1).reshape(-1)


def _q8_0(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix rounded to 8 bits, as llama.cpp does it: the largest of 32 columns is 127 steps."""
    import torch

    blocks = matrix.unflatten(1, (-1, BLOCK_COLUMNS))
    scale = blocks.abs().amax(-1) / 127
    steps = torch.where(scale.unsqueeze(-1) == 0, 0.0, blocks / scale.unsqueeze(-1)).round()
    return _packed(scale.half(), steps, "Q8_0")


def _changes(packed: Packed, tensors: list[_Tensor]) -> Iterator[Change]:
    for tensor in tensors:
        if tensor.site is None:
            continue
        option, site = packed.option(tensor.site), tensor.site
        own_bytes = option.stored_bytes(site.out_features, site.in_features, site.dtype)
        bits = f"{8 * tensor.num_bytes / site.num_parameters:.2f} bits for {8 * own_bytes / site.num_parameters:.2f}"
        if _same_values(option, site) == tensor.kind or option.code is not None:
            yield Change(site.id, option.label, f"the same values in {tensor.kind} ({bits})")
        elif not option.is_neutral:
            yield Change(site.id, option.label, f"its values rounded to {tensor.kind} ({bits})")


def _header(metadata: Mapping[str, Any], tensors: list[_Tensor]) -> tuple[bytes, list[int]]:
    """Everything before the data, padded, and where each tensor begins in the file."""
    infos, offsets, at = b"", [], 0
    for tensor in tensors:
        at = -(-at // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
        shape = tuple(reversed(tensor.shape))
        infos += _text(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, NUMBERS[tensor.kind], at)
        offsets.append(at)
        at += tensor.num_bytes
    pairs = b"".join(_text(key) + _value(value) for key, value in metadata.items())
    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)) + pairs + infos
    header += bytes(-len(header) % DEFAULT_ALIGNMENT)
    return header, [len(header) + offset for offset in offsets]


_NUMBER_OF = {letter: number for number, letter in SCALARS.items()}


def _value(value: Any) -> bytes:
    """A metadata value with its type: counts are unsigned 32-bit numbers, as llama.cpp reads them."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, _NUMBER_OF["i"], len(value), *value)
    letter = "?" if isinstance(value, bool) else "I" if isinstance(value, int) else "f"
    return struct.pack(f"<I{letter}", _NUMBER_OF[letter], value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tokenizer(packed: Packed) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's metadata, and notes: what llama.cpp would do otherwise. Byte-level BPE is said; others are left out."""
    try:
        data = json.loads((packed.folder.path / "tokenizer.json").read_text(encoding="utf-8"))
        model, cut = data["model"], _cut_of(data.get("pre_tokenizer"))
        vocabulary, merges = dict(model["vocab"]), [_pair(merge) for merge in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        model, cut = {}, None
    if model.get("type") != "BPE" or model.get("byte_fallback") or cut is None:
        left_out = (
            "the tokenizer is left out: it is no byte-level BPE with a tokenizer.json; llama.cpp takes token ids alone"
        )
        return {"tokenizer.ggml.model": "none"}, [left_out]
    size = packed.config["vocab_size"]
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for token, number in vocabulary.items():
        if number < size:
            tokens[number], types[number] = token, _NORMAL
    for added in data.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER
    found: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut}
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if merges:
        found["tokenizer.ggml.merges"] = merges
    for word, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = packed.config.get(f"{word}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            found[f"tokenizer.ggml.{key}_token_id"] = number
    found["tokenizer.ggml.add_bos_token"] = False
    template = packed.folder.path / "chat_template.jinja"
    if template.is_file():
        found["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
    notes = []
    if cut == "default":
        notes.append("llama.cpp does not know how this tokenizer cuts text, and cuts it its own way: ids may differ")
    return found, notes


def _pair(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _cut_of(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name of how text is cut; "default" for an unknown way, None where it is not byte by byte."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = next((step for step in steps if step.get("type") == "ByteLevel"), None)
    if byte_level is None:
        return None
    splits = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if len(steps) == 1 and byte_level.get("use_regex", True) and not byte_level.get("add_prefix_space"):
        return "gpt-2"
    return _CUTS.get(splits[0], "default") if len(splits) == 1 and len(steps) == 2 else "default"
