"""What 8-bit activations lose beside 16-bit ones: reference model A, every matrix at 4 bits as decoding benchmarks pack theirs.

Loss is KL in nats per token on foreign prose and code, computed through the kernels that the bits of activations choose. The interval is a
paired bootstrap over blocks of 64 tokens of 8 bits less 16.
"""

from __future__ import annotations

from typing import Any

from benchmarks.finished_rows import FinishedRows

NUM_SEQUENCES, SEQ_LEN = 12, 512


def losses(rows: FinishedRows) -> list[dict[str, Any]]:
    """A row for either number of bits: `kl`, and for 8 `over_16_bits_95`, the interval of the difference."""
    return rows.get(["activation bits", _option(8).to_dict(), NUM_SEQUENCES, SEQ_LEN], _measure)


def _measure() -> list[dict[str, Any]]:
    import torch

    from haversack import data
    from haversack.cost.calibrated import tokenize
    from haversack.describe.assemble import read_site
    from haversack.describe.checkpoint import Checkpoint
    from haversack.describe.model import describe_model
    from haversack.engine.measure import DamageMeter, paired_bootstrap
    from haversack.parts.weights.base import WeightTask

    folder = data.reference_model("a")
    model, checkpoint = describe_model(folder), Checkpoint.open(folder)
    tokens = NUM_SEQUENCES // 2 * SEQ_LEN
    texts = [
        tokenize(model, data.text(name), num_tokens=tokens, seq_len=SEQ_LEN)
        for name in ("foreign-prose", "foreign-code")
    ]
    meter = DamageMeter(model, torch.cat(texts), chunk_tokens=SEQ_LEN)
    options = {bits: _option(bits) for bits in (16, 8)}
    tensors = {site.id: options[16].encode(WeightTask(read_site(checkpoint, site).float())) for site in model.weights}
    kl = {bits: meter.kl_per_token({id: (o, row) for id, row in tensors.items()}) for bits, o in options.items()}
    low, high = paired_bootstrap(kl[8], kl[16])
    found: list[dict[str, Any]] = []
    for bits, option in options.items():
        kernel = option.kernel_name(SEQ_LEN, model.weights[1].out_features, model.weights[1].in_features, model.dtype)
        found.append({"activation_bits": bits, "option": option.label, "kernel": kernel, "kl": float(kl[bits].mean())})
    found[1]["over_16_bits_95"] = [low, high]
    return found


def _option(activation_bits: int) -> Any:
    from benchmarks.decode import four_bits

    return four_bits(activation_bits)
