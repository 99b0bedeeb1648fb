"""Damage of every option at every site of one model, from one calibration pass: proxies first, then single changes measured.

Weights: an option's change of the matrix, weighted by the second-order statistics of `engine.calibrate`; then KL of the model
with one site changed, for those that could be chosen (`cost.single_changes`). Caches: KL with one layer's cache changed.
Everything is kept by content hash and resumes site by site.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock, Timeout

from haversack._version import __version__
from haversack.cache import cache_folder
from haversack.cost.cache_damages import MAX_SECONDS, cache_damages, head_options, measure_heads, probe_rows
from haversack.cost.damage import NONE, Damage
from haversack.cost.dropped import follows_for_free
from haversack.cost.lossless import holding
from haversack.cost.single_changes import Rows, is_small, measure_cache_options, measure_weight_options, stage_model
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint, require_finite
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.calibrate import CalibrationSettings, calibrate
from haversack.engine.layers import StreamedModel
from haversack.engine.observe import products_in_bfloat16
from haversack.engine.quiet import quiet_transformers
from haversack.engine.site_statistics import SiteStatistics, Statistics
from haversack.engine.token_weights import collect_attended
from haversack.engine.windows import TextWindows, text_windows, token_windows
from haversack.errors import CheckpointError, UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.nearest import NearestRounding
from haversack.probes.suite import Task
from haversack.recipes.base import candidate_options

SAMPLED_ROWS = 512
"""Rows of a matrix that are packed to estimate an option's damage; rounding treats rows alike, so that a sample scales."""

SEARCHED_ROWS = 64
"""Of options whose codes are searched for along rows, which takes a hundred times as long."""

_VERSION = 4
"""Counts changes of how damages are found; part of their file's name."""

_TINY = 1e-30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Packed:
    """What an option stores of a site, and what had to be changed for it."""

    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """What packing and planning need of one calibration pass."""

    model: Model
    windows: TextWindows
    statistics: Statistics
    weight_damages: Mapping[str, Mapping[WeightOption, Damage]]
    kv_damages: Mapping[str, Mapping[KVOption, Damage]]
    notes: tuple[str, ...]
    tasks: tuple[Task, ...] = ()
    """Probes that steer the search over whole plans, where plans are judged by probes."""
    judge_tasks: tuple[Task, ...] = ()
    """Others, that judge the plan that is kept."""
    packed: dict[tuple[str, WeightOption], Packed] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """What was packed to measure whole plans, by site id and option, so that packing the one that is kept need not do it again."""


