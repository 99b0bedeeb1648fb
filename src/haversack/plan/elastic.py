"""Plans of folders that can be held at any size: which blocks come first, and what each size takes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from haversack.cost.candidates import WeightCandidate
from haversack.cost.damage import NONE, Damage
from haversack.cost.serving import ServingProblem
from haversack.cost.stacks import order_of_blocks
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.workload import ServeWorkload
from haversack.engine.elastic import held_blocks
from haversack.errors import UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.plan.make import PREFILL_CHUNKS, solve_at
from haversack.plan.question import Answer, Question
from haversack.plan.schema import BlockRecord, Elastic, Plan
from haversack.plan.write import write_answer
from haversack.recipes.base import all_recipes
from haversack.solve.exact import Solution

DEFAULT_RECIPE = "any-precision"
SOURCE = "output error weighted by Fisher statistics"


def stacked_option(recipes: tuple[str, ...]) -> WeightOption:
    """The option whose blocks an elastic folder holds: the longest of the one recipe that is named, or of the default one.

    Raises UsageError for a recipe without blocks, or several.
    """
    able = [
        r.id
        for r in all_recipes().values()
        if r.resident == "weights" and any(o.stack is not None for o in r.options())
    ]
    name = recipes[0] if recipes else DEFAULT_RECIPE
    if len(recipes) > 1 or name not in able:
        raise UsageError(
            f"--elastic takes one recipe that stores matrices in blocks: {' or '.join(able)}, but was given "
            f"{' and '.join(recipes)}; caches stay as they are."
        )
    return all_recipes()[name].options()[-1]


def elastic_answer(question: Question, option: WeightOption, damages: Mapping[str, tuple[float, ...]]) -> Answer:
    """A plan of as many blocks of `option` at every site as the budget holds, all of them where there is none, and their order.

    `damages` are `cost.stacks.stack_damages`; sites without stay as they are. The answer does not fit where the floor is
    beyond the budget.
    """
    assert option.stack is not None
    least = option.least_blocks
    stacks = [option.shortened(number) for number in range(least, option.stack.blocks + 1)]
    weighed: dict[str, dict[WeightOption, Damage]] = {
        site.id: {WeightOption(): NONE} for site in question.model.weights
    }
    for site, nats in damages.items():
        weighed[site] = {o: Damage(n, "proxied", source=SOURCE) for o, n in zip(stacks, nats, strict=True)}
    built, solution, chunk = _problem(question, weighed)
    rows = {site: [_candidate(built, site, o) for o in stacks] for site in damages}
    elastic = _record(built, rows, least)
    if question.budget_bytes is not None:
        kept = tuple(block for block in elastic.blocks if block.peak_bytes <= question.budget_bytes)
        elastic = elastic.model_copy(update={"blocks": kept})
    taken = Counter(block.site for block in elastic.blocks)
    fits = question.budget_bytes is None or elastic.floor_peak_bytes <= question.budget_bytes
    ceiling = _with(built, solution, {site: row[taken[site]] for site, row in rows.items()}, fits)
    answer = write_answer(question, built, ceiling, chunk, None, ())
    return dataclasses.replace(answer, plan=answer.plan.model_copy(update={"elastic": elastic}).sealed())


def plan_at(plan: Plan, model: Model, machine: Machine, number: int) -> Plan:
    """What an elastic folder's plan predicts with the first `number` of its blocks: an ordinary plan."""
    assert plan.elastic is not None
    held = held_blocks(plan.model_dump(include={"elastic", "weights"}), number)
    packed = {row.site: WeightOption.from_dict(row.option) for row in plan.weights}
    options = {site: o.shortened(held[site]) if o.stack else o for site, o in packed.items()}
    runtime = plan.prediction.timeline["load"].get("runtime", {}).get("device", 0)
    rates = dataclasses.replace(machine.rates, runtime_private_bytes=runtime or None)
    question = Question(
        model=model,
        workload=dataclasses.replace(
            ServeWorkload.from_dict(plan.workload), prefill_chunk_tokens=plan.prefill_chunk_tokens
        ),
        machine=dataclasses.replace(machine, rates=rates),
        budget_bytes=None,
        budget_kind=plan.budget.kind,
        kv_damages={row.site: {KVOption.from_dict(row.option): NONE} for row in plan.kv},
    )
    built, solution, chunk = _problem(question, {site: {option: NONE} for site, option in options.items()})
    chosen = {site: _candidate(built, site, option) for site, option in options.items()}
    found = write_answer(question, built, _with(built, solution, chosen, fits=True), chunk, None, ()).plan
    nats = plan.elastic.blocks[number - 1].damage if number else plan.elastic.floor_damage
    damage = plan.prediction.damage.model_copy(update={"nats": nats})
    prediction = found.prediction.model_copy(update={"damage": damage})
    return plan.model_copy(update={"weights": found.weights, "prediction": prediction, "elastic": None}).sealed()


