"""What each ingredient of second-order feedback is worth: models A and B at 2, 3 and 4 bits, everything at one option.

Every matrix (embedding and head too) at symmetric groups of 128, statistics from the built-in calibration text, KL in nats per token
on foreign prose and code in equal shares. Differences are against `REFERENCE`, paired, with a 95% bootstrap interval over blocks of
64 tokens. `python -m benchmarks.feedback`
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.results_file import write_results
from haversack import data
from haversack.cache import cache_folder
from haversack.cost.calibrated import tokenize
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model, describe_model
from haversack.engine.calibrate import calibrate
from haversack.engine.layers import StreamedModel
from haversack.engine.measure import DamageMeter, paired_bootstrap
from haversack.engine.sequential import sequential_layers
from haversack.parts.weights.base import Rounding, WeightOption, WeightTask
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding

BITS = (2, 3, 4)
NUM_SEQUENCES, SEQ_LEN = 12, 512
SEEDS = 2


@dataclass(frozen=True)
class EvenSearch(IntegerGrid):
    """The clipping search without importance."""

    id: ClassVar[str] = "integer-even-search"

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().fit(weight)


@dataclass(frozen=True)
class Variant:
    """A rounding on a grid, and where its statistics come from: all layers as they are, or layers before it packed."""

    rounding: Rounding
    grid: type[IntegerGrid] = IntegerGrid
    search: bool = True
    sequential: bool | None = None  # None: no; else whether within layers too


REFERENCE = "feedback, activation order, weighted clipping"
VARIANTS: dict[str, Variant] = {
    "nearest, weighted clipping": Variant(NearestRounding()),
    REFERENCE: Variant(HessianFeedback(num_sweeps=0)),
    "no activation order": Variant(HessianFeedback(num_sweeps=0, activation_order=False)),
    "no activation order, groups fitted as met": Variant(
        HessianFeedback(num_sweeps=0, activation_order=False, static_groups=False)
    ),
    "no clipping (minimum to maximum)": Variant(HessianFeedback(num_sweeps=0), search=False),
    "clipping without weights": Variant(HessianFeedback(num_sweeps=0), EvenSearch),
    "damping 0.001": Variant(HessianFeedback(num_sweeps=0, damping=0.001)),
    "damping 0.05": Variant(HessianFeedback(num_sweeps=0, damping=0.05)),
    "1 sweep": Variant(HessianFeedback(num_sweeps=1)),
    "4 sweeps": Variant(HessianFeedback(num_sweeps=4)),
    "4 sweeps, damping 0.05": Variant(HessianFeedback(num_sweeps=4, damping=0.05)),
    "4 sweeps, no activation order": Variant(HessianFeedback(num_sweeps=4, activation_order=False)),
    "sequential by layers": Variant(HessianFeedback(num_sweeps=0), sequential=False),
    "sequential within layers": Variant(HessianFeedback(num_sweeps=0), sequential=True),
    "4 sweeps, sequential within layers": Variant(HessianFeedback(num_sweeps=4), sequential=True),
}

Encoded = dict[str, tuple[WeightOption, Mapping[str, torch.Tensor]]]


def main() -> None:
    figures: list[dict[str, Any]] = []
    for name in ("b", "a"):
        model = describe_model(data.reference_model(name))  # type: ignore[arg-type]
        study = _Study(model)
        for bits in BITS:
            figures += study.compare(bits)
            write_results("feedback", figures)


class _Study:
    def __init__(self, model: Model):
        self.model = model
        self.ids = tokenize(model, data.text("calibration"), num_tokens=32_768, seq_len=SEQ_LEN)
        self.statistics = calibrate(model, self.ids, cache=cache_folder("calibration"))
        assert model.folder is not None
        self.checkpoint = Checkpoint.open(model.folder)
        texts = [
            tokenize(model, data.text(text), num_tokens=NUM_SEQUENCES // 2 * SEQ_LEN, seq_len=SEQ_LEN)
            for text in ("foreign-prose", "foreign-code")
        ]
        self.meter = DamageMeter(model, torch.cat(texts), chunk_tokens=SEQ_LEN)

    def compare(self, bits: int) -> list[dict[str, Any]]:
        rows, kls = [], {}
        for label, variant in VARIANTS.items():
            option = WeightOption(grid=variant.grid(bits, 128, search=variant.search), rounding=variant.rounding)
            started = time.perf_counter()
            encoded = (
                self.encoded(option) if variant.sequential is None else self.sequential(option, variant.sequential)
            )
            seconds = time.perf_counter() - started
            kls[label] = self.meter.kl_per_token(encoded)
            half = NUM_SEQUENCES // 2
            row = {"model": self.model.name, "bits": bits, "variant": label, "kl": float(kls[label].mean())}
            row |= {"kl_prose": float(kls[label][:half].mean()), "kl_code": float(kls[label][half:].mean())}
            rows.append({**row, "encode_seconds": seconds})
        for row in rows:
            low, high = paired_bootstrap(kls[row["variant"]], kls[REFERENCE])
            row["difference_95"] = [low, high]
            print(json.dumps(row), flush=True)
        return rows

    def encoded(self, option: WeightOption, only_outside: bool = False) -> Encoded:
        out: Encoded = {}
        for site in self.model.weights:
            if only_outside and site.layer is not None:
                continue
            weight = read_site(self.checkpoint, site).float()
            hessian = self.statistics[site.id].hessian if site.id in self.statistics else None
            out[site.id] = (option, option.encode(WeightTask(weight, hessian)))
        return out

    def sequential(self, option: WeightOption, within_layer: bool) -> Encoded:
        """Embedding and head by the statistics of the unpacked model; each layer by those of the packed layers before it."""
        out = self.encoded(option, only_outside=True)
        embedding = next(site for site in self.model.weights if site.role == "embedding")
        model = _PackedEmbedding.open(self.model)
        model.embedding = option.dense(out[embedding.id][1], embedding.out_features, embedding.in_features)
        with tempfile.TemporaryDirectory() as scratch:
            for visit in sequential_layers(
                model, self.ids, scratch=Path(scratch) / "states", within_layer=within_layer
            ):
                for site in visit.sites:
                    tensors = option.encode(WeightTask(visit.weight(site), visit.hessians[site.id].clone()))
                    out[site.id] = (option, tensors)
                    visit.replace(site, option.dense(tensors, site.out_features, site.in_features))
        return out


class _PackedEmbedding(StreamedModel):
    """Its first hidden states come from a packed embedding."""

    embedding: torch.Tensor

    def before_layers(self) -> Any:
        from contextlib import contextmanager

        plain: Callable[[], Any] = super().before_layers

        @contextmanager
        def replaced() -> Any:
            with plain() as embed:
                self.module.get_parameter(self.input_name).data.copy_(self.embedding)
                yield embed

        return replaced()


if __name__ == "__main__":
    main()
