"""A model as Haversack sees it: every matrix, every layer's keys and values, and every byte of the rest.

Found from the module tree (built on torch's meta device) and from the checkpoint's names through transformers' own
conversion mapping, never from a list of architectures. A config alone is enough; a folder's checkpoint, where there
is one, is the truth for names, dtypes and shapes.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.attention import attention_sites
from haversack.describe.checkpoint import Checkpoint, dtype_name, holds_weights, torch_dtype
from haversack.describe.conversion import checkpoint_tensors, locate_parameters
from haversack.describe.experts import experts_per_token, share_of_experts
from haversack.describe.hub import ModelSource, find_source
from haversack.describe.layout import Layout
from haversack.describe.site import AttentionSite, WeightSite
from haversack.describe.skeleton import build_skeleton, kept_in_float32
from haversack.describe.weights import weight_sites
from haversack.errors import CheckpointError
from haversack.ledger import StoredTensor, total_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Model:
    """What there is to decide about, and what there is besides.

    `weights` and `rest` together are the parameters (and persistent buffers), each byte once: `rest` holds what is
    never packed (norms, biases, routers, sinks, anything outside the text decoder), by module name. `buffers` are made
    at load and lie in no checkpoint. `unused` are tensors of the folder's checkpoint that no parameter reads.
    `sources` says for each parameter where its numbers lie in the checkpoint, and `tied` which parameters share a
    storage (the kept name to the others). `quantized` says what of the checkpoint is stored in forms of fewer bits, and its
    bytes there. `cache_problem` says why no layer has an attention site, if none has: only
    transformers' own cache holds what such a model keeps. `experts_per_token` counts routed experts. `dtype` is the one that most bytes have. `widened`
    names parameters that transformers loads in float32 though the checkpoint has fewer bits.
    """

    name: str
    architecture: str
    model_type: str
    dtype: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    tie_word_embeddings: bool
    weights: tuple[WeightSite, ...]
    attention: tuple[AttentionSite, ...]
    rest: tuple[StoredTensor, ...]
    buffers: tuple[StoredTensor, ...]
    unused: tuple[StoredTensor, ...]
    config: Mapping[str, Any] = field(repr=False)
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    sources: Mapping[str, Layout] = field(default_factory=dict, repr=False, compare=False)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cache_problem: str = ""
    experts_per_token: int | None = None
    quantized: Mapping[str, int] = field(default_factory=dict, compare=False)
    widened: frozenset[str] = frozenset()

    @cached_property
    def held_rest(self) -> tuple[StoredTensor, ...]:
        """`rest` as it is held once it is loaded."""
        return tuple(
            StoredTensor(tensor.name, "F32", tensor.shape) if tensor.name in self.widened else tensor
            for tensor in self.rest
        )

    @cached_property
    def num_parameters(self) -> int:
        """Distinct numbers in the checkpoint that the model reads; tied storages once."""
        return sum(site.num_parameters for site in self.weights) + sum(prod(t.shape) for t in self.rest)

    @cached_property
    def num_bytes(self) -> int:
        """Their bytes in the checkpoint's own dtypes."""
        return sum(site.num_bytes for site in self.weights) + total_bytes(self.rest)

    @cached_property
    def num_experts(self) -> int:
        """Experts of the layer that has most of them, shared ones aside; 0 without."""
        return max((site.expert + 1 for site in self.weights if site.expert is not None), default=0)

    @cached_property
    def num_active_parameters(self) -> int:
        """Those that one token meets: of a layer's experts only as many as the router chooses."""
        experts = sum(site.num_parameters for site in self.weights if site.expert is not None)
        share = share_of_experts(max(1, self.num_experts), self.experts_per_token, 1)
        return self.num_parameters - experts + round(experts * share)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over the config (without names and versions) and all sites: the same model, the same digest."""
        config = {k: v for k, v in self.config.items() if k not in ("_name_or_path", "transformers_version")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for fact in (*self.weights, *self.attention, *self.rest):
            digest.update(repr(fact).encode())
        return digest.hexdigest()

    def site(self, site_id: str) -> WeightSite:
        """The weight site of this id."""
        return self._sites_by_id[site_id]

    @cached_property
    def _sites_by_id(self) -> dict[str, WeightSite]:
        return {site.id: site for site in self.weights}


def describe_model(
    source: str | Path | Mapping[str, Any], *, revision: str | None = None, trust_remote_code: bool = False
) -> Model:
    """Describe a local folder, a hub id (`id` or `id@revision`), a `config.json` or a config dictionary.

    Reads a config and, where the folder has safetensors, their headers; never a weight. A folder without weights, or a
    hub id whose weights are not cached, is described from its config in the dtype that the config names.

    Raises ModelNotFoundError, UnsupportedModelError and CheckpointError, each in one sentence.
    """
    with paused_collection():
        return _describe(find_source(source, revision), trust_remote_code)


@contextmanager
def paused_collection() -> Iterator[None]:
    """No cyclic garbage collection meanwhile: imports and 100,000 blocks live on, and walking them costs a third."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _describe(found: ModelSource, trust_remote_code: bool) -> Model:
    skeleton = build_skeleton(
        found.config,
        found.name,
        folder=str(found.folder or found.hub_id) if found.folder or found.hub_id else None,
        trust_remote_code=trust_remote_code,
    )
    checkpoint = Checkpoint.open(found.folder) if found.folder and holds_weights(found.folder) else None

    state, aliases = _distinct_state(skeleton)
    parameter_names = set(skeleton.state_dict().keys())
    if checkpoint is None:
        tensors = checkpoint_tensors(skeleton, state)
    else:
        tensors = {name: tensor.stored for name, tensor in checkpoint.tensors.items()}
    layouts, unused_names = locate_parameters(skeleton, tensors, parameter_names, found.name)
    unused = {name: tensors[name] for name in unused_names}
    _resolve_ties(layouts, state, aliases, tensors, unused, checkpoint)
    _check_shapes(layouts, state, found.name, checkpoint)

    decoder = _decoder_path(skeleton)
    attention, cache_problem = attention_sites(skeleton, decoder, found.name)
    dtypes = {name: tensors[layouts[name].blocks[0].tensor].dtype for name in state}
    sites = weight_sites(skeleton, decoder, layouts, dtypes, aliases)
    claimed = {f"{site.module}.{site.parameter}" for site in sites}
    rest = tuple(
        StoredTensor(name, dtypes[name], tuple(tensor.shape)) for name, tensor in state.items() if name not in claimed
    )
    config = skeleton.config.get_text_config(decoder=True)
    bytes_by_dtype: dict[str, int] = {}
    for stored in tensors.values():
        bytes_by_dtype[stored.dtype] = bytes_by_dtype.get(stored.dtype, 0) + stored.num_bytes
    dtype = max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])
    widened = kept_in_float32(skeleton, torch_dtype(dtype))
    return Model(
        name=found.name,
        architecture=type(skeleton).__name__,
        model_type=skeleton.config.model_type,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        tie_word_embeddings=any(site.role == "embedding" and site.tied_modules for site in sites),
        weights=sites,
        attention=attention,
        cache_problem=cache_problem,
        experts_per_token=experts_per_token(config.to_dict()),
        rest=rest,
        widened=frozenset(name for name in widened & set(state) if dtypes[name] != "F32"),
        buffers=tuple(
            StoredTensor(name, dtype_name(buffer.dtype), tuple(buffer.shape))
            for name, buffer in skeleton.named_buffers()
            if name not in parameter_names
        ),
        unused=tuple(unused.values()),
        config=found.config,
        folder=found.folder,
        hub_id=found.hub_id,
        revision=found.revision,
        sources=layouts,
        tied={kept: tuple(others) for kept, others in aliases.items() if others},
        quantized={} if checkpoint is None else checkpoint.forms,
    )