def _problem(
    question: Question, weighed: Mapping[str, Mapping[WeightOption, Damage]]
) -> tuple[ServingProblem, Solution, int]:
    """The problem of these options alone, with caches as they are unless the question says otherwise; its smallest solution; and the
    chunk."""
    caches = question.kv_damages or {site.id: {KVOption(): NONE} for site in question.model.attention}
    chunk = question.workload.prefill_chunk_tokens or min(PREFILL_CHUNKS[0], question.workload.prompt_tokens)
    free = dataclasses.replace(
        question, budget_bytes=None, placement="resident", weight_damages=weighed, kv_damages=caches
    )
    return *solve_at(free, chunk), chunk


def _candidate(built: ServingProblem, site: str, option: WeightOption) -> WeightCandidate:
    return next(candidate for candidate in built.weights[site].values() if candidate.option == option)


def _with(built: ServingProblem, solution: Solution, chosen: Mapping[str, WeightCandidate], fits: bool) -> Solution:
    """A solution with these candidates at their sites."""
    places = []
    for group, present in zip(built.problem.groups, solution.chosen, strict=True):
        place = group.index(chosen[group.id].id) if group.id in chosen else present
        assert place is not None, "every candidate is a choice of its site"
        places.append(place)
    evaluation = built.problem.evaluate(places)
    method = "blocks by damage per byte"
    return dataclasses.replace(solution, chosen=tuple(places), evaluation=evaluation, fits=fits, method=method)


def _record(built: ServingProblem, rows: Mapping[str, list[WeightCandidate]], least: int) -> Elastic:
    """All blocks of sites with candidates from fewest to most blocks, in the order in which they are taken."""
    nats = {site: tuple(c.damage.nats or 0.0 for c in row) for site, row in rows.items()}
    sizes = {site: tuple(b.stored_bytes - a.stored_bytes for a, b in pairwise(row)) for site, row in rows.items()}
    floor = {group.id: group.choices[0].id for group in built.problem.groups}
    ledger = built.ledger(floor | {site: row[0].id for site, row in rows.items()})
    total = {point: ledger.total_bytes(point) for point in ledger.timeline}
    running = {"prefill": 0, "decode": 0}
    for point in running:
        owners = ledger.owners_at(point)
        running[point] = owners.get("activations", 0) + owners.get("workspace", 0)
        total[point] -= running[point]
    damage, held, blocks = sum(row[0] for row in nats.values()), dict.fromkeys(rows, 0), []
    floor_damage = damage
    for site in order_of_blocks(nats, sizes):
        place = held[site] = held[site] + 1
        damage += nats[site][place] - nats[site][place - 1]
        total = {point: num_bytes + sizes[site][place - 1] for point, num_bytes in total.items()}
        for point in running:  # what a product takes never falls with the blocks of its matrix
            running[point] = max(running[point], getattr(rows[site][place], f"{point}_bytes"))
        peak = max(num_bytes + running.get(point, 0) for point, num_bytes in total.items())
        blocks.append(BlockRecord(site=site, num_bytes=sizes[site][place - 1], peak_bytes=peak, damage=damage))
    return Elastic(
        floor_blocks=least, floor_peak_bytes=ledger.peak()[1], floor_damage=floor_damage, blocks=tuple(blocks)
    )
