"""Tuning and training inside a budget: read the data, choose how it fits, train, export; stop at any time, run again to go on.

A run lives in one folder: `plan.json`, `data/` (tokens), `checkpoints/`, `metrics.jsonl`, `bad-rows.jsonl`, and in the end `model/` or
`adapter/` and `result.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.checkpoint import Checkpoint, holds_weights, torch_dtype
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.parallel import Parallelism
from haversack.describe.training_settings import DEFAULT_LEARNING_RATES, TrainingSettings
from haversack.describe.workload import LIKELIHOOD, TrainWorkload, TuneWorkload
from haversack.errors import CheckpointError, InterruptedJobError, OutputError, UsageError
from haversack.formats.checkpoints import newest_intact, remove_unfinished
from haversack.formats.output import write_whole
from haversack.jobs import memory
from haversack.jobs.interrupt import stoppable
from haversack.jobs.ranks import ALONE, Ranks, joined
from haversack.jobs.training_log import TrainingLog
from haversack.parts.optimizer.adamw import AdamW
from haversack.plan.fit_training import fit_training
from haversack.plan.training import TrainingQuestion
from haversack.plan.training_file import TrainingPlan
from haversack.recipes.base import optimizer_option
from haversack.samples.packing import PackedRows
from haversack.samples.read import check_file
from haversack.samples.store import TokenStore, hash_files, make_store, open_store
from haversack.samples.tokens import Tokenizing
from haversack.units import format_bytes

if TYPE_CHECKING:
    from haversack.engine.training_step import TrainingStep
    from haversack.jobs.checkpoint_writer import CheckpointWriter

DEFAULT_SEQ_LEN = 1024
DEFAULT_OBJECTIVE = "dpo"
"""Of data with pairs of answers."""
SEQ_LEN_MULTIPLE = 64
MIN_SEQ_LEN = 8


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    path: Path

    plan = property(lambda self: self.path / "plan.json")
    data = property(lambda self: self.path / "data")
    bad_rows = property(lambda self: self.path / "bad-rows.jsonl")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    result = property(lambda self: self.path / "result.json")
    curves = property(lambda self: self.path / "curves.html")

    def metrics_of(self, rank: int) -> Path:
        """The run's log is the first rank's; others keep one of their own beside it."""
        return self.metrics if rank == 0 else self.path / f"metrics-rank-{rank}.jsonl"

    @property
    def is_unplanned(self) -> bool:
        """Whether it holds no more than what is there before a plan is: it was stopped while data were read."""
        early = {self.data.name, self.bad_rows.name, f"{self.bad_rows.name}.partial", f"{self.plan.name}.partial"}
        return self.path.is_dir() and {path.name for path in self.path.iterdir()} <= early


@dataclass(frozen=True)
class TrainingRequest:
    """What is asked. `workload.batch_size` and `seq_len` are placeholders until the data is known; `pinned` are the fields of the workload
    that the user chose. `base_bytes` are set where the model is a packed folder. `resume_anyway` goes on though the model, the data or what was asked has changed."""

    model: Model
    tokenizer_source: Path
    files: tuple[Path, ...]
    output: Path
    machine: Machine
    workload: TuneWorkload | TrainWorkload
    pinned: frozenset[str]
    settings: TrainingSettings
    budget_bytes: int | None
    budget_kind: Any = "process"
    seq_len: int | None = None
    adapter: Path | None = None
    base_bytes: Mapping[str, int] | None = None
    cap_bytes: int | None = None
    resume_anyway: bool = False
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.workload.update == "backward" and self.settings.clip_norm:
            raise UsageError(
                f"update=backward drops each gradient as it comes, so that gradients can't be clipped to a norm of "
                f"{self.settings.clip_norm:g} together; say --clip 0 besides."
            )

    @property
    def task(self) -> str:
        return self.workload.task

    def asked(self) -> dict[str, Any]:
        """What makes two requests the same, but for the budget (a plan that still fits may go on) and the paths."""
        pinned = {name: getattr(self.workload, name) for name in sorted(self.pinned)}
        return {"task": self.task, "seq_len": self.seq_len, "pinned": pinned, "settings": self.settings.to_dict()}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the model (with its weights), the data, and what was asked."""
        model = hashlib.sha256(self.model.fingerprint.encode())
        for folder in (self.model.folder, self.adapter):
            if folder is not None and holds_weights(folder):
                model.update(Checkpoint.open(folder).fingerprint().encode())
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (file := self.tokenizer_source / name).is_file():
                model.update(file.read_bytes())
        return {
            "model": model.hexdigest(),
            "data": hash_files(self.files),
            "plan": hashlib.sha256(json.dumps(self.asked(), sort_keys=True).encode()).hexdigest(),
        }


