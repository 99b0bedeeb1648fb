"""The options of every site with what they cost: bytes, seconds and damage, before anything is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from haversack.cost.damage import Damage
from haversack.cost.roofline import decode_products, read_share
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.site import AttentionSite, WeightSite
from haversack.describe.workload import ServeWorkload
from haversack.engine.decoder.forecast import StepForecast
from haversack.engine.profile import ActivationProfile
from haversack.errors import MachineError
from haversack.ledger import DTYPE_BYTES, TIERS
from haversack.parts.kv.base import KVOption
from haversack.parts.placement.base import Placement
from haversack.parts.weights.base import WeightOption

ASSUMED_READ_BYTES_PER_SECOND = 10e9
"""Where nobody measured: one memory channel's worth, so that seconds have the right order. Plans say so in a note."""

ASSUMED_DISK_BYTES_PER_SECOND = 1e9

COMPILED_LAYER_SECONDS, PLAIN_LAYER_SECONDS = 2e-4, 4e-4
"""Beside reading weights and cache, per layer and step: norms, rotations and activations in one thread, and the starts and ends of teams; and
in transformers' own loop, which is Python. A 1.1B shape of 16 layers at 4 bits took 11.8 ms compiled where its bytes take 8.9 at the rate
read in turns with it (one product beyond its bytes: 30 to 40 us, at any width), and 3.4 ms more in transformers' loop (2-core EPYC)."""

FURTHER_TOKEN_SECONDS_PER_WEIGHT = {16: 8e-12, 8: 5.5e-12}
"""One thread's, for each token beside the first that meets a packed weight, by bits of activations: that shape at 8 users took 29.5 ms more
than at one. With 8 bits a matrix of 512 by 4,096 took 51 us more for 8 tokens than for 2, with 16 bits 74."""

PAIR_SECONDS = 4e-11
"""One thread's, for one number of a cached key or value and one query's: that shape took 10.8 ms more for 8,192 tokens in 16 bits, 9.4 in 4."""


@dataclass(frozen=True)
class WeightCandidate:
    """One option and placement at a weight site. Seconds are per decoded token; `disk_seconds` overlap with the others."""

    site: WeightSite
    option: WeightOption
    placement: Placement
    stored_bytes: int
    prefill_bytes: int
    decode_bytes: int
    seconds: float
    disk_seconds: float
    damage: Damage

    @cached_property
    def id(self) -> str:
        return candidate_id(self.option, self.placement)


def candidate_id(option: WeightOption, placement: Placement) -> str:
    return f"{option.label} {placement.id}"


@dataclass(frozen=True)
class KVCandidate:
    """One option for a layer's keys and values."""

    site: AttentionSite
    option: KVOption
    stored_bytes: int
    prefill_bytes: int
    decode_bytes: int
    seconds: float
    damage: Damage
    elsewhere_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Bytes on other tiers than the device, by tier."""

    @property
    def id(self) -> str:
        return self.option.label


@dataclass(frozen=True)
class Serving:
    """Everything that costs depend on beside the option: model, workload, machine, and both traced passes."""

    model: Model
    workload: ServeWorkload
    machine: Machine
    prefill: ActivationProfile
    decode: ActivationProfile
    step: StepForecast
    _sizes: dict[tuple, tuple[int, int, int]] = field(default_factory=dict, repr=False, compare=False)
    costs: dict[tuple, SharedCosts] = field(default_factory=dict, repr=False, compare=False)

    @property
    def read_rate(self) -> float:
        return self.machine.read_rate() or ASSUMED_READ_BYTES_PER_SECOND

    @property
    def disk_rate(self) -> float:
        return self.machine.rates.disk_read_bytes_per_second or ASSUMED_DISK_BYTES_PER_SECOND

    def link_rate(self, *tiers: str) -> float:
        """Bytes/s between the device and the slowest of these tiers."""
        host = self.machine.devices[0].link_bytes_per_second if self.machine.devices else None
        return min(self.disk_rate if tier == "disk" else host or self.read_rate for tier in tiers)

    @property
    def scores_bytes(self) -> int:
        """The last logits in float32, before and after `generate`'s processors: beside the next step, never beside prefill."""
        return 2 * DTYPE_BYTES["F32"] * self.workload.users * self.model.vocab_size

    def base_bytes(self, point: str) -> int:
        """What a pass holds at its fullest, workspaces left out; after prefill, logits and scores; at load, a traced step."""
        if point == "load":
            return self.step.tracing_bytes
        if point == "decode":
            return self.decode.peak_bytes + self.scores_bytes
        logits = self.workload.users * self.model.vocab_size * DTYPE_BYTES[self.model.dtype]
        return max(self.prefill.peak_bytes, logits + self.scores_bytes)

    def decode_bytes(self, live_bytes: int) -> int:
        """What a place of the step holds of which the traced pass holds `live_bytes`: compiled steps count their scores."""
        return max(live_bytes + self.scores_bytes, self.step.step_bytes)

    def sizes(self, site: WeightSite, option: WeightOption) -> tuple[int, int, int]:
        """Stored bytes of an option at a site, and its workspace in prefill and in decoding: one look per shape, for
        layers are many and their shapes few."""
        looked_up = site.role in ("embedding", "position")
        multiplied = not looked_up or bool(site.tied_modules)
        last_only = site.role == "head" or looked_up  # the head computes the last token alone
        key = (site.out_features, site.in_features, site.dtype, looked_up, multiplied, last_only, option)
        if key not in self._sizes:
            workspace = []
            for profile in (self.prefill, self.decode):
                rows = profile.batch_size * profile.new_tokens
                inputs = profile.batch_size if last_only else rows
                shape = (site.out_features, site.in_features, self.model.dtype)
                workspace.append(
                    max(
                        option.workspace_bytes(inputs, *shape) if multiplied else 0,
                        option.rows_workspace_bytes(rows, *shape[1:]) if looked_up else 0,
                    )
                )
            stored = option.stored_bytes(site.out_features, site.in_features, site.dtype)
            self._sizes[key] = stored, workspace[0], workspace[1]
        return self._sizes[key]


