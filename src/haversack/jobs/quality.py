"""Quality before and after packing, on text that no calibration saw: perplexity and KL in nats per token, paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from haversack import data
from haversack.describe.model import describe_model
from haversack.engine.load import PackedModel
from haversack.engine.measure import DamageMeter
from haversack.errors import PlanError
from haversack.formats.tiers import read_resident
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.plan.schema import Plan

NUM_SEQUENCES, SEQ_LEN = 8, 512
Progress = Callable[[str, int, int], None]


def compare_quality(packed: PackedModel, plan: Plan, tell: Progress) -> list[dict[str, str]]:
    """Perplexity before and after, and KL, on the shipped foreign texts.

    Raises ModelNotFoundError or PlanError where the unpacked model is gone or is another one.
    """
    from haversack.cost.calibrated import tokenize

    model = describe_model(plan.model.source)
    if model.fingerprint != plan.model.fingerprint:
        raise PlanError(f"{plan.model.source} is no longer the model that was packed.")
    weights = packed_weights(packed)
    kv = {row.site: KVOption.from_dict(row.option) for row in plan.kv}
    rows = []
    texts = ("foreign-prose", "foreign-code")
    for done, name in enumerate(texts):
        tell("measuring quality", done, len(texts))
        ids, _ = tokenize(model, data.text(name), num_tokens=NUM_SEQUENCES * SEQ_LEN, seq_len=SEQ_LEN)  # type: ignore[arg-type]
        meter = DamageMeter(model, ids, chunk_tokens=plan.prefill_chunk_tokens)
        kl = meter.kl_per_token(weights, kv)
        before, after = meter.log_likelihood(), meter.log_likelihood(weights, kv)
        rows.append(_row(f"perplexity on {name}, before and after", math.exp(-before), math.exp(-after)))
        promised = plan.prediction.damage
        said = f"{promised.nats:.4g} ({promised.label})" if promised.nats is not None else promised.label
        rows.append({"what": f"KL on {name}, nats per token", "predicted": said, "measured": f"{float(kl.mean()):.4g}"})
    tell("measuring quality", len(texts), len(texts))
    return rows


def packed_weights(packed: PackedModel) -> dict[str, tuple[WeightOption, Mapping[str, torch.Tensor]]]:
    """Every site's option and stored tensors, read into memory."""
    out: dict[str, tuple[WeightOption, Mapping[str, torch.Tensor]]] = {}
    for site_id, entry in packed.folder.manifest.sites.items():
        rows = packed.folder.site_tensors(site_id)
        read = read_resident(rows.values())
        out[site_id] = (WeightOption.from_dict(entry.option), {name: read[row.name] for name, row in rows.items()})
    return out


def _row(what: str, before: float, after: float) -> dict[str, str]:
    return {"what": what, "predicted": f"{before:.3f}", "measured": f"{after:.3f}"}
