"""The planned KV cache as transformers sees it: a `Cache` whose layers hold what the plan says, and no more.

`update()` hands the layer over to the attention function (see `engine.attention`) and returns only the new tokens. What
transformers asks about lengths is answered in columns of the padded batch, dropped tokens included, so that position
ids and masks stay right when tokens have gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, CacheLayerMixin

from haversack.describe.site import AttentionSite
from haversack.engine.attention import Handover
from haversack.errors import DoesNotFitError, PlanError, UnsupportedModelError, UsageError
from haversack.ledger import TIERS, StoredTensor, total_bytes
from haversack.parts.kv.base import KVLayer, KVOption, Selection
from haversack.parts.kv.episode_attention import EpisodeAttention
from haversack.units import format_bytes

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class KVPlan:
    """What every layer's cache holds, for `batch_size` sequences of at most `capacity_tokens`.

    `sites` and `options` go together, in layer order. `dtype` is the model's own, by its safetensors name.
    `prefill_chunk_tokens` is how many tokens of a prompt are computed at a time (None: all at once).
    """

    sites: tuple[AttentionSite, ...]
    options: tuple[KVOption, ...]
    batch_size: int
    capacity_tokens: int
    dtype: str
    prefill_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.options) or [site.layer for site in self.sites] != list(range(len(self.sites))):
            raise PlanError(
                f"a KV plan needs one option for each layer in order; it has {len(self.options)} options for layers "
                f"{[site.layer for site in self.sites]}."
            )
        for before, option in zip((None, *self.options), self.options):
            option.represent.check_joined(before)

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The distinct scores by which heads choose their tokens, in layer order."""
        scores = (one.score for option in self.options for one in (option.heads or (option,)))
        return tuple(dict.fromkeys(score for score in scores if isinstance(score, Selection)))

    @property
    def episodes(self) -> EpisodeAttention | None:
        """A score that sorts texts into episodes; None where no layer has one. Raises PlanError where layers would sort them differently."""
        found = [score for score in self.selections if isinstance(score, EpisodeAttention)]
        if len({(score.num_episodes, score.segment_tokens) for score in found}) > 1:
            raise PlanError(
                "layers sort texts into different episodes: give them one number of episodes and one length of segments."
            )
        return found[0] if found else None

    @property
    def spares_steps(self) -> bool:
        """Whether some layer reads less in steps than in chunks: what it loses is then seen token by token alone."""
        return any(one.represent.spares_steps for option in self.options for one in (option.heads or (option,)))

    @property
    def block_tokens(self) -> int | None:
        """Tokens after which some layer may want to be told what tokens are worth; None where none does."""
        told = [score.block_tokens for score in self.selections if score.weighed or isinstance(score, EpisodeAttention)]
        return min(told, default=None)

    def stored(self, batch_size: int | None = None, capacity_tokens: int | None = None) -> tuple[StoredTensor, ...]:
        """Every layer's declared tensors, for this plan or for another batch and length under the same options."""
        declared: list[StoredTensor] = []
        for site, option in zip(self.sites, self.options):
            tensors = option.stored(
                site,
                batch_size=batch_size or self.batch_size,
                capacity_tokens=capacity_tokens or self.capacity_tokens,
                dtype=self.dtype,
            )
            declared += [tensor.prefixed(site.id) for tensor in tensors]
        return tuple(declared)

    def max_bytes(self, tier: str = "device") -> int:
        return total_bytes(self.stored(), tier)

    def workspace_bytes(self, new_tokens: int) -> int:
        """The most bytes one layer's attention allocates for `new_tokens` per sequence; layers take turns."""
        return max(
            option.workspace_bytes(
                site,
                batch_size=self.batch_size,
                capacity_tokens=self.capacity_tokens,
                new_tokens=new_tokens,
                dtype=self.dtype,
            )
            for site, option in zip(self.sites, self.options)
        )

    def check_fits(self, batch_size: int, capacity_tokens: int) -> None:
        """Raise DoesNotFitError unless `batch_size` sequences of `capacity_tokens` stay within this plan's bytes.

        Fewer, longer sequences may; so may longer ones where old tokens are dropped.
        """
        declared = self.stored(batch_size, capacity_tokens)
        for tier in TIERS:
            asked, planned = total_bytes(declared, tier), self.max_bytes(tier)
            if asked <= planned:
                continue
            where = "" if tier == "device" else f" on the {tier}"
            raise DoesNotFitError(
                f"{batch_size} sequences of {capacity_tokens} tokens need {format_bytes(asked)} of KV cache{where}, but the plan "
                f"has {format_bytes(planned)} for {self.batch_size} of {self.capacity_tokens}; ask for fewer or shorter "
                f"sequences, or plan for these.",
                budget_bytes=planned,
                shortfall_bytes=asked - planned,
                owners={"kv": asked},
                cheapest_change=f"plan for {batch_size} sequences of {capacity_tokens} tokens",
            )

    def to_dict(self) -> dict[str, Any]:
        data = {**asdict(self), "options": [option.to_dict() for option in self.options]}
        return {**data, "sites": [asdict(site) for site in self.sites]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVPlan:
        try:
            return cls(
                **{
                    **data,
                    "sites": tuple(AttentionSite(**site) for site in data["sites"]),
                    "options": tuple(KVOption.from_dict(option) for option in data["options"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan's KV cache is malformed: {error}.") from None

    def fingerprint(self) -> str:
        """SHA-256 of the plan, over sorted JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class PlannedCacheLayer(CacheLayerMixin):
    """One layer of a planned cache; its `KVLayer` is built with the first keys, on their device.

    `keys` and `values` stay None: nothing outside the layer may hold the cache in 16 bits.
    """

    is_sliding = False

    def __init__(self, site: AttentionSite, option: KVOption, plan: KVPlan, batch_size: int, capacity_tokens: int):
        super().__init__()
        self.site = site
        self.option = option
        self.plan = plan
        self.planned_batch_size = batch_size
        self.capacity_tokens = capacity_tokens
        self.before: PlannedCacheLayer | None = None
        self.store: KVLayer | None = None
        self.columns = 0
        self.peeking = False
        self.handover: Handover | None = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.option.is_neutral and self.site.window_tokens is None

    @property
    def batch_size(self) -> int:
        return self.planned_batch_size if self.store is None else self.store.batch_size

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, dtype = key_states.shape[0], DTYPE_NAMES.get(key_states.dtype, str(key_states.dtype))
        if dtype != self.plan.dtype:
            raise PlanError(f"{self.site.id} was planned in {self.plan.dtype}, but the model computes keys in {dtype}.")
        found = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        planned = (self.site.num_kv_heads, self.site.key_head_dim, self.site.value_head_dim)
        if found != planned:
            raise PlanError(f"{self.site.id} was planned with (KV heads, key, value widths) {planned}, found {found}.")
        if batch_size > self.planned_batch_size:
            self.plan.check_fits(batch_size, self.capacity_tokens)
        self.hold(
            self.option.build(
                self.site,
                batch_size=batch_size,
                capacity_tokens=self.capacity_tokens,
                dtype=dtype,
                device=key_states.device,
            )
        )

    def hold(self, store: KVLayer) -> None:
        """Go on with this store, joined with that of the layer before where the plan says so."""
        if self.option.represent.joins:
            assert self.before is not None and self.before.store is not None  # layers come in order
            store.join(self.before.store)
        self.store = store
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the layer over on the new keys; returns only the new tokens."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        if self.handover is not None and not self.handover.taken:
            raise UnsupportedModelError(
                f"{self.site.id}: the attention function never reached the cache; load the model with "
                f'attn_implementation="haversack", or plan no KV cache for it.'
            )
        self.handover = Handover(self.store, self.peeking)
        self.handover.attach(key_states)
        if not self.peeking:
            self.columns += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.columns = 0
        self.handover = None
        if self.store is not None:
            self.store.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.store is not None:
            self.store.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.store is not None:
            self.store.crop(abs(tokens_to_remove))
            self.columns -= abs(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.plan.check_fits(self.store.batch_size * repeats, self.capacity_tokens)
            self.hold(self.store.resized(torch.arange(self.store.batch_size).repeat_interleave(repeats)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.store is not None:
            self.hold(self.store.resized(torch.arange(self.store.batch_size)[indices.cpu()]))

    def offload(self) -> None:
        raise UsageError("a planned cache stays where its plan put it; offloading is a choice of the plan.")

    prefetch = offload


class HaversackCache(Cache):
    """A cache that holds what `plan` says, for `batch_size` sequences of at most `capacity_tokens` (default: the plan's).

    Raises DoesNotFitError if those need more bytes than the plan has.
    """

    def __init__(self, plan: KVPlan, *, batch_size: int | None = None, capacity_tokens: int | None = None):
        batch_size, capacity_tokens = batch_size or plan.batch_size, capacity_tokens or plan.capacity_tokens
        plan.check_fits(batch_size, capacity_tokens)
        self.plan = plan
        self.planned = [
            PlannedCacheLayer(site, option, plan, batch_size, capacity_tokens)
            for site, option in zip(plan.sites, plan.options)
        ]
        for before, layer in zip(self.planned, self.planned[1:]):
            layer.before = before
        super().__init__(layers=[*self.planned])

    @contextmanager
    def peeking(self) -> Iterator[None]:
        """Forward passes in here attend to the cache and store nothing; layers that choose between tokens learn from them which ones matter."""
        for layer in self.planned:
            layer.peeking = True
        try:
            yield
        finally:
            for layer in self.planned:
                layer.peeking = False

    def weigh(self, weights: torch.Tensor) -> None:
        """What the last `n` tokens of every sequence are worth, float32 `(batch, n)`, told to every layer."""
        for layer in self.planned:
            if layer.store is not None:
                layer.store.weigh(weights)

    def num_bytes(self, tier: str = "device") -> int:
        """Bytes held now on a tier over all layers."""
        return sum(layer.store.num_bytes(tier) for layer in self.planned if layer.store is not None)

    def copy(self) -> HaversackCache:
        """Another cache that goes on from here; as many bytes again."""
        first = self.planned[0]
        other = HaversackCache(self.plan, batch_size=first.batch_size, capacity_tokens=first.capacity_tokens)
        for mine, its in zip(self.planned, other.planned):
            if mine.store is not None:
                its.hold(mine.store.resized(torch.arange(mine.store.batch_size)))
            its.columns = mine.columns
        return other

    def save(self, path: str | Path, *, model_fingerprint: str) -> None:
        """Write every layer's state to one safetensors file, whole or not at all, bound to the plan and to the model that filled it."""
        tensors: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(self.planned):
            if layer.store is None:
                raise UsageError("the cache is empty: there is nothing to save before the first forward pass.")
            tensors |= {f"{i}.{name}": tensor.contiguous() for name, tensor in layer.store.state().items()}
        first = self.planned[0]
        about = {
            "plan": self.plan.fingerprint(),
            "model": model_fingerprint,
            "batch_size": str(first.batch_size),
            "capacity_tokens": str(first.capacity_tokens),
            "columns": str(first.columns),
        }
        partial = Path(f"{path}.partial")
        save_file(tensors, str(partial), metadata=about)
        partial.replace(path)

    @classmethod
    def load(
        cls, path: str | Path, plan: KVPlan, *, model_fingerprint: str, device: str | torch.device = "cpu"
    ) -> HaversackCache:
        """The cache that `save` wrote. Raises PlanError if it belongs to another plan or model."""
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            for what, expected in (("plan", plan.fingerprint()), ("model", model_fingerprint)):
                if about.get(what) != expected:
                    raise PlanError(f"{path} was saved under another {what}; fill the cache again with this one.")
            cache = cls(plan, batch_size=int(about["batch_size"]), capacity_tokens=int(about["capacity_tokens"]))
            for i, layer in enumerate(cache.planned):
                store = layer.option.build(
                    layer.site,
                    batch_size=layer.planned_batch_size,
                    capacity_tokens=layer.capacity_tokens,
                    dtype=plan.dtype,
                    device=device,
                )
                store.load_state({name: file.get_tensor(f"{i}.{name}") for name in store.state()})
                layer.hold(store)
                layer.columns = int(about["columns"])
        return cache
