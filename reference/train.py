"""Train a reference model; stop at any time, run again to go on, `--finish` to decay and export.

    python -m reference.train a [--threads 1] [--tokens N | --minutes M] [--from-shipped]
    python -m reference.train a --finish [--tokens N | --minutes M]

Warm-up, a stable rate for as long as there is time, then a decay (Hu et al., 2024, arXiv 2404.06395, section 4). The stable checkpoint, with the optimizers' state,
stays in the scratch folder: a later run extends it, and `--finish` decays from it without touching it. Where that checkpoint is lost, `--from-shipped`
goes on from the shipped weights, with fresh optimizer state and a new warm-up. Matrices are trained by Muon (Jordan et al., 2024;
PyTorch's own), embeddings, head and norms by AdamW. The curriculum (reference/curriculum.py) moves on when recall and copying are measured to work.
"""

import argparse
import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer

from haversack.probes import SEEN, encode_probe, make_copy, make_recall, score_forward, token_counter
from reference.curriculum import PHASES, Rows
from reference.export import export
from reference.model import MODELS, ModelConfig, ReferenceModel
from reference.paths import SHIPPED, scratch

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # small: a CPU's few million tokens are better spent on more steps
LEARNING_RATE = {"matrix": 4e-3, "embedding": 1e-2, "other": 3e-3}  # embeddings start large, so they step far
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.02
GATE_ACCURACY = 0.6  # the phase change has come; what is left to learn is learned at the next length too
SAVE_SECONDS = 120
LOG_STEPS = 20
EVAL_STEPS = 50
FINAL_EVAL_STEPS = 250  # in the last phase no gate waits for a measurement, which takes as long as five steps
DEFAULT_MINUTES = {"stable": 120.0, "finish": 20.0}


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    step: int = 0
    tokens: int = 0
    phase: int = 0
    phase_tokens: int = 0
    seconds: float = 0.0


