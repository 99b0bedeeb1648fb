"""A packed model's folder: an ordinary Hugging Face folder, plus packed tensors and a manifest that says what they are.

    config.json                   the source's, with quantization_config naming haversack and the manifest's hash
    generation_config.json, ...   copied from the source, as are the tokenizer's files
    model.safetensors             everything that was not packed, under its ordinary names
    packed-*.safetensors          packed tensors, named `<site id>.<tensor>`
    haversack.json                the manifest: layouts, files, and per site its option and tensors
    plan.json                     the plan that was executed

It is written as `DIR.partial`, where an interrupted pack resumes tensor by tensor, and renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from haversack.describe.checkpoint import Checkpoint, CheckpointTensor
from haversack.errors import CheckpointError, OutputError, PlanError
from haversack.formats.output import sync_folder, write_synced
from haversack.formats.safetensors_file import (
    SafetensorsWriter,
    explained,
    hash_tensors,
    shards,
    total_file_bytes,
)
from haversack.ledger import StoredTensor

if TYPE_CHECKING:
    import torch

QUANT_METHOD = "haversack"
BUDGET_KEY = "budget"
"""In the config of a folder whose sites come in blocks: null, so that `from_pretrained(DIR, budget=...)` may set it."""
FORMAT_VERSION = 1
MANIFEST_NAME = "haversack.json"
PLAN_NAME = "plan.json"
REST_NAME = "model.safetensors"
REST_METADATA = {"format": "pt"}
"""transformers wants to know which framework wrote a file."""

MAX_SHARD_BYTES = 5 * 10**9
"""As transformers shards by default, so that a broken download costs no more than that."""

COPIED = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What a model needs beside its weights. Code (`*.py`) is never copied."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorEntry(_Strict):
    """One stored tensor: where it is, what it is, and the SHA-256 of its bytes."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...] = Field(strict=False)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SiteEntry(_Strict):
    """One packed site: the option as `to_dict` wrote it, and its tensors by the names the option declares."""

    option: dict[str, Any]
    tensors: dict[str, TensorEntry]


class FileEntry(_Strict):
    """One safetensors file: all its bytes, and the SHA-256 of everything before its data."""

    num_bytes: int = Field(ge=10)
    header_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Strict):
    """`haversack.json`. `layouts` maps each layout name to its version; a reader refuses versions it does not know."""

    format_version: int
    layouts: dict[str, int]
    plan_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: dict[str, FileEntry]
    sites: dict[str, SiteEntry]
    rest: dict[str, TensorEntry]


