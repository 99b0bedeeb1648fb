"""`haversack tune` and `haversack train`: choose how a run fits a budget, do it, go on after any stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haversack.cli import console
from haversack.cli.question import Source, Trust, machine_named
from haversack.errors import UsageError
from haversack.units import format_bytes, format_seconds, parse_budget, parse_bytes

if TYPE_CHECKING:
    from haversack.describe.model import Model
    from haversack.jobs.tune import TrainingResult
    from haversack.plan.training_file import TrainingPlan

METHODS = ("full", "lora", "qlora")

Data = Annotated[
    list[Path], typer.Option("--data", help="Text, JSON lines (.jsonl) or parquet; several files are read in order.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The run's folder; the same command goes on from it.")]
Budget = Annotated[
    str | None, typer.Option("--budget", help="Peak of the whole process: 8GiB, 8GB, or 60% of available memory.")
]
TensorBudget = Annotated[
    str | None, typer.Option("--tensor-budget", help="Peak of our tensors alone (for small models and tables).")
]
Batch = Annotated[int, typer.Option("--batch", help="Rows per step; how many run at once is chosen.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens per row: the longest sample's, or 1024 of text, if left out.")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Steps of the optimizer, instead of --epochs.")]
Epochs = Annotated[float, typer.Option("--epochs", help="Times through the data.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate; the method's default if left out.")]
Schedule = Annotated[str, typer.Option("--schedule", help="cosine, linear or constant, after the warm-up.")]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps.")]
Clip = Annotated[float, typer.Option("--clip", help="Largest norm of all gradients together; 0 for none.")]
Holdout = Annotated[float, typer.Option("--holdout", help="Share of rows held back and evaluated, e.g. 0.02.")]
EvaluateEvery = Annotated[
    int | None, typer.Option("--evaluate-every", help="Steps between evaluations; a tenth of the run if left out.")
]
SaveEvery = Annotated[
    int | None, typer.Option("--save-every", help="Steps between checkpoints; a tenth of the run if left out.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the data's order, new weights and dropout.")]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="KEY=VALUE", help="Fix a choice: optimizer=sgdm, recompute=full, lora_rank=8."),
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="A folder with a tokenizer, if the model's has none.")
]
Cap = Annotated[
    str | None,
    typer.Option("--cap", help="A hard limit on this process's private memory (RLIMIT_DATA), e.g. 2GiB."),
]
ResumeAnyway = Annotated[
    bool, typer.Option("--resume-anyway", help="Go on though the model, the data or the options have changed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def tune(
    model: Source,
    data: Data,
    output: Output,
    budget: Budget = None,
    tensor_budget: TensorBudget = None,
    method: Annotated[
        str | None, typer.Option("--method", help="full, lora or qlora; the first that fits if left out.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A folder with an adapter of peft's to go on from.")
    ] = None,
    batch: Batch = 8,
    seq_len: SeqLen = None,
    steps: Steps = None,
    epochs: Epochs = 1.0,
    lr: Rate = None,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.03,
    clip: Clip = 1.0,
    holdout: Holdout = 0.0,
    evaluate_every: EvaluateEvery = None,
    save_every: SaveEvery = None,
    seed: Seed = 0,
    settings: With = None,
    tokenizer: TokenizerOption = None,
    cap: Cap = None,
    resume_anyway: ResumeAnyway = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> int:
    """Tune MODEL on data within a budget. Ctrl-C saves and stops; the same command goes on from there."""
    if method is not None and method not in METHODS:
        raise UsageError(f"--method {method!r} is not one of {', '.join(METHODS)}.")
    if adapter is not None and method not in ("lora", "qlora"):
        raise UsageError("--adapter goes on from a low-rank adapter; say --method lora or qlora besides.")
    return _run(
        "tune", model, data, output, budget, tensor_budget, {"method": method}, adapter, settings or [],
        _settings(batch, steps, epochs, lr, schedule, warmup, clip, holdout, evaluate_every, save_every, seed),
        seq_len, tokenizer, cap, resume_anyway, trust_remote_code, json,
    )  # fmt: skip


def train(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A config.json, or a folder or hub id with one: new weights are made."),
    ],
    data: Data,
    output: Output,
    budget: Budget = None,
    tensor_budget: TensorBudget = None,
    batch: Batch = 8,
    seq_len: SeqLen = None,
    steps: Steps = None,
    epochs: Epochs = 1.0,
    lr: Rate = None,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.03,
    clip: Clip = 1.0,
    holdout: Holdout = 0.0,
    evaluate_every: EvaluateEvery = None,
    save_every: SaveEvery = None,
    seed: Seed = 0,
    settings: With = None,
    tokenizer: TokenizerOption = None,
    cap: Cap = None,
    resume_anyway: ResumeAnyway = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> int:
    """Train the architecture of CONFIG from new weights within a budget. Ctrl-C saves; the same command goes on."""
    return _run(
        "train", config, data, output, budget, tensor_budget, {}, None, settings or [],
        _settings(batch, steps, epochs, lr, schedule, warmup, clip, holdout, evaluate_every, save_every, seed),
        seq_len, tokenizer, cap, resume_anyway, trust_remote_code, json,
    )  # fmt: skip


def _settings(
    batch: int,
    steps: int | None,
    epochs: float,
    lr: float | None,
    schedule: str,
    warmup: float,
    clip: float,
    holdout: float,
    evaluate_every: int | None,
    save_every: int | None,
    seed: int,
) -> Any:
    from haversack.describe.training_settings import TrainingSettings

    return TrainingSettings(
        rows_per_step=batch,
        steps=steps,
        epochs=epochs,
        learning_rate=lr,
        schedule=schedule,
        warmup=warmup,
        clip_norm=clip,
        seed=seed,
        holdout=holdout,
        evaluate_every=evaluate_every,
        save_every=save_every,
    )


def _run(
    task: str,
    source: str,
    data: list[Path],
    output: Path,
    budget: str | None,
    tensor_budget: str | None,
    chosen: dict[str, str | None],
    adapter: Path | None,
    pairs: list[str],
    settings: Any,
    seq_len: int | None,
    tokenizer: Path | None,
    cap: str | None,
    resume_anyway: bool,
    trust_remote_code: bool,
    json: bool,
) -> int:
    import dataclasses

    from haversack.formats.output import check_output
    from haversack.formats.packed_folder import is_packed
    from haversack.samples.read import check_file

    if budget is not None and tensor_budget is not None:
        raise UsageError("--budget and --tensor-budget were both given; a run has one budget.")
    text = budget if budget is not None else tensor_budget
    if text is None:
        raise UsageError("no budget was given; say --budget 8GiB, or --budget 60% of available memory.")
    if seq_len is not None and seq_len < 2:
        raise UsageError(f"--seq-len is {seq_len}, but a row has at least 2 tokens: one to read and one to predict.")
    machine = machine_named(None)
    budget_bytes = parse_budget(text, machine.tiers()["device"])
    workload, pinned = _workload(
        task, {k: v for k, v in chosen.items() if v is not None}, pairs, settings.rows_per_step
    )
    check_output(output)
    for file in data:
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
        described, home = _described(task, source, trust_remote_code)
    if seq_len is not None:
        check_positions(dataclasses.replace(workload, seq_len=seq_len), described.max_positions, described.name)
    request = TrainingRequest(
        model=described,
        tokenizer_source=tokenizer or home,
        files=tuple(data),
        output=output,
        machine=machine,
        workload=workload,
        pinned=pinned,
        settings=settings,
        budget_bytes=budget_bytes,
        budget_kind="tensor" if tensor_budget is not None else "process",
        seq_len=seq_len,
        adapter=adapter,
        base_bytes=base_bytes,
        cap_bytes=None if cap is None else parse_bytes(cap),
        resume_anyway=resume_anyway,
    )
    page = _LivePage(RunFolder(output).curves)

    def planned(plan: TrainingPlan) -> None:
        page.open(plan)
        if not json:
            _print_plan(plan, output)

    with console.progress_bar(quiet=json) as progress:
        result = run_training(
            request, Watchers(progress=progress, planned=planned, rows=page.update, stepped=_Progress(quiet=json))
        )
    page.close()
    if json:
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
        raise UsageError("--with spreads the run over ranks, which runs can't yet; only `haversack plan` knows ranks.")
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

    from haversack.describe.checkpoint import holds_weights
    from haversack.describe.model import describe_model
    from haversack.errors import CheckpointError

    described = describe_model(source, trust_remote_code=trust_remote_code)
    file = Path(source)
    home = described.folder or (file.parent if file.is_file() else file)
    if task == "train":
        return dataclasses.replace(described, folder=None), home
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
    workload, settings = plan.workload, plan.settings
    method = f"{workload['method']}, " if "method" in workload else ""
    return (
        f"{method}{settings['rows_per_step']} x {workload['seq_len']} tokens per step ({workload['batch_size']} at once), "
        f"{workload['optimizer']}, precision {workload['precision']}, recompute {workload['recompute']}, {settings['steps']} steps, "
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


def _print_result(result: TrainingResult) -> None:
    facts = result.to_dict()
    rows = [
        [what, format_bytes(pair["predicted"]), format_bytes(pair["measured"])]
        for what, pair in [("process peak (private)", facts["peak_bytes"]), *facts["resident_bytes"].items()]
    ]
    if facts["seconds_per_step"]["measured"] is not None:
        pair = facts["seconds_per_step"]
        rows.append(["seconds per step", format_seconds(pair["predicted"]), format_seconds(pair["measured"])])
    typer.echo("")
    console.table(("what", "predicted", "measured"), rows, right=(1, 2))
    figures = ", ".join(f"{'held-back loss' if k == 'eval_loss' else k} {v:.4f}" for k, v in result.final.items())
    typer.echo("")
    console.paragraph(f"{result.steps} steps; {figures}.")
    if result.num_bad_rows:
        console.notes([f"{result.num_bad_rows} bad rows were left out; {result.folder / 'bad-rows.jsonl'} names each"])
    console.notes(result.notes)
    typer.echo(f"Written to {result.exported}.")
