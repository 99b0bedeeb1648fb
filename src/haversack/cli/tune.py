"""`haversack tune` and `haversack train`: choose how a run fits a budget, do it, go on after any stop."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haversack.cli import console
from haversack.cli.question import Budget, Source, TensorBudget, Trust, machine_named, spread_options
from haversack.errors import UsageError
from haversack.units import format_bytes, format_seconds, parse_budget, parse_bytes

if TYPE_CHECKING:
    from haversack.describe.model import Model
    from haversack.describe.training_settings import TrainingSettings
    from haversack.jobs.tune import TrainingResult
    from haversack.plan.training_file import TrainingPlan


@dataclass(frozen=True)
class RunOptions:
    """What `tune` and `train` are both asked."""

    data: Annotated[
        list[Path],
        typer.Option(
            "--data", metavar="FILE", help="Text, JSON lines (.jsonl) or parquet; several files are read in order."
        ),
    ]
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder; the same command goes on from it.")]
    budget: Budget = None
    tensor_budget: TensorBudget = None
    batch: Annotated[int, typer.Option("--batch", help="Rows per step; how many run at once is chosen.")] = 8
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", help="Tokens per row: the longest sample's, or 1024 of text, if left out."),
    ] = None
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the optimizer, instead of --epochs.")] = None
    epochs: Annotated[float, typer.Option("--epochs", help="Times through the data.")] = 1.0
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate; the method's default if left out.")] = (
        None
    )
    schedule: Annotated[str, typer.Option("--schedule", help="cosine, linear or constant, after the warm-up.")] = (
        "cosine"
    )
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps.")] = 0.03
    clip: Annotated[float, typer.Option("--clip", help="Largest norm of all gradients together; 0 for none.")] = 1.0
    holdout: Annotated[float, typer.Option("--holdout", help="Share of rows held back and evaluated, e.g. 0.02.")] = 0.0
    evaluate_every: Annotated[
        int | None,
        typer.Option("--evaluate-every", help="Steps between evaluations; a tenth of the run if left out."),
    ] = None
    save_every: Annotated[
        int | None, typer.Option("--save-every", help="Steps between checkpoints; a tenth of the run if left out.")
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Of the data's order, new weights and dropout.")] = 0
    pairs: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="Fix a choice: optimizer=sgdm, recompute=full, lora_rank=8."),
    ] = None
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="A folder with a tokenizer, if the model's has none.")
    ] = None
    cap: Annotated[
        str | None,
        typer.Option("--cap", help="A hard limit on this process's private memory (RLIMIT_DATA), e.g. 2GiB."),
    ] = None
    resume_anyway: Annotated[
        bool,
        typer.Option("--resume-anyway", help="Go on though the model, the data or the options have changed."),
    ] = False
    trust_remote_code: Trust = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False

    def settings(self) -> TrainingSettings:
        from haversack.describe.training_settings import TrainingSettings

        return TrainingSettings(
            rows_per_step=self.batch,
            steps=self.steps,
            epochs=self.epochs,
            learning_rate=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            clip_norm=self.clip,
            seed=self.seed,
            holdout=self.holdout,
            evaluate_every=self.evaluate_every,
            save_every=self.save_every,
        )


@spread_options
def tune(
    model: Source,
    asked: RunOptions,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="full, lora, qlora, lq-lora, peqa, paca or side; the first that fits of full, lora and qlora if left out.",
        ),
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="Of pairs of answers: dpo (the default of such data) or logo.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A folder with an adapter of peft's to go on from.")
    ] = None,
) -> int:
    """Tune MODEL on data within a budget. Ctrl-C saves and stops; the same command goes on from there."""
    from haversack.describe.workload import METHODS

    if method is not None and method not in METHODS:
        raise UsageError(f"--method {method!r} is not one of {', '.join(METHODS)}.")
    if adapter is not None and method not in ("lora", "qlora"):
        raise UsageError("--adapter goes on from a low-rank adapter; say --method lora or qlora besides.")
    if loss is not None:
        from haversack.recipes.base import preference

        preference(loss)  # a name that there is
    chosen = {"method": method, "objective": loss}
    return _run("tune", model, asked, {name: value for name, value in chosen.items() if value is not None}, adapter)


@spread_options
def train(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A config.json, or a folder or hub id with one: new weights are made."),
    ],
    asked: RunOptions,
) -> int:
    """Train the architecture of CONFIG from new weights within a budget. Ctrl-C saves; the same command goes on."""
    return _run("train", config, asked, {}, None)


def _run(task: str, source: str, asked: RunOptions, chosen: dict[str, str], adapter: Path | None) -> int:
    from haversack.formats.output import check_output
    from haversack.formats.packed_folder import is_packed
    from haversack.jobs.ranks import ranks_of_environment
    from haversack.samples.read import check_file

    if asked.budget is not None and asked.tensor_budget is not None:
        raise UsageError("--budget and --tensor-budget were both given; a run has one budget.")
    text = asked.budget if asked.budget is not None else asked.tensor_budget
    if text is None:
        raise UsageError("no budget was given; say --budget 8GiB, or --budget 60% of available memory.")
    if asked.seq_len is not None and asked.seq_len < 2:
        raise UsageError(
            f"--seq-len is {asked.seq_len}, but a row has at least 2 tokens: one to read and one to predict."
        )
    ranks = ranks_of_environment()
    quiet = asked.json or not ranks.is_first
    machine = machine_named(None)
    budget_bytes = parse_budget(text, machine.tiers()["device"] // ranks.on_machine)
    settings = asked.settings()
    workload, pinned = _workload(task, chosen, asked.pairs or [], settings.rows_per_step)
    check_output(asked.output)
    for file in asked.data:
        check_file(file)

    from haversack.describe.workload import check_positions
    from haversack.jobs.tune import RunFolder, TrainingRequest, Watchers, run_training

    base_bytes = None
    if task == "tune" and is_packed(source):
        described, base_bytes = _packed_base(Path(source), workload, pinned)
        home = Path(source)
        precision = "fp32" if described.dtype == "F32" else "master"
        workload = dataclasses.replace(workload, method="qlora", precision=precision)
        pinned |= {"method", "precision"}
    else:
        described, home = _described(task, source, asked.trust_remote_code)
    if asked.seq_len is not None:
        check_positions(dataclasses.replace(workload, seq_len=asked.seq_len), described.max_positions, described.name)
    request = TrainingRequest(
        model=described,
        tokenizer_source=asked.tokenizer or home,
        files=tuple(asked.data),
        output=asked.output,
        machine=machine,
        workload=workload,
        pinned=pinned,
        settings=settings,
        budget_bytes=budget_bytes,
        budget_kind="tensor" if asked.tensor_budget is not None else "process",
        seq_len=asked.seq_len,
        adapter=adapter,
        base_bytes=base_bytes,
        cap_bytes=None if asked.cap is None else parse_bytes(asked.cap),
        resume_anyway=asked.resume_anyway,
        ranks=ranks,
    )
    page = _LivePage(RunFolder(asked.output).curves)

    def planned(plan: TrainingPlan) -> None:
        if ranks.is_first:
            page.open(plan)
        if not quiet:
            _print_plan(plan, asked.output)

    with console.progress_bar(quiet=quiet) as progress:
        result = run_training(
            request, Watchers(progress=progress, planned=planned, rows=page.update, stepped=_Progress(quiet=quiet))
        )
    page.close()
    if not ranks.is_first:
        return 0
    if asked.json:
        console.print_json(result.to_dict())
    else:
        _print_result(result)
    return 0


def _workload(task: str, chosen: dict[str, str], pairs: list[str], rows: int) -> tuple[Any, frozenset[str]]:
    """The workload that is asked, and the names of the fields that are fixed. What is not fixed begins where nothing is lost: states in
    32 bits, and all weights."""
    import dataclasses

    from haversack.cli.training import settings_of

    workload, parallel = settings_of(task, rows, 2, [*(f"{k}={v}" for k, v in chosen.items()), *pairs])
    if parallel.ranks > 1:
        raise UsageError(
            "--with spreads the run over ranks, but a run has those that it is started with: torchrun --nproc-per-node N -m haversack ..."
        )
    pinned = {pair.partition("=")[0] for pair in pairs} | set(chosen)
    if "samples_apart" in pinned:
        raise UsageError("--with samples_apart is decided by the data; leave it out.")
    fields: dict[str, Any] = {}
    if "precision" not in pinned:
        fields["precision"] = "master"
    if task == "tune" and "method" not in pinned:
        fields["method"] = "full"
    return dataclasses.replace(workload, **fields), frozenset(pinned)


def _packed_base(folder: Path, workload: Any, pinned: frozenset[str]) -> tuple[Model, dict[str, int]]:
    """A packed folder as a base. Raises UsageError where another method was asked: packed matrices are not trained."""
    from haversack.engine.packed_base import describe_packed_base

    if "method" in pinned and workload.method != "qlora":
        raise UsageError(
            f"{folder} is packed, so its weights stay as they are, but method {workload.method} was asked; leave --method out, or "
            "name the unpacked model."
        )
    if "precision" in pinned:
        raise UsageError(
            "beside a packed base adapters are kept in 32 bits and the base as it is; leave --with precision out."
        )
    return describe_packed_base(folder)


def _described(task: str, source: str, trust_remote_code: bool) -> tuple[Model, Path]:
    """The model, and the folder that its tokenizer is expected in. Of what is trained anew, weights are not looked at."""
    import dataclasses

    from haversack.describe.checkpoint import holds_weights, refuse_pickles
    from haversack.describe.model import describe_model
    from haversack.errors import CheckpointError

    described = describe_model(source, trust_remote_code=trust_remote_code)
    file = Path(source)
    home = described.folder or (file.parent if file.is_file() else file)
    if task == "train":
        return dataclasses.replace(described, folder=None), home
    refuse_pickles(described.folder)
    if not holds_weights(described.folder):
        raise CheckpointError(
            f"{source} has no weights here; tuning needs them, so name a folder with safetensors files (or train from its config)."
        )
    return described, home


class _LivePage:
    """The page of curves beside the run, made when the plan is known."""

    def __init__(self, file: Path):
        self.file = file
        self.page: Any = None
        self.rows: list[dict[str, Any]] = []

    def open(self, plan: TrainingPlan) -> None:
        from haversack.report.curves import CurvesPage

        self.page = CurvesPage(
            self.file,
            f"{Path(plan.model).name or plan.model}: {plan.workload['task']}",
            _settings_line(plan),
            predicted_peak_bytes=plan.peak_bytes,
            budget_bytes=plan.budget_bytes,
        )

    def update(self, plan: TrainingPlan, rows: list[dict[str, Any]]) -> None:
        from haversack.errors import OutputError

        self.rows = rows
        if self.page is None:
            return
        try:
            self.page.update(rows)
        except OutputError:  # a full disk: the run's own log says so
            return

    def close(self) -> None:
        if self.page is not None:
            self.page.update(self.rows, finished=True)


class _Progress:
    """One line on a terminal: steps, loss, bytes now, time left."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.started = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int, loss: float) -> None:
        from haversack.jobs.memory import private_bytes

        if self.quiet:
            return
        if self.first is None:
            self.first, self.started = done, time.monotonic()
        steps = done - self.first
        left = (time.monotonic() - self.started) / steps * (total - done) if steps else 0.0
        when = f", {format_seconds(left)} left" if steps and done < total else ""
        console.passing_line(
            f"step {done}/{total}, loss {loss:.3f}, {format_bytes(private_bytes())}{when}" if done < total else ""
        )


