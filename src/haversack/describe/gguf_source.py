"""A GGUF file as a model folder: config and tokenizer, written once beside a note of where the file is.

The folder lies in the user's cache under a name made of the file's path, length and time. `Checkpoint.open` follows the note, so
that everything that takes a folder takes a file; no weight is copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.cache import cache_folder
from haversack.describe.gguf_blocks import GgufForm
from haversack.describe.gguf_families import checkpoint_name, config_from, family_of, is_rotated
from haversack.describe.gguf_file import GgufFile, GgufTensor
from haversack.errors import CheckpointError

if TYPE_CHECKING:
    from haversack.describe.checkpoint import CheckpointTensor

SUFFIX = ".gguf"
NOTE_NAME = "gguf.json"
"""In the folder: `{"file": absolute path}`."""

_PLAIN = ("F32", "F16", "BF16")


def folder_of(file: Path) -> Path:
    """The folder that stands for a GGUF file, made where there is none. Raises CheckpointError and UnsupportedModelError."""
    file = file.resolve()
    status = file.stat()
    key = hashlib.sha256(f"{file} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder("gguf") / f"{file.stem}-{key}"
    if not (folder / NOTE_NAME).is_file():
        opened = GgufFile.open(file)
        shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
        config = config_from(opened.metadata, shapes, file.name)
        config["dtype"] = "bfloat16" if _is_bfloat16(opened) else "float16"
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        if not _copy_tokenizer(opened, partial):
            _write_tokenizer(file, partial)
        (partial / NOTE_NAME).write_text(json.dumps({"file": str(file)}))
        try:
            partial.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def file_of(folder: Path) -> Path | None:
    """The GGUF file that a folder stands for, or None for an ordinary folder. Raises CheckpointError where it is gone."""
    try:
        note = json.loads((folder / NOTE_NAME).read_text())
        file = Path(note["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not file.is_file():
        raise CheckpointError(
            f"{folder} stands for {file}, which is not there any more; name the file where it is now."
        )
    return file


def tensors_of(file: Path) -> tuple[dict[str, CheckpointTensor], int]:
    """A file's tensors by transformers' names, and the bytes that are no tensor's. Low-bit ones are seen as float16."""
    from haversack.describe.checkpoint import CheckpointTensor

    opened = GgufFile.open(file)
    family = family_of(opened.metadata.get("general.architecture"), file.name)
    heads = f"{family.architecture}.attention.head_count"
    num_heads = {
        ".attn_q.": opened.metadata.get(heads),
        ".attn_k.": opened.metadata.get(f"{heads}_kv") or opened.metadata.get(heads),
    }
    found: dict[str, CheckpointTensor] = {}
    for name, tensor in opened.tensors.items():
        seen = checkpoint_name(name) or name
        head_rows = 0
        if family.pairs and is_rotated(name):
            head_rows = _head_rows(tensor, next(n for word, n in num_heads.items() if word in name), file)
        kind = tensor.block.name
        if kind in _PLAIN and not head_rows:
            found[seen] = CheckpointTensor(seen, file, kind, tensor.shape, tensor.start, tensor.stop)
            continue
        num_axes = len(tensor.shape)
        if num_axes > 2 or (num_axes == 1 and kind not in _PLAIN):
            raise CheckpointError(
                f"Tensor {name!r} of {file.name} is {kind} of {num_axes} axes, where a matrix is due."
            )
        num_rows = tensor.shape[0]  # of a bias, a number each
        row_bytes = (tensor.stop - tensor.start) // num_rows
        part = CheckpointTensor(name, file, "U8", (num_rows, row_bytes), tensor.start, tensor.stop)
        form = GgufForm({"blocks": part}, f"GGUF's {kind}", kind, head_rows)
        dtype = kind if kind in _PLAIN else "F16"
        found[seen] = CheckpointTensor(seen, file, dtype, tensor.shape, tensor.start, tensor.stop, form=form)
    return found, file.stat().st_size - sum(tensor.stop - tensor.start for tensor in opened.tensors.values())


def _head_rows(tensor: GgufTensor, heads: Any, file: Path) -> int:
    if not isinstance(heads, int) or heads < 1 or tensor.shape[0] % (2 * heads):
        raise CheckpointError(
            f"Tensor {tensor.name!r} of {file.name} has {tensor.shape[0]} rows, which {heads!r} heads don't share; the file is "
            "damaged."
        )
    return tensor.shape[0] // heads


def _is_bfloat16(opened: GgufFile) -> bool:
    kinds: dict[str, int] = {}
    for tensor in opened.tensors.values():
        kinds[tensor.block.name] = kinds.get(tensor.block.name, 0) + tensor.stop - tensor.start
    return max(kinds, key=lambda kind: kinds[kind], default="") == "BF16"


def _copy_tokenizer(opened: GgufFile, folder: Path) -> bool:
    """Copy the tokenizer that lies beside a file, where it is the file's own: each of its tokens has the file's number."""
    home, tokens = opened.path.parent, opened.metadata.get("tokenizer.ggml.tokens")
    try:
        data = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"].items()
        if not tokens or any(number >= len(tokens) or tokens[number] != token for token, number in vocabulary):
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    for found in home.glob("tokenizer*.json"):
        shutil.copyfile(found, folder / found.name)
    return True


def _write_tokenizer(file: Path, folder: Path) -> None:
    """The file's tokenizer as transformers converts it, where the `gguf` package that it needs is there; who needs one
    without says what to do."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except (
        Exception
    ) as error:  # the package is missing, or the tokenizer is of a kind that transformers does not convert
        reason: Mapping[str, str] = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        (folder / "no-tokenizer.json").write_text(json.dumps(reason))
