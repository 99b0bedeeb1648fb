"""Cache policies on probes: what each loses against a whole cache, at which bytes, on any model folder, packed or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from haversack import data
from haversack.describe.checkpoint import holds_weights, refuse_pickles
from haversack.describe.model import Model, describe_model
from haversack.describe.site import AttentionSite
from haversack.errors import DoesNotFitError, PlanError, UnsupportedModelError, UsageError
from haversack.formats.packed_folder import is_packed
from haversack.parts.kv.base import KVOption
from haversack.recipes.base import Recipe, all_recipes
from haversack.units import parse_budget

Progress = Callable[[str, int, int], None]

PLANNED = "plan"
"""The policy that a packed folder was planned with."""

EVERYTHING = "all"
"""Every recipe."""

WHOLE = "whole"
"""The row of the reference itself: what the model can answer at all."""

LEAST_CONTEXT, DEFAULT_CONTEXT = 256, 1024
STATISTICS_TASKS = 1
"""Tasks of each kind that recipes take their statistics from: others than those that judge."""


@dataclass(frozen=True)
class Policy:
    """A whole cache under a name: one option per layer."""

    name: str
    options: tuple[KVOption, ...]

    @property
    def label(self) -> str:
        return " | ".join(dict.fromkeys(option.label for option in self.options)) or "every token as it is"


def evaluate_caches(
    folder: str | Path,
    *,
    policies: Sequence[str] = (),
    num_bytes: str | None = None,
    context_tokens: int | None = None,
    num_per_kind: int = 4,
    text: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probes of about `context_tokens`, `num_per_kind` of each kind, under each policy.

    `policies` are recipe ids, "all", or "plan" for a packed folder's own cache (its default; else every recipe without a byte
    budget offers its options). `num_bytes`, such as "25%" of the whole 16-bit cache of that context, lets every recipe fill
    that much. The reference is the same weights with a whole cache. Raises UsageError for a senseless question,
    UnsupportedModelError for a family whose attention can't be reached, DoesNotFitError where a single recipe was asked and
    has no form as small.
    """
    from haversack.engine.probe_meter import ProbeMeter

    tell = progress or (lambda what, done, total: None)
    if num_per_kind < 1:
        raise UsageError(f"--probes is {num_per_kind}, but must be at least 1 of each kind.")
    opened = _open(folder)
    context = _context(context_tokens, opened)
    tasks, others = _tasks(folder, context, num_per_kind, text)
    model = opened.load()
    meter = ProbeMeter(model, opened.sites, opened.dtype, tasks)
    whole = sum(site.bytes_per_token("BF16") for site in opened.sites) * meter.capacity_tokens
    budget = None if num_bytes is None else parse_budget(num_bytes, whole)
    chosen, left_out = _policies(opened, policies, budget, meter.capacity_tokens, _Statistics(model, opened, others))
    rows = [_row(Policy(WHOLE, ()), meter, opened.sites, whole)]
    for done, policy in enumerate(chosen):
        tell(f"probing {policy.name}", done, len(chosen))
        rows.append(_row(policy, meter, opened.sites, whole))
    tell("probing", len(chosen), len(chosen))
    return {
        "model": str(folder),
        "packed": opened.planned is not None,
        "context_tokens": context,
        "cache_tokens": meter.capacity_tokens,
        "whole_cache_bytes": whole,
        "budget_bytes": budget,
        "num_tasks": len(tasks),
        "policies": rows,
        "left_out": left_out,
    }


@dataclass(frozen=True)
class _Opened:
    """A folder's attention sites and how to load it; `planned` is the packed plan's option of every layer."""

    folder: Path
    sites: tuple[AttentionSite, ...]
    dtype: str
    max_positions: int | None
    planned: tuple[KVOption, ...] | None
    load: Callable[[], Any]


def _open(folder: str | Path) -> _Opened:
    path = Path(folder)
    if path.is_dir() and is_packed(path):
        from haversack.engine.load import open_packed
        from haversack.jobs.run import load

        packed = open_packed(path)
        _check_reachable(packed.described)
        described, plan = packed.described, packed.kv_plan
        return _Opened(path, plan.sites, plan.dtype, described.max_positions, plan.options, lambda: load(path))
    described = describe_model(folder)
    refuse_pickles(described.folder)
    if described.folder is None or not holds_weights(described.folder):
        raise PlanError(f"{folder} has no weights; probes need a model folder with them.")
    _check_reachable(described)
    return _Opened(
        described.folder,
        described.attention,
        described.dtype,
        described.max_positions,
        None,
        lambda: _load_plain(described),
    )


def _check_reachable(model: Model) -> None:
    """Raise UnsupportedModelError naming the first layer whose cache can't be planned, and what can be done."""
    for site in model.attention:
        if site.shares_with is not None or site.chunk_tokens is not None or site.is_latent:
            why = (
                "attends in chunks"
                if site.chunk_tokens is not None
                else "keeps latents or another layer's keys and values"
            )
            raise UnsupportedModelError(
                f"{model.model_type}: {site.id} {why}, so that no cache policy reaches it; its weights can be packed, and "
                "transformers' own cache stays as it is."
            )


def _load_plain(described: Model) -> Any:
    from haversack.engine import attention
    from haversack.engine.quiet import quiet_transformers
    from haversack.engine.whole import load_whole

    attention.register()
    with quiet_transformers():
        return load_whole(described, attention=attention.NAME).eval()


