"""Streamed calibration: second-order statistics of every weight site, with one layer in memory at a time.

A change `dW` of one matrix changes the model's predictions by about

    0.5 * sum_o row_importance[o] * (dW H dW^T)[o, o]      nats per token (KL divergence),

with `H` the mean of `x x^T` over tokens at the matrix's input and `row_importance` the mean of `g^2`, where `g` is the
gradient of the log-likelihood of labels sampled from the model's own predictions with respect to the matrix's output:
the Fisher information's diagonal over outputs, with inputs and gradients taken as independent (Martens and Grosse 2015,
arXiv 1503.05671, section 3), times one factor per site for tokens of a sequence that act together (`GradientMoment`). A
row of an embedding is changed only where its token occurs: there `H` is the mean of `g g^T` at the embedding's output
and `row_importance` the token's frequency.

The forward pass goes layer by layer over all tokens, accumulates `H` and leaves the layers' inputs of some sequences
on disk; the backward pass recomputes each layer for those with gradients. Every finished layer is a file: a killed
run goes on there.

Memory: one layer (or embedding, or head) in the compute dtype; at most `statistics_bytes` of second moments, or one
of them; activations of `batch_tokens` tokens through one layer with gradients; in the head `head_tokens` rows of
logits, about 5 times in float32. Disk: `4 in^2` bytes per distinct input, `2 * hidden_size * itemsize` per token and
`hidden_size * itemsize` per gradient token and layer while it runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from haversack.describe.model import Model
from haversack.engine.hidden_states import HiddenStates
from haversack.engine.layers import StreamedModel
from haversack.engine.moments import (
    batches,
    collect_moments,
    moment_rounds,
    outside_parameter,
    shared_products,
    trace_inputs,
    watched_parameters,
)
from haversack.engine.observe import GradientMoment, ProductKey, ProductObserver, SecondMoment, StopForwardError
from haversack.engine.site_statistics import (
    HEAD,
    LOOKUP,
    MomentWriter,
    Statistics,
    layer_file,
    save_tensors,
    text_of,
    write_text,
)
from haversack.errors import CheckpointError, UsageError

_VERSION = 1
"""Counts changes of what the files hold; part of the cache key."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done and the steps in all."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. `gradient_tokens` of all tokens get gradients; `seed` draws them and the sampled labels.

    `batch_tokens` go through a layer at once, `head_tokens` through the head. `compute_dtype` is a torch dtype's
    name, or None for the checkpoint's own. Experts that see fewer tokens than a quarter of their inputs use those of
    all experts.
    """

    gradient_tokens: int = 8192
    batch_tokens: int = 4096
    head_tokens: int = 512
    statistics_bytes: int = 4 * 2**30
    compute_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gradient_tokens", "batch_tokens", "head_tokens", "statistics_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"calibration: {name} is {getattr(self, name)}, but must be at least 1.")


def calibrate(
    source: str | Path | Model,
    token_ids: torch.Tensor,
    *,
    cache: str | Path,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of every weight site from `token_ids` `(sequences, tokens)`, kept in a folder under `cache`.

    The folder's name hashes checkpoint, tokens and settings: the same call again reads it, and a killed one goes on.
    Raises UsageError (no tokens, ids outside the vocabulary) and CheckpointError (no weights, values not finite).
    """
    settings = settings or CalibrationSettings()
    dtype = None if settings.compute_dtype is None else getattr(torch, settings.compute_dtype)
    model = StreamedModel.open(source, dtype)
    check_token_ids(token_ids, model.described)
    folder = Path(cache) / _cache_key(model, token_ids, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "complete.json").exists():
        _Calibration(model, token_ids, folder, settings, progress or (lambda what, done, total: None)).run()
    return Statistics(folder, model.described)


