"""Where the time goes: each kind of operator's bytes and floating-point operations, and which of the two it waits for.

An operator's time is the larger of its bytes over the read bandwidth and its operations over the matrix rate; times of
operators are added. It is a lower bound: nothing here knows of launches, ragged shapes or overlap. Source: Williams et al.
2009, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from haversack.describe.experts import share_of_experts
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.site import AttentionSite, WeightSite
from haversack.describe.workload import ServeWorkload, TrainingWorkload, TuneWorkload, recomputation
from haversack.ledger import DTYPE_BYTES

LOOKED_UP = ("embedding", "position")
ATTENTION, LOSS, UPDATE, COMMUNICATION = "attention", "loss", "update", "communication"


@dataclass(frozen=True)
class Operator:
    """One kind of operator at one time point: bytes that it reads (or sends), its operations, and the seconds either takes
    (None: the rate is unknown)."""

    point: str
    name: str
    num_bytes: float
    flops: float
    bytes_seconds: float | None
    flops_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """The larger of both, or None where one is unknown and could be larger."""
        if self.bytes_seconds is None or (self.flops_seconds is None and self.flops):
            return None
        return max(self.bytes_seconds, self.flops_seconds or 0.0)

    @property
    def bottleneck(self) -> str:
        if self.seconds is None:
            return "unknown"
        if self.name == COMMUNICATION:
            return "link"
        return "compute" if (self.flops_seconds or 0.0) > (self.bytes_seconds or 0.0) else "memory"


class _Rates:
    def __init__(self, machine: Machine, dtype: str):
        self.read = machine.read_rate()
        self.flops = machine.matmul_rate("fp32" if dtype == "F32" else "bf16") or machine.matmul_rate("fp32")

    def operator(self, point: str, name: str, num_bytes: float, flops: float) -> Operator:
        return Operator(
            point,
            name,
            num_bytes,
            flops,
            None if self.read is None else num_bytes / self.read,
            None if self.flops is None else flops / self.flops,
        )


def serving_operators(
    model: Model,
    workload: ServeWorkload,
    machine: Machine,
    *,
    stored_bytes: Mapping[str, int],
    kv_bytes: int,
    chunk_tokens: int,
) -> list[Operator]:
    """The whole prefill and the last decode step, by role. `stored_bytes` by site id and `kv_bytes` are a plan's own."""
    rates, users, prompt = _Rates(machine, model.dtype), workload.users, workload.prompt_tokens
    num_chunks = len(workload.prefill_chunks(chunk_tokens))
    out: list[Operator] = []
    for point, tokens, passes in (("prefill", prompt * users, num_chunks), ("decode", users, 1)):
        for name, sites in _by_role(model).items():
            each = max(1, tokens // passes)
            num_bytes = sum(passes * stored_bytes[s.id] * read_share(model, s, each) for s in sites)
            flops = sum(2.0 * _products(model, s, users if s.role == "head" else tokens, users) for s in sites)
            out.append(rates.operator(point, name, num_bytes, flops))
        pairs = prompt * (prompt + 1) / 2 if point == "prefill" else workload.context_tokens
        flops = sum(
            users * attention_flops(site, pairs, prompt if point == "prefill" else 1) for site in model.attention
        )
        out.append(rates.operator(point, ATTENTION, kv_bytes * (passes + 1) / 2, flops))
    return [operator for operator in out if operator.num_bytes or operator.flops]


def training_operators(model: Model, workload: TrainingWorkload, machine: Machine) -> list[Operator]:
    """One step of one rank without its communication. Products count once forward, twice backward (once where the matrix
    is frozen), and once more where layers are recomputed, or the head's blocks of a cut loss."""
    rates = _Rates(machine, "F32" if workload.precision == "fp32" else "BF16")
    tokens, width = workload.step_tokens, DTYPE_BYTES[workload.weights_dtype]
    frozen = isinstance(workload, TuneWorkload) and workload.method != "full"
    beside = isinstance(workload, TuneWorkload) and workload.method == "side"
    backward = 1 if frozen else 2
    kept = recomputation(workload.recompute, model.num_layers).values()
    again = sum(what != "products" for what in kept) / max(1, model.num_layers)
    attention_again = sum(not what for what in kept) / max(1, model.num_layers)
    head_again = 1 if workload.loss == "cut" else 0
    passes = workload.accumulation_steps
    out: list[Operator] = []
    for point, times in (("forward", 1), ("backward", backward + again)):
        for name, sites in _by_role(model).items():
            inside = times - again + head_again if name == "head" and point == "backward" else times
            if beside and name != "head" and point == "backward":
                continue  # no gradient passes through layers that a side network reads
            num_bytes = (
                inside * passes * width * sum(s.num_parameters * read_share(model, s, tokens // passes) for s in sites)
            )
            flops = sum(2.0 * inside * _products(model, s, tokens, tokens) for s in sites)
            out.append(rates.operator(point, name, num_bytes, flops))
        pairs = workload.seq_len * (workload.seq_len + 1) / 2
        sequences = workload.batch_size * passes
        runs = 1 if point == "forward" else 0 if beside else 2 + attention_again
        flops = sum(runs * sequences * attention_flops(site, pairs, workload.seq_len) for site in model.attention)
        kv = sum(site.bytes_per_token("BF16") for site in model.attention) * tokens
        out.append(rates.operator(point, ATTENTION, runs * kv, flops))
    logits = 4.0 * tokens * model.vocab_size
    out.append(rates.operator(LOSS, LOSS, 3 * logits, 0.0))
    return [operator for operator in out if operator.num_bytes or operator.flops]


def update_operator(machine: Machine, touched_bytes: float) -> Operator:
    """The optimizer's step: `touched_bytes` of weights, gradients and states, read and written."""
    return _Rates(machine, "BF16").operator(UPDATE, UPDATE, touched_bytes, 0.0)


def communication_operator(machine: Machine, sent_bytes: float) -> Operator:
    """What a rank sends in a step, over its link (None: unknown)."""
    rate = machine.devices[0].link_bytes_per_second if machine.devices else None
    return Operator(COMMUNICATION, COMMUNICATION, sent_bytes, 0.0, None if rate is None else sent_bytes / rate, 0.0)


def total_seconds(operators: Iterable[Operator]) -> float | None:
    """The sum, or None where one is unknown."""
    total = 0.0
    for operator in operators:
        if operator.seconds is None:
            return None
        total += operator.seconds
    return total


def read_share(model: Model, site: WeightSite, num_tokens: int) -> float:
    """The share of a matrix that a pass over `num_tokens` reads: rows of a table, the experts that are chosen, else all."""
    if site.role in LOOKED_UP and not site.tied_modules:
        return min(1.0, num_tokens / site.out_features)
    if site.expert is None:
        return 1.0
    return share_of_experts(model.num_experts, model.experts_per_token, num_tokens)


def decode_products(model: Model, site: WeightSite, users: int) -> float:
    """Multiplications of a site in one decode step."""
    return _products(model, site, users, users)


def _products(model: Model, site: WeightSite, tokens: int, scored: int) -> float:
    """Multiplications of a site in a pass: its weights times the tokens that meet them; a tied head meets those `scored`."""
    if site.role in LOOKED_UP:
        return float(site.num_parameters) * scored if site.tied_modules else 0.0
    if site.expert is None:
        return float(site.num_parameters) * tokens
    return float(site.num_parameters) * tokens * min(1.0, (model.experts_per_token or 1) / model.num_experts)


def attention_flops(site: AttentionSite, pairs: float, num_queries: int) -> float:
    """Operations of one sequence: two per query, key and head for each of key and value dimensions."""
    limit = site.window_tokens or site.chunk_tokens
    seen = min(pairs, float(limit) * num_queries) if limit else pairs
    return 2.0 * seen * site.num_heads * (site.key_head_dim + site.value_head_dim)


def _by_role(model: Model) -> dict[str, list[WeightSite]]:
    rows: dict[str, list[WeightSite]] = {}
    for site in model.weights:
        rows.setdefault(site.role if site.expert is None else f"experts' {site.role}", []).append(site)
    return rows