@dataclass(frozen=True)
class Watchers:
    """Who is told what: `stage` what is being done, `progress` counts (what, done, total), `planned` the plan before training, `rows` the log after each
    line, `stepped` (done, total, loss) after each step."""

    stage: Callable[[str], None] = lambda what: None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    planned: Callable[[TrainingPlan], None] = lambda plan: None
    rows: Callable[[TrainingPlan, list[dict[str, Any]]], None] = lambda plan, rows: None
    stepped: Callable[[int, int, float], None] = lambda done, total, loss: None


@dataclass
class TrainingResult:
    """What a run came to."""

    folder: Path
    exported: Path
    plan: TrainingPlan
    steps: int
    resumed_from: int | None
    num_samples: int
    num_bad_rows: int
    final: Mapping[str, float]
    peak_bytes: int
    seconds_per_step: float | None
    residents: Mapping[str, int]
    notes: list[str] = field(default_factory=list)
    peak_bytes_by_rank: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: predicted beside measured."""
        plan = self.plan
        return {
            "folder": str(self.folder),
            "exported": str(self.exported),
            "steps": self.steps,
            "resumed_from": self.resumed_from,
            "num_samples": self.num_samples,
            "num_bad_rows": self.num_bad_rows,
            "given_up": list(plan.given_up),
            "workload": plan.workload,
            "settings": plan.settings,
            "budget_bytes": plan.budget_bytes,
            "peak_bytes": {"predicted": plan.peak_bytes, "measured": self.peak_bytes},
            "peak_bytes_by_rank": self.peak_bytes_by_rank,
            "seconds_per_step": {"predicted": plan.seconds_per_step, "measured": self.seconds_per_step},
            "resident_bytes": {
                owner: {"predicted": plan.resident_bytes.get(owner, 0), "measured": num_bytes}
                for owner, num_bytes in self.residents.items()
            },
            "final": dict(self.final),
            "notes": self.notes,
        }


def run_training(request: TrainingRequest, watch: Watchers | None = None) -> TrainingResult:
    """Do it. Raises DataError, DoesNotFitError, UsageError before anything is trained; LossError where the loss breaks;
    InterruptedJobError (exit code 130) where the user stops, with everything saved."""
    watch = watch or Watchers()
    memory.return_freed_memory()
    folder = RunFolder(request.output)
    with memory.PeakSampler() as sampler, joined(request.ranks):
        if request.ranks.is_first:
            store, plan = _prepared(request, folder, watch)
        request.ranks.wait()
        if not request.ranks.is_first:
            store, plan = _tokens(request, folder, watch), TrainingPlan.read(folder.plan)
        watch.stage("")
        watch.planned(plan)
        return _train(request, folder, store, plan, watch, sampler)


def _prepared(request: TrainingRequest, folder: RunFolder, watch: Watchers) -> tuple[TokenStore, TrainingPlan]:
    """The data read, and the plan written: this run's own if it was begun before, fitted anew for another number of ranks."""
    known = _earlier_plan(request, folder)
    watch.stage("reading the data")
    store = _tokens(request, folder, watch)
    watch.stage("choosing how it fits")
    if known is not None and known.num_ranks == request.ranks.size:
        return store, known
    return store, _plan(request, folder, store) if known is None else _replan(request, folder, known)


