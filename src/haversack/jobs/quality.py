"""Quality before and after packing, on text that no calibration saw: perplexity and KL in nats per token, paired."""

from __future__ import annotations

import math
import random
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
RECALL_DISTANCES, NUM_PROBES = (64, 256, 512, 900), 24
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
        ids = tokenize(model, data.text(name), num_tokens=NUM_SEQUENCES * SEQ_LEN, seq_len=SEQ_LEN)  # type: ignore[arg-type]
        meter = DamageMeter(model, ids, chunk_tokens=plan.prefill_chunk_tokens)
        kl = meter.kl_per_token(weights, kv)
        before, after = meter.log_likelihood(), meter.log_likelihood(weights, kv)
        rows.append(_row(f"perplexity on {name}, before and after", math.exp(-before), math.exp(-after)))
        promised = plan.prediction.damage
        said = f"{promised.nats:.4g} ({promised.label})" if promised.nats is not None else promised.label
        if promised.label == "measured" and promised.low is not None and promised.high is not None:
            said = f"{promised.nats:.4g}, {promised.low:.4g} to {promised.high:.4g} ({promised.label})"
        rows.append({"what": f"KL on {name}, nats per token", "predicted": said, "measured": f"{float(kl.mean()):.4g}"})
        if done == 0:
            rows += _recall(meter, packed, weights, kv)
    tell("measuring quality", len(texts), len(texts))
    return rows


def _recall(
    meter: DamageMeter,
    packed: PackedModel,
    weights: Mapping[str, tuple[WeightOption, Mapping[str, torch.Tensor]]],
    kv: Mapping[str, KVOption],
) -> list[dict[str, str]]:
    """Exact match of one-word recall at distances within the planned context, before and after."""
    from haversack.jobs.run import open_tokenizer
    from haversack.probes import encode_probe, make_recall, score_answers, token_counter
    from haversack.probes.tasks import SEEN

    tokenizer, templates = open_tokenizer(packed.folder.path), list(SEEN)
    rows = []
    for distance in (d for d in RECALL_DISTANCES if d + 64 <= packed.kv_plan.capacity_tokens):
        rng = random.Random(distance)
        count = token_counter(tokenizer)
        made = [
            make_recall(rng, count, distance_tokens=distance, template=templates[i % len(templates)], kind="word")
            for i in range(NUM_PROBES)
        ]
        try:
            probes = [encode_probe(probe, tokenizer) for probe in made]
        except ValueError:
            return []  # a tokenizer that merges across the probes' borders can't be scored by exact match
        before = score_answers(meter.continuation, probes)
        with meter.changed(weights):
            after = score_answers(lambda c, q, n: meter.continuation(c, q, n, kv), probes)
        rows.append(
            {
                "what": f"recall over {distance} tokens, before and after",
                "predicted": f"{sum(before) / len(before):.2f}",
                "measured": f"{sum(after) / len(after):.2f}",
            }
        )
    return rows


def packed_weights(packed: PackedModel) -> dict[str, tuple[WeightOption, Mapping[str, torch.Tensor]]]:
    """Every site's option and stored tensors, read into memory."""
    out: dict[str, tuple[WeightOption, Mapping[str, torch.Tensor]]] = {}
    for site_id in packed.folder.manifest.sites:
        rows = packed.site_tensors(site_id)
        read = read_resident(rows.values())
        out[site_id] = (packed.option(site_id), {name: read[row.name] for name, row in rows.items()})
    return out


def _row(what: str, before: float, after: float) -> dict[str, str]:
    return {"what": what, "predicted": f"{before:.3f}", "measured": f"{after:.3f}"}
