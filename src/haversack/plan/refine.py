"""Whole plans measured, and the search corrected by what was measured.

Damages of single sites add up only roughly. So the solver's answer is packed in memory and its KL measured on windows of
the calibration text that no statistics saw; the errors are fitted, the problem solved again nearby, and the best
*measured* plan wins. Evaluations are bounded, logged in a file beside the calibration, and resumed from it.

What is promised is measured last, on windows that the search did not see either: the mean over easy to hard text, with
a range, since damage follows the difficulty of a text and nobody knows which text will come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from haversack.cost.cache_damages import untried_nats
from haversack.cost.calibrated import Calibration, Packed
from haversack.cost.damage import Damage
from haversack.cost.serving import ServingProblem
from haversack.describe.assemble import read_codes, read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.site import WeightSite
from haversack.engine.measure import DamageMeter
from haversack.engine.probe_meter import ProbeMeter, mean_kl
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.probes.suite import Task
from haversack.solve.correct import Trial, correct, solution_hash
from haversack.solve.exact import Solution

MAX_PACKED_BYTES = 2 * 2**30
"""Packed sites kept for the next evaluation, which shares most of them, and for packing."""

SOLVE_SECONDS = 20.0


@dataclass(frozen=True)
class Refined:
    """The best measured solution; `damage` is its KL on windows, and probes, that chose nothing, `trials` all that were measured."""

    solution: Solution
    damage: Damage
    trials: tuple[Trial, ...]


class PlanMeter:
    """Measures whole solutions of one calibrated model."""

    def __init__(self, calibration: Calibration, evaluations: int, progress: Callable[[str, int, int], None]):
        self.calibration = calibration
        self.evaluations = evaluations
        self.progress = progress
        self._packed = calibration.packed

    @cached_property
    def _meter(self) -> DamageMeter:
        return DamageMeter(self.calibration.model, self.calibration.windows.search)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        assert self.calibration.model.folder is not None
        return Checkpoint.open(self.calibration.model.folder)

    def refine(self, built: ServingProblem, solution: Solution) -> Refined:
        """Search around a solution, in at most `evaluations` measurements; never worse than it, as measured."""
        state_file = self.calibration.statistics.folder / f"plans-{self._digest(built, solution)}.json"
        state = json.loads(state_file.read_text()) if state_file.exists() else None
        self.progress("measuring plans", len(state["trials"]) if state else 0, self.evaluations)

        def record(trials: dict) -> None:
            partial = state_file.with_suffix(".partial")
            partial.write_text(json.dumps(trials))
            partial.rename(state_file)
            self.progress("measuring plans", len(trials["trials"]), self.evaluations)

        corrected = correct(
            built.problem,
            lambda chosen: self.measure(built, chosen),
            max_evaluations=self.evaluations,
            start=solution.chosen,
            state=state,
            record=record,
            time_limit_seconds=SOLVE_SECONDS,
        )
        best = corrected.best
        evaluation = built.problem.evaluate(best.chosen)
        damage = self.judge(built, best.chosen)
        return Refined(replace(solution, chosen=best.chosen, evaluation=evaluation), damage, corrected.trials)

    def judge(self, built: ServingProblem, chosen: Sequence[int]) -> Damage:
        """KL of one solution on the windows that no search saw, with its range."""
        self._meter.use(self.calibration.windows.judge)
        changed, caches = self._changes(built, chosen)
        damage = promised(self._meter.kl_per_token(changed, caches), self._meter.entropy())
        if not built.kinds:
            return damage
        found = self._probes(self._judging_probes, changed, caches)
        return replace(damage, probes=tuple((kind, found[kind]) for kind in built.kinds))

    def measure(self, built: ServingProblem, chosen: Sequence[int]) -> float | tuple[float, ...]:
        """KL in nats per token of one solution, on the windows of the search; then of each probe's answers, where plans are judged by them, and what heads that
        drop tokens may lose on others."""
        self._meter.use(self.calibration.windows.search)
        changed, caches = self._changes(built, chosen)
        text = float(self._meter.kl_per_token(changed, caches).mean())
        if not built.kinds:
            return text
        meter = self._steering_probes
        found = self._probes(meter, changed, caches)
        sites = {site: caches[site.id] for site in self.calibration.model.attention if site.id in caches}
        untried = untried_nats(sites, meter.capacity_tokens)
        return (text, *(found[kind] + untried for kind in built.kinds))

    def _changes(self, built: ServingProblem, chosen: Sequence[int]) -> tuple[dict, dict]:
        weights, kv = built.candidates(built.problem.describe(chosen))
        changed = {}
        for done, c in enumerate(weights):
            if not c.option.is_neutral:
                if (c.site.id, c.option) not in self._packed:
                    self.progress("packing a plan to measure", done, len(weights))
                changed[c.site.id] = (c.option, self.tensors(c.site, c.option))
        return changed, {c.site.id: c.option for c in kv if not c.option.is_neutral}

    @cached_property
    def _steering_probes(self) -> ProbeMeter:
        return self._probe_meter(self.calibration.tasks)

    @cached_property
    def _judging_probes(self) -> ProbeMeter:
        return self._probe_meter(self.calibration.judge_tasks)

    def _probe_meter(self, tasks: Sequence[Task]) -> ProbeMeter:
        model = self.calibration.model
        meter = ProbeMeter(self._meter.model, model.attention, model.dtype, tasks)
        meter.scores({})  # the reference, while the weights are the checkpoint's
        return meter

    def _probes(self, meter: ProbeMeter, changed: dict, caches: dict) -> dict[str, float]:
        with self._meter.changed(changed):
            return mean_kl(meter.scores(caches, against_own=False))

    def _digest(self, built: ServingProblem, solution: Solution) -> str:
        capacity = built.problem.capacity_bytes.get("device", 0)
        text = hashlib.sha256(self.calibration.windows.search.numpy().tobytes()).hexdigest()[:8]
        probes = f"-{len(built.kinds)}-probes" if built.kinds else ""
        return f"{solution_hash(built.problem, solution.chosen)}-{capacity}-{text}{probes}"

    def tensors(self, site: WeightSite, option: WeightOption) -> Mapping[str, torch.Tensor]:
        key = (site.id, option)
        if key not in self._packed:
            weight, statistics = read_site(self._checkpoint, site).float(), self.calibration.statistics
            task = statistics[site.id].task(weight) if site.id in statistics else WeightTask(weight)
            if option.keeps_codes:
                task.stored = read_codes(self._checkpoint, site)
            tensors = option.encode(task)
            held = sum(t.nbytes for packed in self._packed.values() for t in packed.tensors.values())
            if held + sum(tensor.nbytes for tensor in tensors.values()) > MAX_PACKED_BYTES:
                self._packed.clear()
            self._packed[key] = Packed(tensors, tuple(task.notes))
        return self._packed[key].tensors


def promised(kl: torch.Tensor, entropy: torch.Tensor) -> Damage:
    """What to promise from nats at every token and the reference's own entropy there, both `(windows, tokens)`.

    Damage is near to a share of the entropy. The range is that of texts no easier or harder than these windows, with
    the share as far from its mean as 95% of windows have it (taken as normal).
    """
    hardness = entropy.mean(1)
    share = kl.mean(1).clamp_min(0) / hardness.clamp_min(1e-6)
    spread = 1.96 * float(share.std()) if len(share) > 1 else 0.0
    low = max(0.0, float(share.mean()) - spread) * float(hardness.min())
    high = (float(share.mean()) + spread) * float(hardness.max())
    source = f"KL of the whole plan on {kl.numel()} tokens of held-back calibration text; the range is from easy to hard text"
    nats = max(0.0, float(kl.mean()))
    return Damage(nats, "measured", min(low, nats), max(high, nats), source)