def _earlier_plan(request: TrainingRequest, folder: RunFolder) -> TrainingPlan | None:
    """The plan of a run that was begun in this folder, if it is this one. Raises OutputError where the folder holds something else, or
    the run is finished; UsageError where the model, the data or what was asked has changed."""
    if not folder.path.exists():
        return None
    if not folder.plan.is_file():
        if folder.is_unplanned:
            return None
        raise OutputError(
            f"{folder.path} exists already and is no run of ours; choose another output or remove it first."
        )
    plan = TrainingPlan.read(folder.plan)
    if folder.result.is_file():
        raise OutputError(f"{folder.path} holds a finished run; choose another output, or remove it first.")
    changed = [name for name, value in request.fingerprints.items() if plan.fingerprints.get(name) != value]
    if changed and not request.resume_anyway:
        what = " and ".join(
            {"model": "the model", "data": "the data", "plan": "what was asked"}[name] for name in changed
        )
        detail = f" ({_difference(plan.asked, request.asked())})" if "plan" in changed else ""
        raise UsageError(
            f"{folder.path} holds a run that was begun with something else: {what} changed{detail}. Repeat the command that began it, choose "
            "another output, or say --resume-anyway."
        )
    if request.budget_bytes is not None and plan.peak_bytes > request.budget_bytes:
        raise UsageError(
            f"the run in {folder.path} was planned to peak at {format_bytes(plan.peak_bytes)}, but the budget is now "
            f"{format_bytes(request.budget_bytes)}; allow that much, or choose another output."
        )
    return plan


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    rows = []
    for name in before.keys() | now.keys():
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            rows += [
                f"{k} {one.get(k)!r} became {other.get(k)!r}"
                for k in sorted({**one, **other})
                if one.get(k) != other.get(k)
            ]
        elif one != other:
            rows.append(f"{name} {one!r} became {other!r}")
    return ", ".join(sorted(rows))


def _tokens(request: TrainingRequest, folder: RunFolder, watch: Watchers) -> TokenStore:
    """The data as tokens: those of the earlier try if the data are the same, else made now."""
    from haversack.jobs.run import open_tokenizer

    for file in request.files:
        check_file(file)
    store = open_store(folder.data)
    if store is not None and store.source_sha256 == request.fingerprints["data"]:
        return store
    tokenizer: Any = open_tokenizer(request.tokenizer_source)
    if len(tokenizer) > request.model.vocab_size:
        raise UsageError(
            f"the tokenizer in {request.tokenizer_source} has {len(tokenizer)} tokens, but {request.model.name} has "
            f"{request.model.vocab_size}; give the model's own with --tokenizer."
        )
    tokenizer.model_max_length = int(1e30)  # its warning about long texts is ours to give
    return make_store(
        folder.data,
        request.files,
        Tokenizing(tokenizer, str(request.tokenizer_source)),
        max_tokens=request.seq_len or request.model.max_positions,
        bad_rows_file=folder.bad_rows,
        progress=watch.progress,
    )


def _plan(request: TrainingRequest, folder: RunFolder, store: TokenStore) -> TrainingPlan:
    """Choose how it fits, write it down, before anything loads."""
    seq_len = request.seq_len or _seq_len(store, request.model)
    rows = PackedRows(store, seq_len, 0)
    found: dict[str, Any] = {"seq_len": seq_len, "samples_apart": rows.apart, **_objective(request, store)}
    workload = dataclasses.replace(request.workload, **found)
    fit = fit_training(_question(request, workload), request.pinned, clips=request.settings.clip_norm > 0)
    num_train = len(rows) - _num_held(len(rows), request.settings)
    settings = request.settings.resolved(num_train, _default_rate(fit.workload))
    plan = TrainingPlan.of(fit, settings, fingerprints=request.fingerprints, asked=request.asked())
    write_whole(folder.plan, plan.to_json())
    return plan