def calibrate_model(
    model: Model,
    text: str,
    *,
    num_tokens: int = 32_768,
    seq_len: int = 512,
    kv_capacity_tokens: int = 1024,
    recipes: tuple[str, ...] = (),
    probes: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Calibrate a described folder on `text`, or read what an earlier call left. `recipes` restricts what is weighed, as in
    `plan.question.Question`.

    With `probes` caches are weighed head by head on probes of `kv_capacity_tokens` besides text, and plans are judged by the worst.
    Waits while another process calibrates the same model: they would share its files.
    Raises UsageError for an empty text and CheckpointError where the model has no weights.
    """
    tell = progress or (lambda what, done, total: None)
    windows = _windows(model, text, num_tokens, seq_len)
    with _one_at_a_time(model, tell):
        return _calibrate(model, text, windows, kv_capacity_tokens, recipes, probes, tell)


def collect_statistics(
    model: Model, text: str, *, num_tokens: int = 32_768, seq_len: int = 512, progress: Progress | None = None
) -> Calibration:
    """The calibration's statistics and windows alone, no option weighed; as `calibrate_model`."""
    tell = progress or (lambda what, done, total: None)
    windows = _windows(model, text, num_tokens, seq_len)
    with _one_at_a_time(model, tell):
        statistics = _statistics(model, windows, tell)
    return Calibration(model, windows, statistics, {}, {}, windows.notes)


def _windows(model: Model, text: str, num_tokens: int, seq_len: int) -> TextWindows:
    if model.folder is None:
        raise CheckpointError(f"{model.name} is described from its config alone; calibrating needs its weights.")
    if not text.strip():
        raise UsageError("the calibration text is empty; name a text file of some hundred kilobytes.")
    return text_windows(token_ids_of(model, text), num_tokens, min(seq_len, model.max_positions or seq_len))


def _statistics(model: Model, windows: TextWindows, tell: Progress) -> Statistics:
    folder, settings = cache_folder("calibration"), CalibrationSettings()
    return calibrate(model, windows.calibration, cache=folder, settings=settings, progress=tell)


@contextmanager
def _one_at_a_time(model: Model, tell: Progress) -> Iterator[None]:
    """The system lets go of the lock when its process ends, however that ends."""
    cache_folder("calibration").mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_folder("calibration") / f"{model.fingerprint[:16]}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        tell("waiting for another calibration of this model", 0, 1)
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


def _calibrate(
    model: Model,
    text: str,
    windows: TextWindows,
    kv_capacity_tokens: int,
    recipes: tuple[str, ...],
    probes: bool,
    tell: Progress,
) -> Calibration:
    statistics = _statistics(model, windows, tell)
    offered = candidate_options("weights", recipes)
    if any("attended" in part.needs for option in offered for part in option.parts):
        collect_attended(StreamedModel.open(model), windows.calibration, statistics.folder, progress=tell)
    table = DamageTable(statistics.folder / f"damages-{__version__}-{_VERSION}.jsonl")
    proxies = _weight_damages(model, statistics, offered, table, tell)
    staged, scratch = stage_model(model), statistics.folder / "scratch"
    some = windows.search[:: 2 if is_small(model) else 4]
    weight_damages = measure_weight_options(staged, some, statistics, proxies, table, option_key, scratch, tell)
    found = Calibration(model, windows, statistics, weight_damages, {}, windows.notes)
    if probes:
        length = min(kv_capacity_tokens, model.max_positions or kv_capacity_tokens)
        tasks, judges = (probe_tasks(model, text, length, seed) for seed in (1, 2))
        kv_damages = probed_caches(
            staged, tasks, windows.calibration.reshape(-1).tolist(), length, table, scratch, tell
        )
        return dataclasses.replace(found, kv_damages=kv_damages, tasks=tasks, judge_tasks=judges)
    caches = [o for o in candidate_options("kv", recipes) if not o.is_neutral]
    kv_damages = _kv_damages(staged, windows.calibration, caches, kv_capacity_tokens, table, scratch, tell)
    return dataclasses.replace(found, kv_damages=kv_damages)


def probe_tasks(model: Model, text: str, cache_tokens: int, seed: int, num_per_kind: int = 1) -> tuple[Task, ...]:
    """Probes that fit a cache of `cache_tokens`. Raises UsageError where it is too short, or the tokenizer can't be probed with."""
    from haversack.probes.suite import LEAST_CONTEXT_TOKENS, TURNS_TOKENS, make_suite

    context_tokens = cache_tokens - TURNS_TOKENS
    if context_tokens < LEAST_CONTEXT_TOKENS:
        raise UsageError(
            f"probes take {LEAST_CONTEXT_TOKENS + TURNS_TOKENS} tokens, but the context has {cache_tokens}; plan a longer one, or without --probes."
        )
    try:
        tokenizer, text = open_tokenizer(model), text[:PROBE_TEXT_CHARACTERS]
        with quiet_transformers():
            return make_suite(tokenizer, text, context_tokens=context_tokens, num_per_kind=num_per_kind, seed=seed)
    except ValueError as error:
        raise UsageError(f"{model.folder} can't be probed: {error}; plan without --probes.") from None


def probed_caches(
    staged: StreamedModel,
    tasks: Sequence[Task],
    text_ids: Sequence[int],
    length: int,
    table: Rows,
    scratch: Path,
    tell: Progress,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, dict[KVOption, Damage]]:
    """Every layer's options made of its heads', weighed on probes."""
    rows = probe_rows(tasks, text_ids, length)
    heads = measure_heads(staged, rows, head_options(length), table, scratch, tell, max_seconds)
    return cache_damages(staged.described, heads, length)


PROBE_TEXT_CHARACTERS = 1 << 18
"""Of the calibration text: needles are set into it, and it is tokenized once."""


def token_ids_of(model: Model, text: str) -> list[int]:
    """A text's token ids. Raises CheckpointError where the folder has no usable tokenizer."""
    try:
        with quiet_transformers():  # it warns of long texts, which are cut later
            return open_tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise _no_tokenizer(model, error) from None


def open_tokenizer(model: Model) -> Any:
    """The folder's tokenizer. Raises CheckpointError where there is no usable one."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(model.folder)
    except Exception as error:  # as above
        raise _no_tokenizer(model, error) from None


def _no_tokenizer(model: Model, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:160].rstrip(".")
    return CheckpointError(
        f"{model.folder} has no usable tokenizer ({type(error).__name__}: {reason}); copy tokenizer.json and "
        "tokenizer_config.json there."
    )


def tokenize(model: Model, text: str, *, num_tokens: int, seq_len: int) -> torch.Tensor:
    """At most `num_tokens` of a text as `(sequences, seq_len)`, spread evenly over it."""
    ids = token_ids_of(model, text)
    seq_len = min(seq_len, model.max_positions or seq_len, len(ids))
    return token_windows(ids, max(1, num_tokens // seq_len), seq_len)


class DamageTable:
    """A JSON-lines file of finished rows: key -> value, appended as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                self.rows[key] = value

    def add(self, key: str, value: Any) -> None:
        self.rows[key] = value
        with self.path.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")


def _weight_damages(
    model: Model, statistics: Statistics, offered: Sequence[WeightOption], table: DamageTable, tell: Progress
) -> dict[str, dict[WeightOption, Damage]]:
    assert model.folder is not None
    checkpoint = Checkpoint.open(model.folder)
    options = _worth_weighing([option for option in offered if option.code is None])
    codes = [option for option in offered if option.code is not None]
    out: dict[str, dict[WeightOption, Damage]] = {}
    for done, site in enumerate(model.weights):
        tell("weighing options", done, len(model.weights))
        out[site.id] = {WeightOption(): NONE}
        row = f"code {site.id} {[option.label for option in codes]}"
        weighed = site.id not in statistics or all(option_key(site.id, option) in table.rows for option in options)
        if row not in table.rows or not weighed:
            weight = require_finite(read_site(checkpoint, site), site.id)
        if row not in table.rows:
            found = holding(codes, site, weight)
            table.add(row, None if found is None else codes.index(found))
        if (place := table.rows[row]) is not None:
            out[site.id][codes[place]] = NONE
        if site.id not in statistics:
            continue
        if not weighed:
            weigh = Weigher(site, weight.float(), statistics[site.id])
            for option, nats in weigh.damages(options).items():
                table.add(option_key(site.id, option), nats)
        for option in options:
            nats = table.rows[option_key(site.id, option)]
            proxy = Damage(nats, "proxied", source="output error weighted by Fisher statistics")
            out[site.id][option] = follows_for_free(site, option) or proxy
    tell("weighing options", len(model.weights), len(model.weights))
    return out


def _worth_weighing(offered: Sequence[WeightOption]) -> list[WeightOption]:
    """With statistics at hand, second-order feedback is never worse than nearest rounding at the same bytes."""
    better = {
        dataclasses.replace(option, rounding=NearestRounding())
        for option in offered
        if option.rounding is not None and "hessian" in option.rounding.needs
    }
    return [option for option in offered if option not in better]


class Weigher:
    """Estimates damages of options at one site on a sample of its rows."""

    def __init__(self, site: WeightSite, weight: torch.Tensor, statistics: SiteStatistics):
        self.whole, self.statistics = weight, statistics
        self._samples: dict[int, tuple[slice, float]] = {}

    def _sample(self, option: WeightOption) -> tuple[slice, float]:
        """Rows, and what they stand for: the damage of noise as large as each row, over all rows and over the sample."""
        searched = option.grid is not None and option.grid.num_states > 0
        number = SEARCHED_ROWS if searched else SAMPLED_ROWS
        if number not in self._samples:
            rows = slice(0, None, max(1, len(self.whole) // number))
            all_rows, part = 0.0, 0.0
            for h, importance in self.statistics.pairs:
                of_rows = self.whole.square() @ h.diagonal() * importance
                all_rows, part = all_rows + float(of_rows.sum()), part + float(of_rows[rows].sum())
            self._samples[number] = rows, all_rows / part if part > 0 else float(rows.step)
        return self._samples[number]

    def damages(self, options: Sequence[WeightOption]) -> dict[WeightOption, float]:
        """Nats per token of every option.

        Nearest rounding is weighed for all of them, quickly. What a rounding with feedback gains over it, a factor that
        belongs to the site's statistics and not to the grid (2.24 to 2.34 at four grids of one matrix), is weighed at the
        largest and the median damage and interpolated in the logarithm of the nearest one.
        """
        kinds: dict[object, list[WeightOption]] = {}
        for option in options:
            kinds.setdefault((option.transforms, option.rounding, option.corrections), []).append(option)
        return {option: nats for kind in kinds.values() for option, nats in self._damages_of_kind(kind).items()}

    def _damages_of_kind(self, options: Sequence[WeightOption]) -> dict[WeightOption, float]:
        """The same for options that differ in their grids alone."""
        if options[0].rounding == NearestRounding() or len(options) <= 2:
            return {option: self.damage(option) for option in options}
        nearest = {o: self.damage(dataclasses.replace(o, rounding=NearestRounding())) for o in options}
        ordered = sorted(options, key=lambda o: nearest[o])
        probes = [ordered[len(ordered) // 2], ordered[-1]]
        gains = [math.log(max(self.damage(o), _TINY) / max(nearest[o], _TINY)) for o in probes]
        low, high = (math.log(max(nearest[o], _TINY)) for o in probes)
        out = {}
        for option in options:
            at = (math.log(max(nearest[option], _TINY)) - low) / (high - low) if high > low else 0.0
            gain = gains[0] + (gains[1] - gains[0]) * min(1.0, max(0.0, at))
            out[option] = nearest[option] * math.exp(min(0.0, gain))
        return out

    def damage(self, option: WeightOption) -> float:
        """Nats per token of one option, packed and read back."""
        return self._nats(option, [option])[0]

    def prefix_damages(self, option: WeightOption) -> list[float]:
        """Nats per token with the fewest blocks of an option's stack, with one more, and so on: packed once."""
        assert option.stack is not None
        numbers = range(option.least_blocks, option.stack.blocks + 1)
        return self._nats(option, [option.shortened(number) for number in numbers])

    def _nats(self, packed: WeightOption, read: Sequence[WeightOption]) -> list[float]:
        """Nats per token of options that read what one of them packed."""
        rows, scale = self._sample(packed)
        weight = self.whole[rows].contiguous()
        tensors = packed.encode(self.statistics.task(weight.clone()))
        return [scale * self._proxy(option.dense(tensors, *weight.shape) - weight, rows) for option in read]

    def _proxy(self, change: torch.Tensor, rows: slice) -> float:
        nats = 0.0
        with products_in_bfloat16():  # off by 0.4% at most, where the proxy itself is off by tens of percent
            for h, importance in self.statistics.pairs:
                nats += 0.5 * float(((change @ h) * change).sum(1) @ importance[rows])
        return nats


def _kv_damages(
    staged: StreamedModel,
    token_ids: torch.Tensor,
    options: Sequence[KVOption],
    capacity_tokens: int,
    table: DamageTable,
    scratch: Path,
    tell: Progress,
) -> dict[str, dict[KVOption, Damage]]:
    """Every layer's cache under every option measured alone; where time ran out, the mean of the layers that were."""
    model = staged.described
    length = min(capacity_tokens, model.max_positions or capacity_tokens)
    rows = token_windows(token_ids.reshape(-1).tolist(), 2 if is_small(model) else 1, length)
    measure_cache_options(staged, rows, options, table, option_key, scratch, tell)
    out: dict[str, dict[KVOption, Damage]] = {site.id: {KVOption(): NONE} for site in model.attention}
    sites = [site.id for site in model.attention if site.shares_with is None]
    for option in options:
        found = {
            s: table.rows[f"KL {option_key(s, option)}"] for s in sites if f"KL {option_key(s, option)}" in table.rows
        }
        for site_id in sites if found else ():
            if site_id in found:
                damage = Damage(found[site_id], "measured", source="KL of the model with this layer's cache so held")
            else:
                damage = Damage(fmean(found.values()), "proxied", source="mean KL of the same cache at other layers")
            out[site_id][option] = damage
    return out


def option_key(where: str, option: WeightOption | KVOption) -> str:
    """Under which an option's damage at a site is kept."""
    digest = hashlib.sha256(json.dumps(option.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
    return f"{where} {digest}"
