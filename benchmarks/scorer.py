"""One scorer for everybody's weights: KL and perplexity of dense weights against the 16-bit model, per window of text.

Contenders hand over the matrices that their stored bytes stand for; the same float32 model runs them on the same windows, so that
nothing but the weights differs: no kernel, no activation format. The reference is the checkpoint itself, in float32 as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from haversack import data
from haversack.cost.calibrated import tokenize
from haversack.describe.model import describe_model
from haversack.engine.quiet import quiet_transformers

TEXTS = ("foreign-prose", "foreign-code")
HEAD = "lm_head.weight"
BATCH = 4


class Scorer:
    """Holds the model and the reference's log-probabilities: `4 vocab_size` bytes per token.

    `num_windows` windows of `seq_len` tokens are spread over each text.
    """

    def __init__(self, folder: Path, *, num_windows: int = 12, seq_len: int = 512):
        from transformers import AutoModelForCausalLM

        self.described = describe_model(folder)
        with quiet_transformers():
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.original = {
            name: tensor.detach().clone() for name, tensor in self.model.named_parameters()
        }  # a tied head once
        self.windows = torch.cat(
            [
                tokenize(self.described, data.text(name), num_tokens=num_windows * seq_len, seq_len=seq_len)  # type: ignore[arg-type]
                for name in TEXTS
            ]
        )
        self.num_windows = len(self.windows) // len(TEXTS)
        self.reference = [self._log_probabilities(ids) for ids in self.windows.split(BATCH)]

    @property
    def key(self) -> dict[str, Any]:
        """What scores depend on, beside the weights."""
        return {"model": self.described.fingerprint, "windows": list(self.windows.shape), "texts": list(TEXTS)}

    def score(self, weights: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
        """KL from the reference and negative log-likelihood of the text, nats per token, one figure per window.

        `weights` maps checkpoint names to dense tensors; what is not named stays the checkpoint's. A head that is given
        beside a tied embedding is used on its own. Raises KeyError for a name that
        the model doesn't have, ValueError for another shape.
        """
        kl: list[float] = []
        nll: list[float] = []
        self._put(weights)
        try:
            for ids, reference in zip(self.windows.split(BATCH), self.reference, strict=True):
                changed = self._log_probabilities(ids)
                kl += (reference.exp() * (reference - changed)).sum(-1).mean(-1).tolist()
                nll += [-x for x in changed[:, :-1].gather(2, ids[:, 1:, None]).mean((1, 2)).tolist()]
        finally:
            self._put(self.original)
        return {"kl": kl, "nll": nll}

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self.model.config.tie_word_embeddings:
            head, shared = self.model.get_output_embeddings(), self.model.get_input_embeddings().weight
            head.weight = torch.nn.Parameter(shared.detach().clone()) if HEAD in weights else shared
        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights.items():
                if own[name].shape != tensor.shape:
                    raise ValueError(f"{name} is {tuple(tensor.shape)}; the model's is {tuple(own[name].shape)}")
                own[name].copy_(tensor)

    def _log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """`(sequences, tokens, vocab_size)` float32."""
        with torch.inference_mode():
            return torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits, -1)


def mean_by_text(per_window: list[float]) -> dict[str, float]:
    """Text -> mean over its windows."""
    count = len(per_window) // len(TEXTS)
    return {name: sum(per_window[i * count : (i + 1) * count]) / count for i, name in enumerate(TEXTS)}


def perplexity(nll: float) -> float:
    return math.exp(nll)


def paired_interval(
    first: list[float], second: list[float], *, strata: int = len(TEXTS), num_samples: int = 4000, seed: int = 0
) -> list[float]:
    """95% bootstrap interval of mean(first - second) over windows; the texts (or other `strata`) are drawn apart, as many windows of each."""
    difference = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    rows = difference.reshape(strata, -1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(rows.shape[1], (num_samples, *rows.shape), generator=generator)
    means = rows.expand(num_samples, *rows.shape).gather(2, draws).mean((1, 2))
    return [float(means.quantile(0.025)), float(means.quantile(0.975))]
