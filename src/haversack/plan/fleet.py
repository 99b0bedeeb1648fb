"""From requests per second to machines: how much of each machine a kind of request takes, and the cheapest mix.

Each priced machine holds the model as it is, and serves as many users at once as its memory holds. Seconds are the
roofline's, so that rates are upper bounds and the counts lower ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from haversack.cost.roofline import serving_operators, total_seconds
from haversack.describe.machine import Machine, machine_names, named
from haversack.describe.model import Model
from haversack.describe.prices import Price
from haversack.describe.workload import ServeWorkload, check_positions
from haversack.engine.profile import profile_forward
from haversack.errors import UsageError
from haversack.ledger import total_bytes
from haversack.solve.fleet import Fleet, cheapest_fleet

CHUNK_TOKENS = 512
MAX_USERS = 1024


@dataclass(frozen=True)
class Requests:
    """Requests of one kind: how many a second, and tokens of each prompt and answer."""

    per_second: float
    prompt_tokens: int
    generate_tokens: int

    @property
    def label(self) -> str:
        return f"{self.prompt_tokens}+{self.generate_tokens}"


@dataclass(frozen=True)
class FleetAnswer:
    """The cheapest machines (None: no priced machine holds the model), the load of each kind on each machine in machines,
    and machines that were left out, with the reason."""

    fleet: Fleet | None
    loads: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def parse_mix(parts: Sequence[str]) -> tuple[Requests, ...]:
    """`RATE:PROMPT:ANSWER`, each. Raises UsageError naming the part that is wrong."""
    out = []
    for part in parts:
        fields = part.split(":")
        try:
            rate, prompt, generate = float(fields[0]), int(fields[1]), int(fields[2])
        except (ValueError, IndexError):
            rate = prompt = generate = 0
        if len(fields) != 3 or not 0 < rate < 1e9 or prompt < 1 or generate < 1:
            raise UsageError(
                f"--mix {part!r} is not RATE:PROMPT:ANSWER; write 2.5:512:128 for 2.5 requests a second of 512 tokens, "
                "answered with 128."
            )
        out.append(Requests(rate, prompt, generate))
    if len({requests.label for requests in out}) != len(out):
        raise UsageError("--mix names the same lengths twice; add their rates up.")
    return tuple(out)


def plan_fleet(model: Model, mix: Sequence[Requests], prices: Mapping[str, Price]) -> FleetAnswer:
    """The cheapest priced machines for `mix`. Raises UsageError beyond the model's positions."""
    for requests in mix:
        check_positions(
            ServeWorkload(requests.prompt_tokens, requests.generate_tokens), model.max_positions, model.name
        )
    left_out: dict[str, str] = {}
    loads: dict[str, dict[str, float]] = {requests.label: {} for requests in mix}
    working = profile_forward(model, batch_size=1, new_tokens=CHUNK_TOKENS).peak_bytes
    for name in prices:
        if name not in machine_names():
            left_out[name] = "no machine is named so"
            continue
        machine = named(name)
        if machine.read_rate() is None or not machine.product_rate():
            left_out[name] = "its rates are unknown"
            continue
        for requests in mix:
            rate = requests_per_second(model, requests, machine, working)
            if rate:
                loads[requests.label][name] = requests.per_second / rate
        if not any(name in row for row in loads.values()):
            left_out[name] = "the model does not fit as it is"
    kept = {name: price.dollars_per_hour for name, price in prices.items() if name not in left_out}
    return FleetAnswer(cheapest_fleet(loads, kept) if kept else None, loads, left_out)


def requests_per_second(model: Model, requests: Requests, machine: Machine, working_bytes: int) -> float:
    """The most requests of one kind that a machine finishes in a second, over numbers of users at once; 0 where not one fits."""
    stored = {site.id: site.num_bytes for site in model.weights}
    spare = machine.tiers()["device"] - sum(stored.values()) - total_bytes(model.rest) - working_bytes
    best, users = 0.0, 1
    while users <= MAX_USERS:
        workload = ServeWorkload(requests.prompt_tokens, requests.generate_tokens, users)
        kv = users * cache_bytes(model, workload.cache_tokens)
        if kv > spare:
            break
        operators = serving_operators(
            model, workload, machine, stored_bytes=stored, kv_bytes=kv, chunk_tokens=CHUNK_TOKENS
        )
        prefill = total_seconds(operator for operator in operators if operator.point == "prefill")
        decode = total_seconds(operator for operator in operators if operator.point == "decode")
        assert prefill is not None and decode is not None
        best = max(best, users / (prefill + requests.generate_tokens * decode))
        users *= 2
    return best


def cache_bytes(model: Model, num_tokens: int) -> int:
    """Keys and values of one user in the model's dtype, windows kept."""
    total = 0
    for site in model.attention:
        limit = site.window_tokens or site.chunk_tokens
        total += min(num_tokens, limit or num_tokens) * site.bytes_per_token(model.dtype)
    return total