class Run:
    """A model, its optimizers and its place in the curriculum."""

    def __init__(self, name: str, config: ModelConfig, rows: Rows, folder: Path, device: str, compiled: bool) -> None:
        self.name = name
        self.device = device
        self.folder = folder
        self.rows = rows
        self.tokenizer = rows.tokenizer
        self.progress = Progress()
        self.warm_from = 0  # the step at which the optimizers' state began
        self.model = ReferenceModel(config).to(device)
        parameters = dict(self.model.named_parameters())  # a tied head is named once
        matrices = [p for k, p in parameters.items() if p.ndim == 2 and "embed" not in k and "lm_head" not in k]
        embedding = parameters["model.embed_tokens.weight"]
        others = [p for k, p in parameters.items() if p.ndim == 1 or "lm_head" in k]
        groups = [
            {"params": [embedding], "base_lr": LEARNING_RATE["embedding"]},
            {"params": others, "base_lr": LEARNING_RATE["other"]},
        ]
        self.optimizers = {
            "muon": torch.optim.Muon(
                [{"params": matrices, "base_lr": LEARNING_RATE["matrix"]}],
                weight_decay=WEIGHT_DECAY,
                adjust_lr_fn="match_rms_adamw",
            ),
            "adamw": torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
        }
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens[:, :-1]).flatten(0, 1).float()
        losses = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    def train_step(self, rate: float) -> float:
        """One batch of the current phase at `rate` times the base learning rates. Returns the weighted loss in nats."""
        phase = PHASES[self.progress.phase]
        num_rows = BATCH_TOKENS[self.device] // phase.seq_len
        tokens, weights = self.rows.batch(self.progress.step, phase, num_rows)
        tokens, weights = torch.from_numpy(tokens).to(self.device), torch.from_numpy(weights).to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_lr"]
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += num_rows * phase.seq_len
        self.progress.phase_tokens += num_rows * phase.seq_len
        return loss.item()

    def save(self, path: Path) -> None:
        """Weights, optimizer state and progress in one safetensors file, replaced atomically."""
        tensors = {f"model.{k}": p.detach() for k, p in self.model.named_parameters()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, partial, {"progress": json.dumps(asdict(self.progress))}
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Take up a saved run. Raises RuntimeError (from PyTorch) where it is of other widths."""
        with safe_open(path, "pt") as file:
            self.progress = Progress(**json.loads(file.metadata()["progress"]))
        tensors = load_file(path)
        weights = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                parameter.copy_(weights[key])
        for name, optimizer in self.optimizers.items():
            whole = optimizer.state_dict()
            for key, tensor in tensors.items():
                owner, _, rest = key.partition(".")
                if owner == name:
                    index, _, field = rest.partition(".")
                    whole["state"].setdefault(int(index), {})[field] = tensor
            optimizer.load_state_dict(whole)

    def load_shipped(self, folder: Path, phase: int | None) -> None:
        """Take up exported weights where their card's training ended, or at a given phase; optimizer state and the decayed rate start anew."""
        training = json.loads((folder / "results.json").read_text())["training"]
        fields = Progress.__dataclass_fields__
        self.progress = Progress(**{key: value for key, value in training["curve"][-1].items() if key in fields})
        self.progress.tokens, self.progress.seconds = training["tokens"], training["seconds"]
        self.warm_from = self.progress.step
        if phase is not None:
            self.progress.phase, self.progress.phase_tokens = phase, 0
        weights = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                parameter.copy_(weights[key])
        curve = self.folder / "curve.jsonl"
        if not curve.exists():
            curve.write_text("".join(json.dumps(entry) + "\n" for entry in training["curve"]))

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits for the probes' scorer; the full causal mask only."""
        assert mask is None
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(ids.to(self.device)).float().cpu()

    def recall(self, distance_tokens: int, num_probes: int = 16) -> dict[str, float]:
        """Exact match of words, digits and copies at a distance, seen templates, fixed probes."""
        count = token_counter(self.tokenizer)
        scores = {}
        for kind in ("word", "digits", "copy"):
            rng = random.Random(f"gate/{distance_tokens}/{kind}")
            probes = []
            for index in range(num_probes):
                if kind == "copy":
                    probe = make_copy(rng, count, num_tokens=min(64, distance_tokens // 2))
                else:
                    template = list(SEEN)[index % len(SEEN)]
                    probe = make_recall(
                        rng, count, distance_tokens=distance_tokens, template=template, kind=kind, preamble_tokens=0
                    )
                probes.append(encode_probe(probe, self.tokenizer, [self.tokenizer.bos_token_id]))
            scores[kind] = sum(score_forward(self.forward, probes)) / num_probes
        return scores

    def bits_per_byte(self, part: str, num_windows: int = 8) -> float:
        """Over the first windows of 1,024 tokens of a shipped text: a point of the curve; the card measures all of it."""
        text = (SHIPPED / "text" / f"{part}.txt").read_text()[: num_windows * 5000]
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False)[: num_windows * 1024]).view(
            num_windows, 1024
        )
        logits = torch.cat([self.forward(ids[i : i + 4], None) for i in range(0, num_windows, 4)])
        nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        num_bytes = sum(len(self.tokenizer.decode(row)) for row in ids[:, 1:])
        return nats / num_bytes / float(np.log(2))


def train(run: Run, *, finish: bool, max_tokens: float, max_seconds: float) -> None:
    """Steps until the tokens or the seconds are spent, or a signal asks to stop; saves the stable checkpoint, or exports the decayed model."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    begun = saved = time.monotonic()
    first, before = run.progress.tokens, run.progress.seconds
    losses: list[float] = []
    while not stop:
        spent = max((time.monotonic() - begun) / max_seconds, (run.progress.tokens - first) / max_tokens)
        if spent >= 1:
            break
        # Decay by one minus the square root (Haegele et al., 2024, arXiv 2405.18392), which keeps less time at low rates than a straight line.
        rate = 1 - spent**0.5 if finish else min(1.0, (run.progress.step + 1 - run.warm_from) / WARMUP_STEPS)
        losses.append(run.train_step(rate))
        run.progress.seconds = before + time.monotonic() - begun
        if run.progress.step % LOG_STEPS == 0:
            elapsed = time.monotonic() - begun
            _log_step(run, losses, (run.progress.tokens - first) / elapsed, elapsed * (1 - spent) / spent)
            losses.clear()
        if run.progress.step % (EVAL_STEPS if PHASES[run.progress.phase].gate else FINAL_EVAL_STEPS) == 0:
            _evaluate(run, finish)
        if not finish and time.monotonic() - saved > SAVE_SECONDS:
            run.save(run.folder / "stable.safetensors")
            saved = time.monotonic()
    if finish and not stop:
        _evaluate(run, finish)
        run.save(run.folder / "final.safetensors")
        export(
            run.model,
            SHIPPED / f"reference-{run.name}" if run.name in "ab" else run.folder / f"reference-{run.name}",
            run.tokenizer,
        )
    elif not finish:
        run.save(run.folder / "stable.safetensors")


def _log_step(run: Run, losses: list[float], tokens_per_second: float, left_seconds: float) -> None:
    progress, phase = run.progress, PHASES[run.progress.phase]
    print(f"{run.name} step {progress.step} tokens {progress.tokens / 1e6:.2f}M phase {progress.phase} (T={phase.seq_len}) "
          f"loss {sum(losses) / len(losses):.3f} {tokens_per_second:.0f} tokens/s left {left_seconds / 60:.0f} min", flush=True)  # fmt: skip


def _evaluate(run: Run, finish: bool) -> None:
    """Measure, append to the run's curve, and move to the next phase where the gate is met."""
    progress, phase = run.progress, PHASES[run.progress.phase]
    scores = run.recall(phase.gate_tokens)
    curve = {part: round(run.bits_per_byte(part), 4) for part in ("calibration", "foreign-prose", "foreign-code")}
    entry = asdict(progress) | {"seq_len": phase.seq_len, "finish": finish, "recall": scores, "bits_per_byte": curve}
    with (run.folder / "curve.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"{run.name} recall at {phase.gate_tokens}: {scores} bits per byte: {curve}", flush=True)
    passed = phase.gate is not None and scores[phase.gate] >= GATE_ACCURACY
    if passed or (phase.max_tokens is not None and progress.phase_tokens >= phase.max_tokens):
        progress.phase += 1
        progress.phase_tokens = 0
        print(f"{run.name} phase {progress.phase}: {PHASES[progress.phase]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--finish", action="store_true", help="decay from the stable checkpoint and export")
    parser.add_argument("--tokens", type=float, default=float("inf"), help="stop after this many more tokens")
    parser.add_argument("--minutes", type=float, help="stop after this long (default 120, with --finish 20)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--phase", type=int, choices=range(len(PHASES)), help="with --from-shipped: the phase to take up"
    )
    parser.add_argument(
        "--from-shipped", action="store_true", help="where there is no checkpoint, go on from the shipped weights"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MODELS[arguments.name]
    text = {kind: np.load(scratch() / f"train-{kind}.npy", mmap_mode="r") for kind in ("prose", "code")}
    rows = Rows(AutoTokenizer.from_pretrained(SHIPPED / "reference-a"), text, config.seed)
    compiled = device == "cuda" or shutil.which("g++") is not None  # a third faster on a CPU, where a compiler is
    run = Run(arguments.name, config, rows, scratch() / arguments.name, device, compiled)
    run.folder.mkdir(exist_ok=True)
    stable = run.folder / "stable.safetensors"
    if stable.exists():
        run.load(stable)
    elif arguments.from_shipped:
        run.load_shipped(SHIPPED / f"reference-{arguments.name}", arguments.phase)
    minutes = arguments.minutes or DEFAULT_MINUTES["finish" if arguments.finish else "stable"]
    train(run, finish=arguments.finish, max_tokens=arguments.tokens, max_seconds=60 * minutes)


if __name__ == "__main__":
    main()