@dataclass(frozen=True)
class WeightCandidates(Mapping[str, WeightCandidate]):
    """A site's candidates by id, made when they are looked up: experts are thousands, and what they cost is `shared`.

    `prefill_bytes` and `decode_bytes` are what lives where the site runs, without its workspace.
    """

    site: WeightSite
    prefill_bytes: int
    decode_bytes: int
    shared: SharedCosts

    def __len__(self) -> int:
        return len(self.shared.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared.rows)

    def __getitem__(self, candidate: str) -> WeightCandidate:
        row = self.shared.rows[candidate]
        return WeightCandidate(
            site=self.site,
            option=row.option,
            placement=row.placement,
            stored_bytes=row.stored_bytes,
            prefill_bytes=self.prefill_bytes + row.prefill_workspace_bytes,
            decode_bytes=self.decode_bytes + row.decode_workspace_bytes,
            seconds=row.seconds,
            disk_seconds=row.disk_seconds,
            damage=row.damage,
        )


def weight_candidates(
    serving: Serving,
    site: WeightSite,
    damages: Mapping[WeightOption, Damage],
    placements: Sequence[Placement],
) -> WeightCandidates:
    """Every option with a known or stated damage, in every placement that the site admits."""
    prefill, decode = serving.prefill.at_site[site.id], serving.decode_bytes(serving.decode.at_site[site.id])
    return WeightCandidates(site, prefill, decode, _shared_costs(serving, site, damages, placements))


@dataclass(frozen=True)
class Cost:
    """What an option in a placement costs at every site that is like another: all but what lives there."""

    option: WeightOption
    placement: Placement
    stored_bytes: int
    prefill_workspace_bytes: int
    decode_workspace_bytes: int
    seconds: float
    disk_seconds: float
    damage: Damage


@dataclass(frozen=True, eq=False)
class SharedCosts:
    """What all sites of one shape, role and table of damages share: rows by candidate id. `damages` is the table, which is kept so that
    no other comes to have its identity."""

    rows: Mapping[str, Cost]
    damages: Mapping[WeightOption, Damage]

    @cached_property
    def streams(self) -> bool:
        """Whether some candidate is streamed."""
        return any(row.placement.mode == "streamed" for row in self.rows.values())

    @cached_property
    def most_stored_bytes(self) -> int:
        return max(row.stored_bytes for row in self.rows.values())


def _shared_costs(
    serving: Serving, site: WeightSite, damages: Mapping[WeightOption, Damage], placements: Sequence[Placement]
) -> SharedCosts:
    """Looked at once for sites of one shape, role and table of damages: layers and experts are many, their kinds few."""
    key = (
        *(site.role, site.out_features, site.in_features, site.dtype),
        *(site.expert is None, site.layer is None, bool(site.tied_modules), id(damages), tuple(placements)),
    )
    if key not in serving.costs:
        share = read_share(serving.model, site, serving.workload.users)
        rows: dict[str, Cost] = {}
        for option, damage in damages.items():
            stored_bytes, prefill_workspace, decode_workspace = serving.sizes(site, option)
            seconds = _seconds(serving, site, option, stored_bytes, share)
            for placement in placements:
                if placement.mode == "streamed" and site.layer is None:
                    continue  # the window follows the layers; what lies outside stays
                disk_seconds = stored_bytes / serving.disk_rate if placement.mode == "streamed" else 0.0
                assert candidate_id(option, placement) not in rows, "labels are unique"
                rows[candidate_id(option, placement)] = Cost(
                    *(option, placement, stored_bytes, prefill_workspace, decode_workspace),
                    *(seconds, disk_seconds, damage),
                )
        serving.costs[key] = SharedCosts(rows, damages)
    return serving.costs[key]