def _replan(request: TrainingRequest, folder: RunFolder, known: TrainingPlan) -> TrainingPlan:
    """The same run on another number of ranks: what it trains and how stays, what fits a rank is chosen anew."""
    before = known.training_workload
    workload = dataclasses.replace(before, batch_size=known.training_settings.rows_per_step, accumulation_steps=1)
    names = {field.name for field in dataclasses.fields(before)} - {"batch_size", "accumulation_steps", "seq_len"}
    free = {"recompute", "loss"} - request.pinned
    settings = known.training_settings
    fit = fit_training(_question(request, workload), names - free, clips=settings.clip_norm > 0)
    plan = TrainingPlan.of(fit, settings, fingerprints=known.fingerprints, asked=known.asked)
    plan = plan.model_copy(update={"given_up": known.given_up})
    plan = plan.model_copy(update={"prediction_hash": plan.computed_hash()})
    write_whole(folder.plan, plan.to_json())
    return plan


def _question(request: TrainingRequest, workload: TuneWorkload | TrainWorkload) -> TrainingQuestion:
    """Whether it fits one rank, which takes its part of a step's rows. Raises UsageError where ranks don't divide them."""
    ranks = request.ranks.size
    if workload.batch_size % ranks:
        raise UsageError(
            f"{ranks} ranks don't divide the {workload.batch_size} rows of a step; choose a multiple with --batch."
        )
    if ranks > 1:
        from haversack.engine.shards import check_sharded_optimizer

        check_sharded_optimizer(workload.optimizer)
        if request.base_bytes is not None:
            raise UsageError("a packed base is tuned by one process; name the unpacked model, or leave torchrun out.")
        workload = dataclasses.replace(workload, batch_size=workload.batch_size // ranks)
    from haversack.jobs.training_run import runtime_private_bytes

    machine = request.machine
    if request.budget_kind == "process":  # what the runtime takes is what this process holds now
        rates = dataclasses.replace(machine.rates, training_private_bytes=runtime_private_bytes(request.workload))
        machine = dataclasses.replace(machine, rates=rates)
    return TrainingQuestion(
        request.model,
        workload,
        machine,
        Parallelism(data=ranks, zero=3 if ranks > 1 else 0),
        request.budget_bytes,
        request.budget_kind,
        request.base_bytes,
        whole_at_ends=ranks > 1,
    )


def _objective(request: TrainingRequest, store: TokenStore) -> dict[str, str]:
    """What is learned, as the data says: of pairs of answers to prefer the chosen one. Raises UsageError where something else was
    asked."""
    if not isinstance(request.workload, TuneWorkload):
        if store.is_pairs:
            raise UsageError(
                "the data has pairs of a chosen and a rejected answer, which tune a model; training begins with text."
            )
        return {}
    asked = request.workload.objective if "objective" in request.pinned else None
    if store.is_pairs and asked == LIKELIHOOD:
        raise UsageError(f"the loss {asked} learns from one answer, but the data has pairs of them; leave --loss out.")
    if not store.is_pairs and asked not in (None, LIKELIHOOD):
        raise UsageError(
            f"the loss {asked} compares a chosen with a rejected answer, but the data is {store.form}; give rows of prompt, chosen and "
            "rejected, or leave --loss out."
        )
    return {"objective": asked or (DEFAULT_OBJECTIVE if store.is_pairs else LIKELIHOOD)}


def _default_rate(workload: TuneWorkload | TrainWorkload) -> float:
    """The method's under AdamW's rule, in whatever form its states are kept; the rule's own elsewhere."""
    rule = optimizer_option(workload.optimizer).rule
    if isinstance(rule, AdamW):
        if not isinstance(workload, TuneWorkload):
            return DEFAULT_LEARNING_RATES["train"]
        pairs = "" if workload.objective == LIKELIHOOD else " on pairs"
        return DEFAULT_LEARNING_RATES[workload.method + pairs]
    return rule.lr


def _seq_len(store: TokenStore, model: Model) -> int:
    """Tokens of a row: the longest sample's, or for text `DEFAULT_SEQ_LEN`, in whole multiples of 64, within the model's positions."""
    wanted = min(DEFAULT_SEQ_LEN, store.num_tokens) if store.is_stream else store.longest_tokens
    rounded = -(-wanted // SEQ_LEN_MULTIPLE) * SEQ_LEN_MULTIPLE
    return max(MIN_SEQ_LEN, min(rounded, model.max_positions or rounded))


def _num_held(num_rows: int, settings: TrainingSettings) -> int:
    return min(num_rows - 1, max(1, round(settings.holdout * num_rows))) if settings.holdout and num_rows > 1 else 0


def _train(
    request: TrainingRequest,
    folder: RunFolder,
    store: TokenStore,
    plan: TrainingPlan,
    watch: Watchers,
    sampler: memory.PeakSampler,
) -> TrainingResult:
    from haversack.engine.quiet import quiet_transformers
    from haversack.jobs.checkpoint_writer import CheckpointWriter
    from haversack.jobs.reference_answers import reference_answers
    from haversack.jobs.train_loop import TrainingLoop

    settings, workload = plan.training_settings, plan.training_workload
    log = TrainingLog(folder.metrics_of(request.ranks.rank), lambda rows: watch.rows(plan, rows))
    watch.stage("loading the model")
    if request.cap_bytes is not None:
        memory.set_cap(request.cap_bytes)
    with quiet_transformers():
        step = _step(request, workload, settings)
        rows = PackedRows(store, workload.seq_len, _padding(step.model))
        reference = None
        if step.preference is not None and step.preference.uses_reference:
            watch.stage("asking the model before it is tuned")
            reference = reference_answers(folder.path, step, rows, request.fingerprints, request.ranks, watch.progress)
        writer = CheckpointWriter(folder.checkpoints, plan.fingerprints, request.ranks)
        first, notes = _resume(request, folder, step, writer, log)
        held = _num_held(len(rows), settings)
        loop = TrainingLoop(
            step,
            rows,
            train_rows=range(held, len(rows)),
            held_rows=range(held),
            settings=settings,
            writer=writer,
            log=log,
            progress=watch.stepped,
            reference=reference,
            ranks=request.ranks,
        )
        watch.stage("")
        with stoppable() as stopped:
            loop.stopped = stopped
            try:
                done = loop.run(first)
            finally:
                writer.wait()
        if done < settings.num_steps:
            raise InterruptedJobError(
                f"stopped after step {done} of {settings.num_steps}, which is saved in {folder.checkpoints}; run the same command again to go on."
            )
        residents = _resident_bytes(step)
        exported = _export(request, step, folder)
        peak = sampler.finish()
    notes += [*step.notes, *log.events]
    result = TrainingResult(
        folder.path,
        exported,
        plan,
        done,
        first or None,
        store.num_samples,
        store.num_bad_rows,
        _last_figures(log),
        peak,
        _median(loop.seconds_per_step),
        residents,
        notes,
        request.ranks.each(peak) if request.ranks.are_several else [],
    )
    if request.ranks.is_first:
        write_whole(folder.result, json.dumps(result.to_dict(), indent=1))
    return result


def _step(request: TrainingRequest, workload: Any, settings: TrainingSettings) -> TrainingStep:
    """The model loaded, made ready, and with an optimizer at the asked rate."""
    import torch

    from haversack.engine.packed_base import freeze_packed
    from haversack.engine.peft_format import load_adapter
    from haversack.engine.training_step import DTYPES, TrainingStep
    from haversack.jobs.training_run import open_for, open_model

    torch.manual_seed(settings.seed)
    dtype = DTYPES[workload.weights_dtype]
    read = None
    if request.base_bytes is not None:
        dtype = torch_dtype(request.model.dtype)  # what was not packed stays as it is, too
        model = open_model(request.model, dtype, workload.attention, seed=settings.seed)
        freeze_packed(model, workload.attention)
    else:
        model, read = open_for(request.model, workload, dtype, seed=settings.seed)
    step = TrainingStep(model, request.model, workload, request.output, read)
    if request.adapter is not None:
        load_adapter(model, request.adapter)
    if request.ranks.are_several:
        step.shard(request.ranks.mesh())
        torch.manual_seed(settings.seed + request.ranks.rank)  # of what is dropped at random
    step.begin(request.model)
    groups = [group for optimizer in step.optimizer.optimizers for group in optimizer.param_groups]
    assert settings.learning_rate is not None, "settings are resolved before a run"
    for group in groups[1:]:
        group["lr"] = settings.learning_rate * group["lr"] / groups[0]["lr"]
    groups[0]["lr"] = settings.learning_rate
    return step


def _resume(
    request: TrainingRequest, folder: RunFolder, step: TrainingStep, writer: CheckpointWriter, log: TrainingLog
) -> tuple[int, list[str]]:
    """Put the newest intact checkpoint back; the steps that are done, and notes. Raises UsageError for a checkpoint of another run."""
    from haversack.engine.recompute import has_dropout
    from haversack.engine.training_state import restore

    if request.ranks.is_first:
        remove_unfinished(folder.checkpoints)
    request.ranks.wait()
    saved, damaged = newest_intact(folder.checkpoints)
    notes = [f"{sentence.rstrip('.')}; the one before it was used" for sentence in damaged]
    if saved is None:
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {folder.checkpoints} is intact ({damaged[0].rstrip('.')}); remove the folder to begin again."
            )
        log.go_back_to(0)
        return 0, notes
    changed = [name for name, value in request.fingerprints.items() if saved.fingerprints.get(name) != value]
    if changed and not request.resume_anyway:
        raise UsageError(
            f"{saved.path} is of another run: its {', '.join(changed)} differ; say --resume-anyway to use it."
        )
    goes_on = restore(step, saved)
    if not goes_on:
        import torch

        torch.manual_seed(request.settings.seed + saved.step + request.ranks.rank)
    if request.ranks.any(not goes_on) and has_dropout(step.model.config):
        notes.append("the ranks were not as many before, so that what is dropped at random is drawn anew")
    writer.last_saved = saved.step
    log.go_back_to(saved.step)
    for note in notes:
        log.event(saved.step, note)
    return saved.step, []


def _padding(model: Any) -> int:
    """Any token that exists: padding is never seen by a sample nor counted."""
    return next((i for i in (model.config.pad_token_id, model.config.eos_token_id) if isinstance(i, int)), 0)


def _resident_bytes(step: TrainingStep) -> dict[str, int]:
    return {
        owner: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        for owner, tensors in step.residents().items()
    }


def _export(request: TrainingRequest, step: TrainingStep, folder: RunFolder) -> Path:
    """The result in Hugging Face's layout, whole or not at all: `adapter/` for adapters, `side/` for a side network, `scales/` for scales, else `model/`. Optimizer
    states are dropped first, so that writing can't be the peak."""
    from haversack.engine.connections import release
    from haversack.engine.optimizers import Stepper
    from haversack.engine.peft_format import adapters_of, save_adapter
    from haversack.engine.rounded_weights import release_rounded
    from haversack.engine.scales import save_scales, scales_of
    from haversack.engine.side_network import save_side_network, side_parameters

    step.optimizer = Stepper([])
    kinds = {"adapter": adapters_of, "side": side_parameters, "scales": scales_of}
    kind = next((name for name, parts in kinds.items() if parts(step.model)), "model")
    final = folder.path / kind
    partial = final.with_name(final.name + ".partial")
    release(step.model)
    release_rounded(step.model)
    whole = None if step.shards is None else step.shards.gather()
    if not request.ranks.is_first:
        return final
    shutil.rmtree(partial, ignore_errors=True)
    base = str(request.model.folder or request.model.name)
    if kind == "adapter":
        save_adapter(step.model, partial, base)
    elif kind == "side":
        save_side_network(step.model, partial, base)
    elif kind == "scales":
        assert isinstance(step.workload, TuneWorkload)
        save_scales(step.model, partial, base, step.workload.lora_targets)
    else:
        step.model.save_pretrained(partial, state_dict=whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
                 "merges.txt", "tokenizer.model"):  # fmt: skip
        if (file := request.tokenizer_source / name).is_file():
            shutil.copy(file, partial / name)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def _last_figures(log: TrainingLog) -> dict[str, float]:
    """The last loss, and the last evaluation where there was one; of pairs also the share that is preferred."""
    found: dict[str, float] = {}
    for row in log.rows:
        found |= {name: row[name] for name in ("loss", "preferred", "eval_loss", "eval_preferred") if name in row}
    return found


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