class _Calibration:
    """One run: forward over layers, head, backward over layers, embedding. Each step ends with its file's rename."""

    def __init__(
        self, model: StreamedModel, token_ids: torch.Tensor, folder: Path, settings: CalibrationSettings, tell: Progress
    ):
        order = torch.randperm(token_ids.shape[0], generator=torch.Generator().manual_seed(settings.seed))
        self.token_ids = token_ids[order]
        self.num_sequences, self.num_tokens = token_ids.shape
        self.num_gradient_sequences = min(self.num_sequences, -(-settings.gradient_tokens // self.num_tokens))
        self.batch = max(1, settings.batch_tokens // self.num_tokens)
        self.model, self.settings, self.tell = model, settings, tell
        self.folder = folder
        self.states = HiddenStates(
            folder / "scratch", self.num_tokens, model.described.hidden_size, model.compute_dtype
        )
        self.num_steps = 2 * model.num_layers + 3
        self.step = 0

    def run(self) -> None:
        model, states = self.model, self.states
        self._step("embedding the text", self._start_hidden, not states.finished())
        for layer in range(model.num_layers):
            self._step(f"forward, layer {layer}", partial(self._forward_layer, layer), f"hidden-{layer}" in states)
        self._step("head", self._head, f"hidden-{model.num_layers}" in states)
        for layer in reversed(range(model.num_layers)):
            self._step(
                f"backward, layer {layer}", partial(self._backward_layer, layer), f"gradient-{layer + 1}" in states
            )
        self._step("embedding", self._lookup, "gradient-0" in states)
        facts = {"tokens": self.token_ids.numel(), "gradient_tokens": self.num_gradient_sequences * self.num_tokens}
        write_text(self.folder / "complete.json", json.dumps({**facts, **asdict(self.settings)}))
        shutil.rmtree(self.folder / "scratch")

    def _step(self, what: str, do: Callable[[], None], needed: bool) -> None:
        if needed:
            self.tell(what, self.step, self.num_steps)
            do()
        self.step += 1
        self.tell(what, self.step, self.num_steps)

    # Forward

    @torch.no_grad()
    def _start_hidden(self) -> None:
        with self.model.before_layers() as embed:
            hidden = self.states.create("hidden-0", self.num_sequences)
            for part in self._batches(self.num_sequences):
                hidden[part] = embed(self.token_ids[part])
        self.states.finish("hidden-0")

    @torch.no_grad()
    def _forward_layer(self, layer: int) -> None:
        hidden = self.states.open(f"hidden-{layer}", self.num_sequences)
        after = self.states.create(f"hidden-{layer + 1}", self.num_sequences)
        writer = MomentWriter(self.folder, layer_file(layer))
        with self.model.layer(layer):
            watched = watched_parameters(self.model, layer)
            sharing = trace_inputs(self.model, layer, watched, hidden[:1])
            for number, keys in enumerate(moment_rounds(sharing, watched, self.settings.statistics_bytes)):
                inputs = ((part, hidden[part]) for part in self._batches(self.num_sequences))
                moments = collect_moments(self.model, layer, watched, keys, inputs, None if number else after)
                writer.add(moments)
                del moments
            writer.finish(shared_products(sharing, watched))
        self._check_finite(after, f"layer {layer}")
        self.states.finish(f"hidden-{layer + 1}")
        self.states.cut(f"hidden-{layer}", f"inputs-{layer}", self.num_gradient_sequences)

    # Head

    def _head(self) -> None:
        """The head's moments over all tokens, its row importance and the gradient of sampled labels over some."""
        num_layers = self.model.num_layers
        hidden = self.states.open(f"hidden-{num_layers}", self.num_sequences)
        gradient = self.states.create(f"gradient-{num_layers}", self.num_gradient_sequences)
        with self.model.after_layers() as logits_of:
            name, matrix = outside_parameter(self.model, "head")
            moment, importance = SecondMoment(matrix.shape[1]), torch.zeros(matrix.shape[0])
            outputs: list[torch.Tensor] = []

            def stop_at_input(key: ProductKey, x: torch.Tensor) -> None:
                moment.add(x)
                raise StopForwardError

            for sequence in range(self.num_sequences):
                seeded = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + sequence)
                draws = torch.rand(self.num_tokens, generator=seeded)
                for start in range(0, self.num_tokens, self.settings.head_tokens):
                    part = slice(start, start + self.settings.head_tokens)
                    if sequence >= self.num_gradient_sequences:
                        try:
                            with torch.no_grad(), ProductObserver({name: matrix}, on_input=stop_at_input):
                                logits_of(hidden[sequence : sequence + 1, part])
                        except StopForwardError:
                            continue
                    x = hidden[sequence : sequence + 1, part].clone().requires_grad_()
                    outputs.clear()
                    with ProductObserver(
                        {name: matrix},
                        on_input=lambda key, x: moment.add(x),
                        on_output=lambda key, x, y: outputs.append(y),
                    ):
                        logits = logits_of(x)
                    importance += self._sample_backward(logits, outputs[-1], draws[part])
                    assert x.grad is not None
                    gradient[sequence : sequence + 1, part] = x.grad
                    del logits, x
        self._check_finite(gradient, "the head")
        writer = MomentWriter(self.folder, HEAD)
        writer.add({ProductKey(name): moment})
        writer.finish([[ProductKey(name)]])
        tokens = self.num_gradient_sequences * self.num_tokens
        save_tensors(self.folder / f"{HEAD}.importance.safetensors", {text_of(ProductKey(name)): importance / tokens})
        self.states.finish(f"gradient-{num_layers}")
        self.states.remove(f"hidden-{num_layers}")

    def _sample_backward(self, logits: torch.Tensor, product: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Backward of the sampled labels' log-likelihood; returns the expected squared gradient at the head's product.

        The expectation over labels is exact there: `p (1 - p)` times the squared derivative of what follows the product
        (softcap, scaling), which is element-wise. `(vocab,)`, summed over tokens.
        """
        slope = torch.autograd.grad(logits.sum(), product, retain_graph=True)[0]
        log_p = logits.float().log_softmax(-1)
        p = log_p.detach().exp()
        cumulated = p.cumsum(-1)
        labels = torch.searchsorted(cumulated, (draws[None, :, None] * cumulated[..., -1:]).contiguous())
        labels.clamp_(max=p.shape[-1] - 1)
        log_p.gather(-1, labels).sum().backward()
        return (p.mul_(1 - p) * slope.float().square()).sum((0, 1))

    # Backward

    def _backward_layer(self, layer: int) -> None:
        count = self.num_gradient_sequences
        inputs = self.states.open(f"inputs-{layer}", count)
        above = self.states.open(f"gradient-{layer + 1}", count)
        below = self.states.create(f"gradient-{layer}", count)
        gradients: dict[ProductKey, GradientMoment] = {}

        def watch(key: ProductKey, x: torch.Tensor, y: torch.Tensor) -> None:
            moment = gradients.setdefault(key, GradientMoment(y.shape[-1]))
            if y.requires_grad:
                y.register_hook(lambda gradient: moment.add(x, gradient.reshape(x.shape[0], -1), self.num_tokens))

        with self.model.layer(layer):
            watched = watched_parameters(self.model, layer)
            for part in self._batches(count):
                x = inputs[part].clone().requires_grad_()
                with ProductObserver(watched, on_output=watch):
                    output = self.model.run_layer(layer, x)
                output.backward(above[part])
                assert x.grad is not None
                below[part] = x.grad
                del output, x
        self._check_finite(below, f"layer {layer}'s gradient")
        tokens = count * self.num_tokens
        file = self.folder / f"{layer_file(layer)}.importance.safetensors"
        save_tensors(file, {text_of(key): moment.means(tokens) for key, moment in gradients.items()})
        self.states.finish(f"gradient-{layer}")
        self.states.remove(f"gradient-{layer + 1}")
        self.states.remove(f"inputs-{layer}")

    def _lookup(self) -> None:
        """Embeddings: the mean of `g g^T` where rows come out, and how often each row is looked up."""
        gradient = self.states.open("gradient-0", self.num_gradient_sequences)
        moments: dict[ProductKey, SecondMoment] = {}
        counts: dict[ProductKey, torch.Tensor] = {}
        looked_up: list[tuple[ProductKey, torch.Tensor]] = []

        def follow(key: ProductKey, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            rows = rows.detach().requires_grad_()
            looked_up.append((key, rows))
            counts[key] = counts.get(key, torch.zeros(())) + torch.bincount(
                index.flatten(), minlength=watched[key.parameter].shape[0]
            )
            return rows

        with self.model.before_layers() as embed:
            watched = {
                f"{site.module}.{site.parameter}": self.model.module.get_parameter(f"{site.module}.{site.parameter}")
                for site in self.model.outside_sites()
                if site.role in ("embedding", "position")
            }
            for part in self._batches(self.num_gradient_sequences):
                looked_up.clear()
                with ProductObserver(watched, on_lookup=follow):
                    hidden = embed(self.token_ids[part])
                hidden.backward(gradient[part])
                for key, rows in looked_up:
                    if rows.grad is None:
                        continue
                    moment = moments.setdefault(key, SecondMoment(rows.shape[-1]))
                    moment.add(rows.grad.reshape(-1, rows.shape[-1]))
                    # Rows that one lookup gives to many sequences sum their gradients; tokens are what is averaged
                    # over.
                    moment.num_tokens += hidden.shape[0] * hidden.shape[1] - rows.numel() // rows.shape[-1]
            for key in counts:
                if watched[key.parameter] is watched.get(self.model.input_name):
                    counts[key] = torch.bincount(self.token_ids.flatten(), minlength=len(counts[key]))
        writer = MomentWriter(self.folder, LOOKUP)
        writer.add(moments)
        writer.finish([[key] for key in moments])
        frequencies = {text_of(key): count.float() / count.sum() for key, count in counts.items() if key in moments}
        save_tensors(self.folder / f"{LOOKUP}.importance.safetensors", frequencies)

    def _batches(self, num_sequences: int) -> list[slice]:
        return batches(num_sequences, self.batch)

    def _check_finite(self, values: torch.Tensor, where: str) -> None:
        for part in self._batches(values.shape[0]):
            if not bool(torch.isfinite(values[part]).all()):
                raise CheckpointError(
                    f"{where} of {self.model.described.name!r} gives values that are not finite on the calibration "
                    "text; its weights are damaged, or its dtype overflows (try compute_dtype float32)."
                )


def check_token_ids(token_ids: torch.Tensor, described: Model) -> None:
    """Raise a UsageError unless these are `(sequences, tokens)` of this model's vocabulary and positions."""
    if token_ids.ndim != 2 or token_ids.numel() == 0 or token_ids.shape[1] < 2:
        raise UsageError(
            f"calibration tokens have shape {list(token_ids.shape)}, but must be (sequences, tokens), with at least 2 "
            "tokens."
        )
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= described.vocab_size:
        raise UsageError(
            f"calibration tokens run from {low} to {high}, but {described.name!r} has {described.vocab_size} tokens; "
            "the text was made by another model's tokenizer."
        )
    if described.max_positions is not None and token_ids.shape[1] > described.max_positions:
        raise UsageError(
            f"calibration sequences have {token_ids.shape[1]} tokens, but {described.name!r} knows "
            f"{described.max_positions} positions; shorten them."
        )


def _cache_key(model: StreamedModel, token_ids: torch.Tensor, settings: CalibrationSettings) -> str:
    facts = json.dumps(
        {
            "version": _VERSION,
            "model": model.described.fingerprint,
            "checkpoint": model.checkpoint.fingerprint(),
            "shape": list(token_ids.shape),
            "settings": asdict(settings),
        },
        sort_keys=True,
    )
    digest = hashlib.sha256(facts.encode())
    digest.update(token_ids.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