@dataclass(frozen=True)
class PackedFolder:
    """An opened packed folder; only JSON and safetensors headers were read.

    `open` is the cheap check: the manifest against its hash in `config.json`, the plan against its hash, every file's
    length and header. `verify` reads and hashes every tensor.
    """

    path: Path
    manifest: Manifest
    plan_text: str

    @classmethod
    def open(cls, path: str | Path) -> PackedFolder:
        """Raises PlanError naming what is missing, malformed, or differs from what was packed."""
        path = Path(path)
        config = _read_json(path / "config.json")
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise PlanError(f"{path} is not a packed model: its config.json names no haversack quantization.")
        text = _read(path / MANIFEST_NAME)
        _check_version(path, quantization.get("version"), "config.json")
        if quantization.get("manifest_sha256") != _sha256(text):
            raise PlanError(
                f"{path / MANIFEST_NAME} differs from the manifest that was packed (its hash in config.json is another); "
                "undo the edit or pack again."
            )
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"{path / MANIFEST_NAME} is malformed: {_first_problem(error)}.") from None
        _check_version(path, manifest.format_version, MANIFEST_NAME)
        plan = _read(path / PLAN_NAME)
        if _sha256(plan) != manifest.plan_sha256:
            raise PlanError(f"{path / PLAN_NAME} differs from the plan that was packed; undo the edit or pack again.")
        folder = cls(path, manifest, plan.decode())
        folder._check_files()
        return folder

    @cached_property
    def tensors(self) -> dict[str, CheckpointTensor]:
        """Every tensor of every file by its name there, from headers alone."""
        found: dict[str, CheckpointTensor] = {}
        for name in self.manifest.files:
            found |= Checkpoint.open(self.path / name).tensors
        return found

    def site_tensors(self, site_id: str) -> dict[str, CheckpointTensor]:
        """A packed site's tensors by the names its option declares."""
        return {name: self.tensors[entry.name] for name, entry in self.manifest.sites[site_id].tensors.items()}

    def rest_tensors(self) -> dict[str, CheckpointTensor]:
        """What was not packed, by its ordinary name."""
        return {name: self.tensors[entry.name] for name, entry in self.manifest.rest.items()}

    def require_layouts(self, known: Mapping[str, int]) -> None:
        """Raise PlanError if tensors lie in a layout, or a version of one, that `known` does not have."""
        for name, version in self.manifest.layouts.items():
            if known.get(name) != version:
                raise PlanError(
                    f"{self.path} stores tensors in layout {name!r} version {version}, but this haversack reads "
                    f"{', '.join(f'{k} version {v}' for k, v in sorted(known.items()))}; pack again."
                )

    def verify(self, progress: Callable[[int], None] | None = None) -> int:
        """Hash every tensor; the bytes that were read. Raises PlanError naming the first three that differ.

        `progress` is called with the bytes of each tensor when it was read.
        """
        entries = {entry.name: entry for entry in _entries(self.manifest)}
        changed, read_bytes = [], 0
        for name, sha256 in hash_tensors(self.tensors.values()):
            if entries[name].sha256 != sha256:
                changed.append(name)
            read_bytes += self.tensors[name].num_bytes
            if progress is not None:
                progress(self.tensors[name].num_bytes)
        if changed:
            raise PlanError(
                f"{len(changed)} of {len(entries)} tensors in {self.path} differ from what was packed, "
                f"first {', '.join(changed[:3])}; the disk or a download damaged them, or they were edited: pack again."
            )
        return read_bytes

    def _check_files(self) -> None:
        for name, expected in self.manifest.files.items():
            file = self.path / name
            if file.parent != self.path or not file.is_file():
                raise PlanError(f"{file} is missing, but the manifest names it; copy the whole folder or pack again.")
            if (num_bytes := file.stat().st_size) != expected.num_bytes:
                raise PlanError(
                    f"{file} has {num_bytes} bytes, but {expected.num_bytes} were packed; copy it again or pack again."
                )
            if _header_sha256(file) != expected.header_sha256:
                raise PlanError(f"{file} has another header than was packed; undo the edit or pack again.")
        try:
            found = self.tensors
        except CheckpointError as error:
            raise PlanError(str(error)) from None
        entries = {entry.name: entry for entry in _entries(self.manifest)}
        if differing := sorted(set(entries) ^ set(found)):
            raise PlanError(f"{self.path}: manifest and files disagree on tensors, first {differing[0]!r}; pack again.")
        for name, entry in entries.items():
            tensor = found[name]
            if (tensor.file.name, tensor.dtype, tensor.shape) != (entry.file, entry.dtype, entry.shape):
                raise PlanError(
                    f"{self.path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)} in {tensor.file.name}, but the "
                    f"manifest says {entry.dtype} {list(entry.shape)} in {entry.file}; pack again."
                )


@dataclass(frozen=True)
class PackedSite:
    """What a site will store: its option as `to_dict` wrote it and the tensors the option declares. Sites that are
    streamed lie before the others, so that each layer is one stretch of a file. `places` of tensors in blocks say where their
    block lies in the order in which blocks are taken; others lie before all blocks."""

    option: Mapping[str, Any]
    stored: tuple[StoredTensor, ...]
    is_streamed: bool = False
    places: Mapping[str, int] = field(default_factory=dict)

    def place(self, name: str) -> int:
        return self.places.get(name, -1)