def _context(asked: int | None, opened: _Opened) -> int:
    longest = opened.max_positions or DEFAULT_CONTEXT * 2
    room = longest // 2  # questions and answers come on top, and before
    context = min(DEFAULT_CONTEXT, room) if asked is None else asked
    if not min(LEAST_CONTEXT, room) <= context <= room:
        raise UsageError(
            f"probes of {context} tokens were asked; {opened.folder} has {longest} positions, of which half are for the context, "
            f"and a probe takes {LEAST_CONTEXT}: choose {min(LEAST_CONTEXT, room)} to {room}."
        )
    return context


def _tasks(folder: str | Path, context: int, num_per_kind: int, text: str | None) -> tuple[tuple, tuple]:
    """The tasks that judge, and others for statistics."""
    from haversack.engine.quiet import quiet_transformers
    from haversack.jobs.run import open_tokenizer
    from haversack.probes.suite import make_suite

    with quiet_transformers():  # it warns of long texts, which are cut
        tokenizer = open_tokenizer(folder)
        try:
            judging = make_suite(
                tokenizer, text or data.text("foreign-prose"), context_tokens=context, num_per_kind=num_per_kind
            )
            others = make_suite(
                tokenizer,
                text or data.text("calibration")[: 1 << 19],
                context_tokens=context,
                num_per_kind=STATISTICS_TASKS,
                seed=1,
            )
        except ValueError as error:
            raise UsageError(f"{folder} can't be probed: {error}.") from None
    return judging, others


class _Statistics:
    """Measured when the first recipe asks for them."""

    def __init__(self, model: Any, opened: _Opened, tasks: Sequence[Any]):
        self._model, self._opened, self._tasks = model, opened, tasks
        self._made: Any = None

    def get(self) -> Any:
        if self._made is None:
            from haversack.engine.attention_statistics import AttentionStatistics

            needles = [task for task in self._tasks if task.announced]
            self._made = AttentionStatistics(self._model, self._opened.sites, self._opened.dtype, needles)
        return self._made


def _policies(
    opened: _Opened, asked: Sequence[str], budget: int | None, capacity_tokens: int, statistics: _Statistics
) -> tuple[list[Policy], list[dict[str, str]]]:
    """The whole caches that were asked for, and the recipes that have none, with the reason."""
    recipes = {name: recipe for name, recipe in all_recipes().items() if recipe.resident == "kv"}
    names = list(asked) or ([PLANNED] if opened.planned is not None and budget is None else [EVERYTHING])
    unknown = [name for name in names if name not in (PLANNED, EVERYTHING, *recipes)]
    if unknown:
        raise UsageError(
            f"there is no cache policy {unknown[0]!r}; there are {PLANNED}, {EVERYTHING}, {', '.join(recipes)}."
        )
    names = [one for name in names for one in (recipes if name == EVERYTHING else [name])]
    found: list[Policy] = []
    left_out: list[dict[str, str]] = []
    for name in dict.fromkeys(names):
        if name == PLANNED:
            if opened.planned is None:
                raise UsageError(f"{opened.folder} is not packed, so it has no planned cache; name a recipe.")
            found.append(Policy(PLANNED, opened.planned))
            continue
        try:
            made = _of_recipe(recipes[name], opened, budget, capacity_tokens, statistics)
        except DoesNotFitError as error:
            if len(names) == 1:
                raise
            left_out.append({"policy": name, "why": str(error)})
            continue
        if not made:
            left_out.append({"policy": name, "why": "it is for a byte budget; give --bytes"})
        found += made
    if not found:
        raise UsageError(f"none of the policies has a form for that: {left_out[0]['policy']}: {left_out[0]['why']}")
    return found, left_out


def _of_recipe(
    recipe: Recipe, opened: _Opened, budget: int | None, capacity_tokens: int, statistics: _Statistics
) -> list[Policy]:
    from haversack.recipes.cache_budget import CacheBudget

    if budget is None:
        return [Policy(recipe.id, (option,) * len(opened.sites)) for option in recipe.options()]
    if recipe.whole_cache is None:
        return []
    measured = statistics.get() if recipe.needs_statistics else None
    asked = CacheBudget(opened.sites, capacity_tokens, opened.dtype, budget, measured)
    return [Policy(recipe.id, recipe.whole_cache(asked))]


def _row(policy: Policy, meter: Any, sites: Sequence[AttentionSite], whole: int) -> dict[str, Any]:
    """A policy's figures: by kind of probe and way of asking, and the worst of them."""
    options = {site.id: option for site, option in zip(sites, policy.options)}
    scores = meter.scores(options)
    held = max(score.held_bytes for score in scores)
    probes: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(score.kind for score in scores):
        probes[kind] = {}
        for asked in ("after", "before"):
            some = [score for score in scores if score.kind == kind and score.asked == asked]
            if some:
                probes[kind][asked] = _figures(some)
    damages = {f"{kind}, {asked}": row["kl"] for kind, ways in probes.items() for asked, row in ways.items()}
    worst = max(damages, key=lambda name: damages[name])
    return {
        "policy": policy.name,
        "label": policy.label,
        "options": [option.to_dict() for option in policy.options],
        "held_bytes": held,
        "share_of_whole": held / whole,
        "filed_bytes": max(score.filed_bytes for score in scores),
        "probes": probes,
        "worst_probe": worst,
        "worst_kl": damages[worst],
    }


def _figures(scores: Sequence[Any]) -> Mapping[str, Any]:
    exact = [score.exact for score in scores if score.exact is not None]
    return {
        "kl": fmean(score.kl for score in scores),
        "exact": fmean(exact) if exact else None,
        "nll": fmean(score.nll for score in scores),
        "kl_by_task": [round(score.kl, 7) for score in scores],
    }