def _settings_line(plan: TrainingPlan) -> str:
    from haversack.describe.workload import LIKELIHOOD

    workload, settings = plan.workload, plan.settings
    method = f"{workload['method']}, " if "method" in workload else ""
    if workload.get("objective", LIKELIHOOD) != LIKELIHOOD:
        method += f"loss {workload['objective']}, "
    return (
        f"{method}{settings['rows_per_step']} x {workload['seq_len']} tokens per step ({workload['batch_size']} at once), "
        f"{workload['optimizer']}, precision {workload['precision']}, recompute {workload['recompute']}, "
        f"{'updated during the backward pass, ' if workload['update'] == 'backward' else ''}{settings['steps']} steps, "
        f"peak rate {settings['learning_rate']:g}."
    )


def _print_plan(plan: TrainingPlan, output: Path) -> None:
    console.paragraph(f"{Path(plan.model).name or plan.model}: {_settings_line(plan)}")
    budget = f" of {format_bytes(plan.budget_bytes)}" if plan.budget_bytes else ""
    console.paragraph(
        f"Predicted peak {format_bytes(plan.peak_bytes)}{budget}, at {plan.peak_time_point}; "
        f"at least {format_seconds(plan.seconds_per_step)} per step. Curves: {output / 'curves.html'}"
    )
    console.notes([f"so that it fits, {what}" for what in plan.given_up] or ["nothing had to be given up"])


