"""Where a model comes from: a local folder, a config file or dictionary, or a hub id (config first, weights on demand).

`HF_HUB_OFFLINE` and the hub's cache are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from haversack.describe import gguf_source
from haversack.errors import CheckpointError, ModelNotFoundError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_COMPANION_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "merges.*", "vocab.*", "LICENSE*")


@dataclass(frozen=True)
class ModelSource:
    """A config and where it was found. `folder` is local and may hold weights; `revision` is a hub commit."""

    name: str
    config: dict[str, Any]
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None


def find_source(source: str | Path | Mapping[str, Any], revision: str | None = None) -> ModelSource:
    """The config of a folder, a `config.json`, a dictionary or a hub id (`id` or `id@revision`); loads no weights.

    Raises ModelNotFoundError (no folder, no config, no such id) and CheckpointError (a config that is no JSON object).
    """
    if isinstance(source, Mapping):
        config = dict(source)
        return ModelSource(str(config.get("_name_or_path") or config.get("model_type") or "config"), config)
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = ""
            if (path / "adapter_config.json").is_file():
                hint = " It holds an adapter: name the folder of its base model."
            raise ModelNotFoundError(
                f"{text!r} has no config.json; point to a folder in the Hugging Face layout (config.json beside "
                f"*.safetensors).{hint}"
            )
        return ModelSource(path.resolve().name, read_config(path / "config.json"), folder=path)
    if path.is_file() and path.suffix == gguf_source.SUFFIX:
        folder = gguf_source.folder_of(path)
        return ModelSource(path.stem, read_config(folder / "config.json"), folder=folder)
    if path.is_file():
        if path.suffix != ".json":
            raise ModelNotFoundError(
                f"{text!r} is a file, but a model is a folder, a GGUF file, a config.json or a hub id."
            )
        name = path.resolve().parent.name if path.stem == "config" else path.stem  # `llama-70b.json` says what it is
        return ModelSource(name, read_config(path), folder=None)
    hub_id, _, asked = text.partition("@")
    if revision and asked and asked != revision:
        raise UsageError(f"{text!r} names revision {asked!r} and the call names {revision!r}; name one of them.")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(hub_id):
        raise ModelNotFoundError(f"There is no folder {text!r}, and it is no hub id (like owner/name); check the path.")
    return _from_hub(hub_id, revision or asked or None)


def read_config(file: Path) -> dict[str, Any]:
    """A config.json as a dictionary; CheckpointError where it is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} is no valid JSON ({str(error)[:120]}); download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(file)!r} holds a {type(config).__name__}, where a JSON object is due.")
    return config


def fetch_weights(hub_id: str, revision: str | None = None, *, quiet: bool = False) -> Path:
    """Download (or find in the cache) the safetensors and tokenizer files of a hub id; the local folder. The hub's own
    bars show what is left unless `quiet`. What an interrupted call has fetched is kept.

    Raises ModelNotFoundError where the hub does not have them, or can't be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = quiet and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[*_WEIGHT_PATTERNS, *_COMPANION_PATTERNS],
                local_files_only=_is_out_of_reach(),
            )
        )
    except Exception as error:
        raise _translated(error, hub_id, revision, "weights") from None
    finally:
        if silenced:
            enable_progress_bars()


def _from_hub(hub_id: str, revision: str | None) -> ModelSource:
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(hub_id, "config.json", revision=revision, local_files_only=_is_out_of_reach()))
    except Exception as error:
        raise _translated(error, hub_id, revision, "config.json") from None
    commit = file.parent.name if file.parent.parent.name == "snapshots" else revision
    # A snapshot that already holds the weights is a local folder like any other.
    folder = file.parent if any(file.parent.glob("*.safetensors")) and _is_complete(file.parent) else None
    return ModelSource(hub_id, read_config(file), folder=folder, hub_id=hub_id, revision=commit)


def _is_out_of_reach() -> bool:
    """Whether the hub's name has no address here: asking all the same would be tried again for half a minute."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or getproxies():  # a proxy finds the address itself
        return False
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


def _is_complete(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = set(read_config(index).get("weight_map", {}).values())
    return all((folder / str(shard)).is_file() for shard in shards)


def _translated(error: Exception, hub_id: str, revision: str | None, what: str) -> Exception:
    """One sentence for whatever huggingface_hub or the network raised."""
    from huggingface_hub import constants, errors

    at = f"{hub_id}@{revision}" if revision else hub_id
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(f"{at!r} is gated: accept its terms on the hub and log in with `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"There is no folder and no hub repository {at!r} (or it is private); check the name, or log in."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{hub_id!r} has no revision {revision!r} on the hub; name a branch, tag or commit.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return ModelNotFoundError(f"{at!r} on the hub has no {what}, so it is no transformers model.")
    if constants.HF_HUB_OFFLINE:
        why, way = "HF_HUB_OFFLINE forbids asking the hub", "unset HF_HUB_OFFLINE"
    else:
        why, way = f"{constants.ENDPOINT} can't be reached", "go online"
    return ModelNotFoundError(
        f"There is no folder {hub_id!r}, {what} of hub id {at!r} is not in the hub's cache, and {why}; "
        f"{way}, or name a local folder."
    )