def _distinct_state(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The state dict with each storage once, under the name that is saved, and the other names of tied ones."""
    state = model.state_dict(keep_vars=True)
    tied = set(model.all_tied_weights_keys)
    by_identity: dict[int, list[str]] = {}
    for name, tensor in state.items():
        by_identity.setdefault(id(tensor), []).append(name)
    distinct: dict[str, torch.Tensor] = {}
    aliases: dict[str, list[str]] = {}
    for tied_names in by_identity.values():
        kept = next((name for name in tied_names if name not in tied), tied_names[0])
        distinct[kept] = state[kept]
        others = [name for name in tied_names if name != kept]
        if others:
            aliases[kept] = others
    return {name: distinct[name] for name in state if name in distinct}, aliases


def _resolve_ties(
    layouts: dict[str, Layout],
    state: dict[str, torch.Tensor],
    aliases: dict[str, list[str]],
    tensors: Mapping[str, StoredTensor],
    unused: dict[str, StoredTensor],
    checkpoint: Checkpoint | None,
) -> None:
    """Tied names share what is there, as in transformers: two equal copies are one; two different ones are not tied."""
    for kept, others in list(aliases.items()):
        if kept not in layouts:
            present = next((name for name in others if name in layouts), None)
            if present is not None:
                layouts[kept] = layouts.pop(present)
        for other in [name for name in others if name in layouts]:
            assert checkpoint is not None, "a saved checkpoint holds a tied storage once"
            first, second = layouts[kept].blocks[0].tensor, layouts[other].blocks[0].tensor
            if _equal_tensors(checkpoint, first, second):
                del layouts[other]
                unused[second] = tensors[second]
            else:
                aliases[kept] = [name for name in aliases[kept] if name != other]
                state[other] = state[kept]


def _equal_tensors(checkpoint: Checkpoint, first: str, second: str, chunk_rows: int = 4096) -> bool:
    import torch

    shape = checkpoint[first].shape
    if shape != checkpoint[second].shape or checkpoint[first].dtype != checkpoint[second].dtype:
        return False
    for start in range(0, shape[0], chunk_rows):
        ranges = [(start, min(start + chunk_rows, shape[0]), 1), *((0, n, 1) for n in shape[1:])]
        if not torch.equal(checkpoint.read_region(first, ranges), checkpoint.read_region(second, ranges)):
            return False
    return True


def _check_shapes(
    layouts: Mapping[str, Layout], state: Mapping[str, torch.Tensor], name: str, checkpoint: Checkpoint | None
) -> None:
    missing = [parameter for parameter in state if parameter not in layouts]
    where = str(checkpoint.folder) if checkpoint else "its own saved form"
    if missing:
        raise CheckpointError(
            f"The checkpoint of {name!r} lacks {len(missing)} of {len(state)} parameters that its config asks for, "
            f"first {missing[0]!r}; config and weights in {where!r} do not belong together."
        )
    for parameter, tensor in state.items():
        if layouts[parameter].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"Parameter {parameter!r} of {name!r} has shape {list(layouts[parameter].shape)} in the checkpoint, "
                f"but the config asks for {list(tensor.shape)}; config and weights do not belong together."
            )


def _decoder_path(model: PreTrainedModel) -> str:
    """The path prefix of the text decoder's modules: what lies beside it (a vision tower) is never packed."""
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    return path.rpartition(".")[0] + "." if "." in path else ""