def _seconds(serving: Serving, site: WeightSite, option: WeightOption, stored_bytes: int, share: float) -> float:
    """Reading the share of a matrix that one decode step needs, decoding it where no kernel multiplies as it reads, and what
    tokens beside the first cost."""
    model, machine, threads = serving.model, serving.machine, max(1, serving.machine.cores)
    reading = stored_bytes * share / serving.read_rate
    met = site.num_parameters * share
    users = serving.workload.users
    products = decode_products(model, site, users)
    rate = machine.product_rate()
    if machine.devices or (option.is_neutral and rate):
        return max(reading, 2 * products / rate if rate else 0.0)
    further = max(0.0, products - met) if users > 1 else 0.0
    each = FURTHER_TOKEN_SECONDS_PER_WEIGHT[option.activation_bits]
    return reading + (option.decode_seconds(round(met)) + further * each) / threads


def _attention_seconds(serving: Serving, site: AttentionSite, stored_bytes: int) -> float:
    """Reading a layer's cache or multiplying with it, whichever takes longer, and what a layer costs beside its bytes."""
    workload, machine = serving.workload, serving.machine
    reading = stored_bytes / serving.read_rate
    if machine.devices:
        return reading
    limit = site.window_tokens or site.chunk_tokens or workload.cache_tokens
    numbers = workload.users * min(limit, workload.cache_tokens) * (site.key_head_dim + site.value_head_dim)
    multiplying = site.num_heads * numbers * PAIR_SECONDS / max(1, machine.cores)
    return max(reading, multiplying) + (COMPILED_LAYER_SECONDS if serving.step.step_bytes else PLAIN_LAYER_SECONDS)


def _attention_rate(machine: Machine, option: KVOption) -> float:
    """Bytes/s of keys and values that the machine's drive attends to by itself. Raises MachineError where it has none that can."""
    rate = None if machine.disk is None else machine.disk.attention_bytes_per_second
    if not rate:
        raise MachineError(
            f"{option.label} needs a drive that computes, but {machine.name} names none; give disk.attention_bytes_per_second in a "
            "machine file to simulate one."
        )
    return rate


def kv_candidates(serving: Serving, site: AttentionSite, damages: Mapping[KVOption, Damage]) -> list[KVCandidate]:
    """Every KV option at a layer, for the planned users and context."""
    workload, model, passes = serving.workload, serving.model, (serving.prefill, serving.decode)
    out: list[KVCandidate] = []
    for option, damage in damages.items():
        shape = {"batch_size": workload.users, "capacity_tokens": workload.cache_tokens, "dtype": model.dtype}
        stored_bytes = option.stored_bytes(site, **shape)  # type: ignore[arg-type]
        others = {tier: option.stored_bytes(site, tier=tier, **shape) for tier in TIERS if tier != "device"}  # type: ignore[arg-type]
        elsewhere = {tier: num_bytes for tier, num_bytes in others.items() if num_bytes}
        # what is fetched is known only once the query is there: nothing else runs meanwhile
        away_seconds = 0.0
        if elsewhere:
            away_seconds = option.link_bytes(site, **shape) / serving.link_rate(*elsewhere)  # type: ignore[arg-type]
            if there := option.read_there_bytes(site, **shape):  # type: ignore[arg-type]
                away_seconds += there / _attention_rate(serving.machine, option)
        prefill, decode = (option.workspace_bytes(site, new_tokens=p.new_tokens, **shape) for p in passes)  # type: ignore[arg-type]
        out.append(
            KVCandidate(
                site=site,
                option=option,
                stored_bytes=stored_bytes,
                prefill_bytes=serving.prefill.at_attention[site.layer] + prefill,
                decode_bytes=serving.decode_bytes(serving.decode.at_attention[site.layer]) + decode,
                seconds=_attention_seconds(serving, site, stored_bytes) + away_seconds,
                damage=damage,
                elsewhere_bytes=elsewhere,
            )
        )
    return out