class PackedFolderWriter:
    """Writes a packed folder tensor by tensor into `DIR.partial`, resumes there, and renames it when it is whole.

    `sites` are written with `write_site`, in any order; `rest` with `write_rest`. All disk is reserved at once. Opening
    a partial folder again keeps every finished tensor (`missing_sites`, `missing_rest` say what is left); one left by
    another plan is refused. Raises OutputError if the output exists, is read-only or does not fit on the disk.
    """

    def __init__(
        self,
        output: str | Path,
        source: str | Path,
        *,
        plan_text: str,
        sites: Mapping[str, PackedSite],
        rest: Iterable[StoredTensor],
        layouts: Mapping[str, int],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.path = Path(output)
        self.partial = partial_path(self.path)
        self.source = Path(source)
        self.sites = dict(sites)
        self._plan = plan_text.encode()
        self._layouts = dict(layouts)
        self._config = _read_json(self.source / "config.json")
        if self.path.exists():
            raise OutputError(f"{self.path} exists already; choose another output or remove it first.")
        files = packed_files(self.sites, rest, max_shard_bytes)
        self._rest_names = {tensor.name for tensor in files[REST_NAME]}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._lock = -1
        self._claim()
        self._finished = self._is_whole(files)
        if not self._finished:
            try:
                for name, tensors in files.items():
                    metadata = REST_METADATA if name == REST_NAME else None
                    self._writers[name] = SafetensorsWriter(self.partial / name, tensors, metadata=metadata)
            except OutputError:
                self._abandon()
                raise
        self._writer_of = {tensor.name: name for name, tensors in files.items() for tensor in tensors}

    @property
    def missing_sites(self) -> tuple[str, ...]:
        """Ids of sites with tensors still to write, in the order they were given."""
        missing = set(self._missing())
        return tuple(
            site_id
            for site_id, site in self.sites.items()
            if any(f"{site_id}.{tensor.name}" in missing for tensor in site.stored)
        )

    @property
    def missing_rest(self) -> tuple[str, ...]:
        """Names of tensors outside packed sites that are still to write, in file order."""
        return tuple(name for name in self._missing() if name in self._rest_names)

    def write_site(self, site_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what a site's option stored; names, dtypes and shapes must be the declared ones."""
        declared = {tensor.name for tensor in self.sites[site_id].stored}
        if set(tensors) != declared:
            raise ValueError(f"site {site_id!r} stored {sorted(tensors)}, but declared {sorted(declared)}")
        for name, tensor in tensors.items():
            full = f"{site_id}.{name}"
            self._writers[self._writer_of[full]].write(full, tensor)

    def write_rest(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor that was not packed."""
        assert name in self._rest_names
        self._writers[REST_NAME].write(name, tensor)

    def copy_rest(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a tensor that was not packed from its bytes, piece by piece, so that it is never held whole."""
        assert name in self._rest_names
        self._writers[REST_NAME].write_pieces(name, pieces)

    def finish(self) -> PackedFolder:
        """Flush, write manifest and config, rename to the output; the folder, opened and checked."""
        if not self._finished:
            hashes = {name: writer.finish() for name, writer in self._writers.items()}
            self._write_manifest(hashes)
            self._finished = True
        for file in self.partial.glob("*.journal"):
            file.unlink()
        PackedFolder.open(self.partial)
        with explained(self.path, 0):
            sync_folder(self.partial)
            self.partial.rename(self.path)
            sync_folder(self.path.parent)
        self.close()
        return PackedFolder.open(self.path)

    def close(self) -> None:
        """Stop without finishing; a writer opened again resumes."""
        for writer in self._writers.values():
            writer.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Stop and remove what was written: nothing of it is of use."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> PackedFolderWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _missing(self) -> list[str]:
        return [name for writer in self._writers.values() for name in writer.missing]

    def _claim(self) -> None:
        """Make the partial folder ours: new, or left by a pack of this very plan."""
        with explained(self.path, len(self._plan)):
            if self.partial.exists():
                try:
                    left = (self.partial / PLAN_NAME).read_bytes()
                except OSError:
                    left = b""
                if left != self._plan:
                    raise OutputError(
                        f"{self.partial} was left by the interrupted packing of another plan; "
                        "remove it, or choose another output."
                    )
                self._take_lock()
                return
            # The plan comes into the folder before the folder gets its name, so that a partial folder always has one.
            fresh = self.partial.with_name(self.partial.name + ".new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            try:
                (fresh / PLAN_NAME).write_bytes(self._plan)
                fresh.rename(self.partial)
            except OSError:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            self._take_lock()

    def _take_lock(self) -> None:
        """One process at a time packs into a partial folder; the lock dies with its process."""
        self._lock = os.open(self.partial / PLAN_NAME, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OutputError(f"{self.partial} is being written by another process; wait for it to end.") from None

    def _is_whole(self, files: Mapping[str, list[StoredTensor]]) -> bool:
        """Whether an earlier run was stopped between the last tensor and the renaming."""
        try:
            folder = PackedFolder.open(self.partial)
        except PlanError:
            return False
        declared = {tensor for tensors in files.values() for tensor in tensors}
        return {tensor.stored for tensor in folder.tensors.values()} == declared

    def _abandon(self) -> None:
        """After a refusal at the start: keep finished tensors for a resume, else leave nothing behind."""
        self.close()
        if not any(writer.finished for writer in self._writers.values()):
            shutil.rmtree(self.partial, ignore_errors=True)

    def _write_manifest(self, hashes: Mapping[str, Mapping[str, str]]) -> None:
        def entry(full: str) -> TensorEntry:
            file = self._writer_of[full]
            span = self._writers[file].spans[full]
            return TensorEntry(file=file, name=full, dtype=span.dtype, shape=span.shape, sha256=hashes[file][full])

        manifest = Manifest(
            format_version=FORMAT_VERSION,
            layouts=self._layouts,
            plan_sha256=_sha256(self._plan),
            files={
                name: FileEntry(num_bytes=writer.file_bytes, header_sha256=_header_sha256(self.partial / name))
                for name, writer in self._writers.items()
            },
            sites={
                site_id: SiteEntry(
                    option=dict(site.option),
                    tensors={tensor.name: entry(f"{site_id}.{tensor.name}") for tensor in site.stored},
                )
                for site_id, site in self.sites.items()
            },
            rest={name: entry(name) for name in sorted(self._rest_names)},
        )
        text = manifest.model_dump_json(indent=1).encode()
        config = dict(self._config)
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "manifest_sha256": _sha256(text),
        }
        if any(site.places for site in self.sites.values()):
            config[BUDGET_KEY] = None
        with explained(self.path, len(text)):
            for pattern in COPIED:
                for file in sorted(self.source.glob(pattern)):
                    if file.is_file():
                        target = self.partial / file.relative_to(self.source)
                        target.parent.mkdir(exist_ok=True)
                        shutil.copyfile(file, target)
            write_synced(self.partial / MANIFEST_NAME, text)
            # Last, because a folder whose config agrees with its manifest counts as whole.
            write_synced(self.partial / "config.json", json.dumps(config, indent=2).encode() + b"\n")


def packed_files(
    sites: Mapping[str, PackedSite], rest: Iterable[StoredTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[StoredTensor]]:
    """The safetensors files of a packed folder and what each will hold; nothing is written."""
    files = {REST_NAME: list(rest)}
    in_order = sorted(sites.items(), key=lambda item: not item[1].is_streamed)
    rows = [(site.place(tensor.name), tensor.prefixed(site_id)) for site_id, site in in_order for tensor in site.stored]
    packed = [tensor for _, tensor in sorted(rows, key=lambda row: row[0])]
    cut = shards(packed, max_shard_bytes)
    for index, tensors in enumerate(cut, start=1):
        files[f"packed-{index:05d}-of-{len(cut):05d}.safetensors"] = tensors
    return files


def packed_disk_bytes(files: Mapping[str, Iterable[StoredTensor]]) -> int:
    """Disk that the safetensors files of a packed folder take, headers included."""
    return sum(
        total_file_bytes(tensors, REST_METADATA if name == REST_NAME else None) for name, tensors in files.items()
    )


def partial_path(output: str | Path) -> Path:
    """Where a folder lies until it is whole."""
    output = Path(output)
    return output.with_name(output.name + ".partial")


def unfinished_plan(output: str | Path) -> str | None:
    """The plan of an interrupted pack into `output`, to go on with it; None where there is none."""
    try:
        return (partial_path(output) / PLAN_NAME).read_text()
    except OSError:
        return None


def is_packed(path: str | Path) -> bool:
    """Whether a folder says it was packed by haversack; `PackedFolder.open` checks whether that is true."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _entries(manifest: Manifest) -> Iterable[TensorEntry]:
    for site in manifest.sites.values():
        yield from site.tensors.values()
    yield from manifest.rest.values()


def _check_version(path: Path, version: object, where: str) -> None:
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} was packed in format version {version!r} (says {where}), but this haversack reads version "
            f"{FORMAT_VERSION}; install the haversack that packed it, or pack again."
        )


def _first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints as one clause, and how many more there are."""
    problems = error.errors()
    where = ".".join(map(str, problems[0]["loc"])) or "the whole file"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {re.sub(r'[.]$', '', problems[0]['msg'])}{more}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path} can't be read: {error.strerror}; copy the whole folder or pack again.") from None


def _read_json(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        data = json.loads(text)
    except ValueError:
        raise PlanError(f"{path} is not JSON; restore it from the model's source.") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds a {type(data).__name__}, but must hold an object.")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _header_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        # A length that lies is cut at the file's end by `read`; the hash differs all the same.
        return _sha256(prefix + stream.read(min(int.from_bytes(prefix, "little"), file.stat().st_size)))
