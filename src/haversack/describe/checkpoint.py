"""Safetensors files read as if they were hostile: headers are checked before a byte is believed, slices read alone.

Opening reads headers only (names, dtypes, shapes, byte ranges); reading a slice reads the smallest contiguous range of
the file that holds it, straight into its own memory. No pickle is ever opened. The format:
https://github.com/huggingface/safetensors#format (8 bytes of little-endian header length, JSON, data).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe import gguf_source
from haversack.describe.quantized import stored_forms
from haversack.describe.site import TensorSlice
from haversack.describe.stored_form import StoredForm
from haversack.errors import CheckpointError, ModelNotFoundError, UnsafeCheckpointError
from haversack.ledger import DTYPE_BYTES, StoredTensor

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation (safetensors 0.6, `MAX_HEADER_SIZE`)."""

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAMPLE_BYTES = 64

_TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    return getattr(torch, _TORCH_DTYPES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    word = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH_DTYPES.items() if torch_name == word)


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint: its file, dtype, shape, and the absolute byte range `[start, stop)` in the file.

    `form` says how the tensor is stored where it stands for several (then the range is the first one's, and dtype and shape
    are those of what they stand for).
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    form: StoredForm | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, of all that the tensor stands for."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def parts(self) -> tuple[CheckpointTensor, ...]:
        """What lies in files: the tensor itself, or those that it stands for."""
        return (self,) if self.form is None else tuple(self.form.parts.values())

    @property
    def stored(self) -> StoredTensor:
        return StoredTensor(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder's safetensors files, by name.

    Holds no file open and no data: a few hundred bytes per tensor. `header_bytes` is what the files spend on headers,
    so that tensors plus headers equal the files' sizes exactly.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, CheckpointTensor] = field(repr=False)
    header_bytes: int = 0

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check the headers of a folder's (or single file's) safetensors.

        Raises ModelNotFoundError (no such folder, no weights), UnsafeCheckpointError (only pickles) and CheckpointError
        (truncated, lying, overlapping, duplicate, missing or foreign).
        """
        folder = Path(folder)
        if not folder.exists():
            raise ModelNotFoundError(f"There is no folder {str(folder)!r}; name a folder with safetensors files.")
        files: tuple[Path, ...]
        index: dict[str, str] | None
        if (gguf := gguf_source.file_of(folder)) is not None:
            return cls(folder, (gguf,), *gguf_source.tensors_of(gguf))
        if folder.is_file():
            folder, files, index = folder.parent, (folder,), None
        else:
            files, index = _find_files(folder)
        tensors: dict[str, CheckpointTensor] = {}
        header_bytes = 0
        for file in files:
            found, num_bytes = _read_header(file)
            header_bytes += num_bytes
            for tensor in found:
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"Tensor {tensor.name!r} is in {tensors[tensor.name].file.name} and in {file.name}; a "
                        "checkpoint holds each tensor once, so these files do not belong together."
                    )
                tensors[tensor.name] = tensor
        if index is not None:
            _check_index(index, tensors)
        return cls(folder, files, _paired(tensors, folder), header_bytes)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> CheckpointTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"Tensor {name!r} is not in {str(self.folder)!r}, which holds {len(self.tensors)} tensors; the "
                "checkpoint does not belong to this config."
            ) from None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def forms(self) -> dict[str, int]:
        """Bytes of what is stored in forms of its own, by their titles."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.form is not None:
                found[tensor.form.title] = found.get(tensor.form.title, 0) + tensor.num_bytes
        return found

    def read(self, piece: TensorSlice | str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One slice `(rows, in_features)` (or a whole tensor, by name), in its own dtype or in `dtype`.

        Reads the smallest contiguous byte range that holds the slice: a row block or one expert is read alone; a block
        of columns (a part of a fused transposed projection) reads the rows it crosses and keeps its columns only.
        """
        if isinstance(piece, str):
            piece = TensorSlice(piece)
        shape = self[piece.tensor].shape
        if len(piece.index) > len(shape):
            raise CheckpointError(
                f"A slice of {len(piece.index)} axes was asked of {piece.tensor!r}, which has shape {list(shape)}."
            )
        ranges = [*piece.index, *((0, n) for n in shape[len(piece.index) :])]
        region = self.read_region(piece.tensor, [(start, stop, 1) for start, stop in ranges])
        if piece.squeeze:
            region = region.squeeze(0)
        if piece.transposed:
            region = region.transpose(0, 1)
        if piece.row_step != 1:
            region = region[:: piece.row_step]
        return region.contiguous() if dtype is None else region.to(dtype).contiguous()

    def read_region(self, name: str, ranges: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """`tensor[start:stop:step, ...]`, one range per axis, as a view into memory read for it alone."""

        tensor = self[name]
        for (start, stop, step), length in zip(ranges, tensor.shape, strict=True):
            if not (0 <= start <= stop <= length and step >= 1):
                raise CheckpointError(
                    f"Range {start}:{stop}:{step} was asked of an axis of length {length} of {name!r}; it lies outside."
                )
        if tensor.form is None:
            return read_stored(tensor, ranges)
        return tensor.form.region(ranges, read_stored).to(torch_dtype(tensor.dtype))

    def fingerprint(self) -> str:
        """A fast content hash, 64 hex digits: every tensor's name, dtype, shape, and 64 bytes from its middle.

        Tells checkpoints apart that differ in any name, shape or dtype, or in training (which moves nearly every
        number). An edit of single numbers elsewhere goes unseen; costs one small read per tensor.
        """
        digest = hashlib.sha256()
        handles: dict[Path, int] = {}
        try:
            for name in sorted(self.tensors):
                tensor = self.tensors[name]
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                for part in tensor.parts:
                    if part.file not in handles:
                        handles[part.file] = os.open(part.file, os.O_RDONLY)
                    length = min(_SAMPLE_BYTES, part.num_bytes)
                    middle = part.start + (part.num_bytes - length) // 2
                    digest.update(os.pread(handles[part.file], length, middle))
        finally:
            for handle in handles.values():
                os.close(handle)
        return digest.hexdigest()


def read_stored(tensor: CheckpointTensor, ranges: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """`tensor[start:stop:step, ...]` as it lies in its file."""
    import torch

    # Axes that are cut to one index move the start; the first axis that keeps more bounds the range; later ones
    # are read whole and cut in memory.
    element_bytes = DTYPE_BYTES[tensor.dtype]
    offset, axis = tensor.start, 0
    stride = tensor.num_bytes // element_bytes if tensor.shape else 1
    while axis < len(tensor.shape):
        stride = prod(tensor.shape[axis + 1 :])
        start, stop, _ = ranges[axis]
        offset += start * stride * element_bytes
        if stop - start != 1:
            break
        axis += 1
    lengths = [1] * axis
    if axis < len(tensor.shape):
        start, stop, _ = ranges[axis]
        lengths += [stop - start, *tensor.shape[axis + 1 :]]
    data = torch.empty(prod(lengths), dtype=torch_dtype(tensor.dtype))
    _read_exactly(tensor.file, offset, data)
    region = data.reshape(lengths)
    cuts = tuple(
        slice(0, None, step) if i <= axis else slice(start, stop, step) for i, (start, stop, step) in enumerate(ranges)
    )
    return region[cuts] if cuts else region


def _paired(tensors: dict[str, CheckpointTensor], folder: Path) -> dict[str, CheckpointTensor]:
    """The tensors, with those that stand for one in a form of its own as that one."""
    for base, (form, shape, dtype) in stored_forms(tensors, folder, read_stored).items():
        parts = list(form.parts.values())
        for part in parts:
            del tensors[part.name]
        first = parts[0]
        tensors[base] = CheckpointTensor(base, first.file, dtype, shape, first.start, first.stop, form=form)
    return tensors


def holds_weights(folder: Path | None) -> bool:
    """Whether there are files of weights in a folder."""
    return folder is not None and (any(folder.glob("*.safetensors")) or gguf_source.file_of(folder) is not None)


def require_finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor itself; CheckpointError where it holds NaN or infinity, counting them."""
    import torch

    # One pass without a mask: a finite sum has only finite terms. An infinite one may be an overflow: then count.
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
        num_bad = int((~torch.isfinite(tensor)).sum())
        if num_bad:
            raise CheckpointError(
                f"Tensor {name!r} holds {num_bad} values that are NaN or infinite, of {tensor.numel()}; nothing was "
                "packed. Check the download or the training run that wrote it."
            )
    return tensor


def _find_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    index_file = folder / _INDEX_NAME
    if index_file.is_file():
        index = _read_index(index_file)
        files = tuple(folder / shard for shard in sorted(set(index.values())))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{index_file.name} names {len(files)} shards, of which {len(missing)} are missing in {str(folder)!r}: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Download them again."
            )
        return files, index
    if (folder / _SINGLE_NAME).is_file():
        return (folder / _SINGLE_NAME,), None
    found = sorted(folder.glob("*.safetensors"))
    # Some repositories carry a second copy beside the shards (`consolidated.safetensors`): the shards are the model.
    shards = [file for file in found if _SHARD_NAME.fullmatch(file.name)]
    if shards:
        last = int(shards[0].name.split("-of-")[1].split(".")[0])
        if len(shards) != last:
            raise CheckpointError(
                f"{str(folder)!r} holds {len(shards)} of {last} shards and no index; download the missing ones again."
            )
    files = tuple(shards or found)
    if files:
        return files, None
    refuse_pickles(folder)
    raise ModelNotFoundError(
        f"{str(folder)!r} holds no *.safetensors file; point to a folder with the model's weights."
    )