_FIGURES = {"eval_loss": "held-back loss", "preferred": "chosen answers preferred", "eval_preferred": "held back"}
"""What a run's last figures are called where the log's names say too little."""


def _print_result(result: TrainingResult) -> None:
    facts = result.to_dict()
    rows = [
        [what, format_bytes(pair["predicted"]), format_bytes(pair["measured"])]
        for what, pair in [("process peak (private)", facts["peak_bytes"]), *facts["resident_bytes"].items()]
    ]
    if facts["peak_bytes_by_rank"]:
        predicted = format_bytes(facts["peak_bytes"]["predicted"])
        peaks = [
            [f"process peak of rank {rank} (private)", predicted, format_bytes(peak)]
            for rank, peak in enumerate(facts["peak_bytes_by_rank"])
        ]
        rows[:1] = peaks
    if facts["seconds_per_step"]["measured"] is not None:
        pair = facts["seconds_per_step"]
        rows.append(["seconds per step", format_seconds(pair["predicted"]), format_seconds(pair["measured"])])
    typer.echo("")
    console.table(("what", "predicted", "measured"), rows, right=(1, 2))
    figures = ", ".join(f"{_FIGURES.get(name, name)} {value:.4f}" for name, value in result.final.items())
    typer.echo("")
    console.paragraph(f"{result.steps} steps; {figures}.")
    if result.num_bad_rows:
        console.notes([f"{result.num_bad_rows} bad rows were left out; {result.folder / 'bad-rows.jsonl'} names each"])
    console.notes(result.notes)
    typer.echo(f"Written to {result.exported}.")
