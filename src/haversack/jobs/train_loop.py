"""The training loop: draw rows, add up gradients over micro-batches, clip, update, evaluate, save; until done or told to stop.

Everything that decides bytes was decided before (`plan/fit_training.py`); everything that one step does is in
`engine/training_step.py`. A run is a function of its plan, its data and its step, so that one which goes on from a checkpoint gives the bits of one
that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from haversack.describe.training_settings import TrainingSettings
from haversack.engine.pairs import Pairs
from haversack.engine.schedules import learning_rate_factor
from haversack.engine.training_state import state_of
from haversack.engine.training_step import TrainingStep
from haversack.errors import DoesNotFitError, HaversackError
from haversack.jobs import memory
from haversack.jobs.checkpoint_writer import CheckpointWriter
from haversack.jobs.ranks import ALONE, Ranks
from haversack.jobs.training_log import TrainingLog
from haversack.samples.packing import PackedRows, RowArrays, rows_of_step

LAST_SAVE_TRIES, LAST_SAVE_PAUSE_SECONDS = 5, 2.0


class LossError(HaversackError, ArithmeticError):
    """The loss or its gradients are not finite: training on would destroy the weights."""


@dataclass
class TrainingLoop:
    """A run: a step made ready, rows to train on and rows held back, and where its checkpoints and figures go.

    `reference` are all answers' log-likelihoods before tuning, where answers are compared with them. `progress` is told (steps done, steps in all, loss) after each step; `stopped` says whether to save and stop.
    Of several `ranks` each takes its part of a step's rows; losses and norms are all ranks' together.
    """

    step: TrainingStep
    rows: PackedRows
    train_rows: Sequence[int]
    held_rows: Sequence[int]
    settings: TrainingSettings
    writer: CheckpointWriter
    log: TrainingLog
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None
    stopped: Callable[[], bool] = lambda: False
    reference: torch.Tensor | None = None
    ranks: Ranks = ALONE
    micro_batch: int = 1
    seconds_per_step: list[float] = field(default_factory=list)

    def run(self, first_step: int) -> int:
        """Train from `first_step` (the number of steps that are done) on; the number done in the end. Raises LossError."""
        self.micro_batch = self.step.workload.batch_size
        self._preferred: dict[str, float] = {}
        self._base_rates = [group["lr"] for group in self._groups()]
        done, save_after = first_step, first_step + self.settings.save_every_steps
        while done < self.settings.num_steps and not self.ranks.any(self.stopped()):
            started = time.perf_counter()
            numbers = self._rows_of(done)
            self._set_rates(done)
            problem = self.writer.wait() if self.step.in_backward else None  # weights change during the backward pass
            loss = self._gradients(done, numbers)
            problem = problem or self.writer.wait()  # the weights may not change while they are written
            if problem is not None:
                self.log.event(done, f"a checkpoint could not be written, training goes on: {problem}")
                save_after = done + min(2**self.writer.failures, self.settings.save_every_steps)
            norm = self._clip(done, numbers)
            self.step.update()
            done += 1
            self.seconds_per_step.append(time.perf_counter() - started)
            self.log.step(done, loss=loss, **self._preferred, grad_norm=norm, learning_rate=self._groups()[0]["lr"],
                          seconds=self.seconds_per_step[-1], private_bytes=memory.private_bytes())  # fmt: skip
            if self.held_rows and done % self.settings.evaluate_every_steps == 0:
                self.log.step(done, **self.evaluate())
            if done >= save_after and done < self.settings.num_steps:
                self.writer.begin(done, state_of(self.step))
                save_after = done + self.settings.save_every_steps
            self.progress(done, self.settings.num_steps, loss)
        self._save_last(done)
        return done

    def evaluate(self) -> dict[str, float]:
        """`eval_loss` of the rows held back, in nats per trained token; of pairs their mean loss, and `eval_preferred`. In
        micro-batches as they are trained in, without what a backward pass needs, so that its peak lies below a step's."""
        self.step.model.eval()
        nats = preferred = count = 0.0
        together = self.micro_batch * self.ranks.size
        with torch.no_grad():
            for start in range(0, len(self.held_rows), together):
                numbers = self.held_rows[start : start + together][self.ranks.rank :: self.ranks.size]
                batch = self.rows.rows(numbers or self.held_rows[:1])  # a rank without a row computes with the others
                weight = batch.num_averaged if numbers else 0
                loss = float(self.step.loss(**self._inputs(batch)))
                nats += loss * weight if weight else 0.0
                if self.step.preferred is not None:
                    preferred += float(self.step.preferred) * weight
                count += weight
        nats, preferred, count = self.ranks.sums([nats, preferred, count])
        self.step.model.train()
        found = {"eval_loss": nats / max(1, count)}
        return found if self.step.preferred is None else {**found, "eval_preferred": preferred / max(1, count)}

    def _inputs(self, batch: RowArrays) -> dict[str, Any]:
        """Rows as a step takes them."""
        inputs: dict[str, Any] = {"ids": torch.from_numpy(batch.ids), "labels": torch.from_numpy(batch.labels)}
        if batch.positions is not None:
            inputs["positions"] = torch.from_numpy(batch.positions)
        if batch.sequences is not None and batch.samples is not None:
            reference = None if self.reference is None else self.reference[torch.from_numpy(batch.samples)]
            inputs["pairs"] = Pairs(torch.from_numpy(batch.sequences), batch.num_averaged, reference)
        return inputs

    def _rows_of(self, done: int) -> list[int]:
        chosen = rows_of_step(done, self.settings.rows_per_step, len(self.train_rows), self.settings.seed)
        return [self.train_rows[index] for index in chosen]

    def _gradients(self, done: int, numbers: Sequence[int]) -> float:
        """Gradients of a step's rows, and their loss: the mean over all trained tokens of the step, however it is cut."""
        while True:
            try:
                return self._accumulate(done, numbers)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error) or self.step.in_backward or self.ranks.are_several:
                    raise  # weights that are half updated can't go on, nor can one rank alone do otherwise
                self._degrade(done)

    def _accumulate(self, done: int, numbers: Sequence[int]) -> float:
        own = self.ranks.part(numbers)
        batches = [own[start : start + self.micro_batch] for start in range(0, len(own), self.micro_batch)]
        counts = [self.rows.rows(batch).num_averaged for batch in batches]
        (whole,) = self.ranks.sums([sum(counts)])
        total = preferred = 0.0
        for batch, count in zip(batches, counts, strict=True):
            if count == 0 and not self.ranks.are_several:
                continue
            share = count / whole if whole else 0.0
            inputs = self._inputs(self.rows.rows(batch))
            if count == 0:  # other ranks wait for this one's part of each weight
                inputs["labels"] = inputs["ids"]
            loss = float(self.step.micro_step(**inputs, share=share))
            if not math.isfinite(loss) and not self.ranks.are_several:
                self._refuse("loss", loss, done, batch)
            total += loss
            if self.step.preferred is not None:
                preferred += float(self.step.preferred) * share
        total, preferred = self.ranks.sums([total, preferred])
        if not math.isfinite(total):
            self._refuse("loss", total, done, numbers)
        self._preferred = {} if self.step.preferred is None else {"preferred": preferred}
        return total

    def _degrade(self, done: int) -> None:
        """Memory ran out under a cap: smaller micro-batches from here on. Raises DoesNotFitError at a single row."""
        self.step.optimizer.zero_grad()
        if self.micro_batch == 1:
            self.writer.wait()
            raise DoesNotFitError(
                f"memory ran out at step {done + 1} with micro-batches of one row; allow more, or make rows shorter with --seq-len."
            )
        before, self.micro_batch = self.micro_batch, max(1, self.micro_batch // 2)
        self.log.event(
            done,
            f"memory ran out: micro-batches of {self.micro_batch} rows instead of {before} from step {done + 1} on",
        )

    def _clip(self, done: int, numbers: Sequence[int]) -> float:
        norm = self.step.clip(self.settings.clip_norm)
        if not math.isfinite(norm):
            self._refuse("gradient norm", norm, done, numbers)
        return norm

    def _refuse(self, what: str, value: float, done: int, numbers: Sequence[int]) -> None:
        """Stop with the step, the rows, and the last checkpoint whose weights are finite."""
        self.writer.wait()
        origins = [name for number in numbers for name in self.rows.origins(number)]
        shown = ", ".join(origins[:4]) + (f" and {len(origins) - 4} more" if len(origins) > 4 else "")
        own = [self.step.own(parameter) for parameter in self.step.trained]
        finite = not self.ranks.any(not all(bool(torch.isfinite(parameter).all()) for parameter in own))
        last = self.writer.last_saved
        if last is None:
            good = "no checkpoint was written before"
        else:
            good = f"the last good checkpoint is of step {last}" if finite or last < done else (
                f"the weights were broken before step {done}, so the checkpoint of step {last} is suspect")  # fmt: skip
        self.log.event(done, f"the {what} was {value} at step {done + 1}, rows {shown}")
        raise LossError(
            f"the {what} is {value} at step {done + 1} of {self.settings.num_steps}, in a batch of {shown}; {good}. Lower --lr, or look at "
            "these rows."
        )

    def _set_rates(self, done: int) -> None:
        """Each group's own rate times the schedule's factor."""
        factor = learning_rate_factor(self.settings.schedule, done, self.settings.num_steps, self.settings.warmup_steps)
        for group, base in zip(self._groups(), self._base_rates, strict=True):
            group["lr"] = base * factor

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.step.optimizer.optimizers for group in optimizer.param_groups]

    def _save_last(self, done: int) -> None:
        """The state where a run ends or is told to stop; a full disk is given some seconds. Raises OutputError."""
        problem = self.writer.wait()
        for _ in range(LAST_SAVE_TRIES):  # every rank alike
            if self.writer.last_saved == done:
                return
            if problem is not None:
                time.sleep(LAST_SAVE_PAUSE_SECONDS)
            self.writer.begin(done, state_of(self.step))
            problem = self.writer.wait()
        if problem is not None:
            self.log.event(done, f"the last checkpoint could not be written: {problem}")