def refuse_pickles(folder: Path | None) -> None:
    """Raise UnsafeCheckpointError, with the way to convert it, for a folder whose weights are pickles alone."""
    if folder is not None and (pickles := pickled_weights(folder)):
        raise UnsafeCheckpointError(
            f"{str(folder)!r} holds a pickle checkpoint only ({pickles[0]}), and loading a pickle can run code, so "
            "it is refused; convert it in a sandboxed process (no network, no secrets) with "
            f"torch.load(..., weights_only=True) and safetensors.torch.save_file(..., {_SINGLE_NAME!r}), "
            "and point to the result."
        )


def pickled_weights(folder: Path) -> list[str]:
    """Names of the folder's pickle files, where it holds no safetensors beside them."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)


def _read_index(file: Path) -> dict[str, str]:
    problem = f"{str(file)!r} is not a shard index: "
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{problem}it is no valid JSON ({error}). Download it again.") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{problem}it has no 'weight_map' of tensor names to files. Download it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{problem}it says that {name!r} is in {shard!r}, but a shard is a safetensors file in the same folder."
            )
    return weight_map


def _check_index(index: Mapping[str, str], tensors: Mapping[str, CheckpointTensor]) -> None:
    for name, shard in index.items():
        if name not in tensors or tensors[name].file.name != shard:
            where = f"in {tensors[name].file.name}" if name in tensors else "in no shard"
            raise CheckpointError(
                f"{_INDEX_NAME} says that tensor {name!r} is in {shard}, but it is {where}; index and shards do "
                "not belong together. Download them again."
            )
    extra = next((name for name in tensors if name not in index), None)
    if extra is not None:
        raise CheckpointError(
            f"{tensors[extra].file.name} holds tensor {extra!r}, which {_INDEX_NAME} does not name; index and shards "
            "do not belong together. Download them again."
        )


def _read_header(file: Path) -> tuple[list[CheckpointTensor], int]:
    """The tensors of one file in order of their bytes, and the bytes of its header; everything checked."""

    def bad(found: str) -> CheckpointError:
        return CheckpointError(f"{str(file)!r} is not a sound safetensors file: {found}. Download or convert it again.")

    file_bytes = file.stat().st_size
    if file_bytes < 10:
        raise bad(f"it has {file_bytes} bytes, too few for a header")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise bad(
                f"its header claims {length} bytes, where the file has {file_bytes} and the limit is {MAX_HEADER_BYTES}"
            )
        text = stream.read(length)
    if len(text) != length:
        raise bad("it ended while its header was read")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is no valid JSON ({str(error)[:120]})") from None
    if not isinstance(header, dict):
        raise bad("its header is no JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = [_parse_entry(file, name, entry, data_start, bad) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise bad(f"tensor {tensor.name!r} starts at byte {tensor.start}, where {end} is due: it {what}")
        end = tensor.stop
    if end != file_bytes:
        what = "truncated" if end > file_bytes else "followed by bytes that no tensor owns"
        raise bad(f"its tensors end at byte {end}, but the file has {file_bytes}: it is {what}")
    return tensors, data_start


def _parse_entry(file: Path, name: str, entry: Any, data_start: int, bad: Any) -> CheckpointTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise bad(f"tensor {name!r} has the unknown dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise bad(f"tensor {name!r} has the shape {shape!r}, where counts belong")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise bad(f"tensor {name!r} has the offsets {offsets!r}, where two counts belong")
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise bad(
            f"tensor {name!r} of shape {shape} in {dtype} takes {expected} bytes, but its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return CheckpointTensor(name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is named twice")
    return unique


def _read_exactly(file: Path, offset: int, data: torch.Tensor) -> None:
    """Fill a contiguous tensor from the file; CheckpointError where the file ends early."""
    import torch

    view = memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
    handle = os.open(file, os.O_RDONLY)
    try:
        done = 0
        for chunk in _chunks(view):
            while chunk:
                num_read = os.preadv(handle, [chunk], offset + done)
                if num_read == 0:
                    raise CheckpointError(
                        f"{str(file)!r} ended at byte {offset + done} while {len(view)} bytes from {offset} were read; "
                        "it was changed after it was opened."
                    )
                done += num_read
                chunk = chunk[num_read:]
    finally:
        os.close(handle)


def _chunks(view: memoryview, chunk_bytes: int = 1 << 30) -> Iterator[memoryview]:
    """At most 1 GiB at a time: Linux reads no more than 2 GiB - 4 KiB at once (read(2))."""
    for start in range(0, len(view), chunk_bytes):
        yield view[start : start + chunk_bytes]
