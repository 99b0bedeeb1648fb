"""Damage measured: KL divergence of a whole plan, or of one change, against the unpacked model.

Both run the same real model, the same attention function and the same prefill chunks; the reference keeps everything.
The divergence is of the reference's next-token distribution from the changed one's, in nats, at every token of held-out
text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.attach import PackedSite, attach
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.packed_tensor import PackedMatrix
from haversack.engine.quiet import quiet_transformers
from haversack.engine.whole import load_whole
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_REFERENCE_BYTES = 2**30
"""Reference log-probabilities are kept in float32; more tokens than fit here are left out, and `num_tokens` says so."""


class DamageMeter:
    """Measures changes of one model on fixed tokens.

    `token_ids` is `(sequences, tokens)`. Memory: the model in its own dtype, the reference's log-probabilities
    (`4 vocab_size` bytes per token), and one sequence's cache.
    """

    def __init__(self, model: Model, token_ids: torch.Tensor, *, chunk_tokens: int = 256):
        from haversack.engine import attention

        assert model.folder is not None, "measuring needs weights"
        attention.register()
        self.token_ids = torch.empty(0, dtype=torch.int64)
        self.described = model
        self.checkpoint = Checkpoint.open(model.folder)
        self.chunk_tokens = chunk_tokens
        with quiet_transformers():
            self.model: PreTrainedModel = load_whole(model, attention=attention.NAME).eval()
        if model.weights and any(site.expert is not None for site in model.weights):
            self.model.set_experts_implementation("eager")
        self.use(token_ids)

    def use(self, token_ids: torch.Tensor) -> None:
        """Measure on these tokens from now on."""
        per_sequence = token_ids.shape[1] * self.described.vocab_size * 4
        token_ids = token_ids[: max(1, MAX_REFERENCE_BYTES // per_sequence)]
        if not torch.equal(token_ids, self.token_ids):
            self.token_ids, self._reference = token_ids, []
            self._reference = [self._log_probabilities(row, {}) for row in token_ids]

    def entropy(self) -> torch.Tensor:
        """The reference's own uncertainty at every token, nats, `(sequences, tokens)`."""
        return torch.stack([-(row.exp() * row).sum(-1) for row in self._reference])

    @property
    def num_tokens(self) -> int:
        """Tokens whose divergence is measured."""
        return self.token_ids.numel()

    def kl_per_token(
        self,
        weights: Mapping[str, tuple[WeightOption, Mapping[str, torch.Tensor]]],
        kv: Mapping[str, KVOption] | None = None,
    ) -> torch.Tensor:
        """Nats at every token, `(sequences, tokens)` float32, with the given sites changed and all others untouched.

        `weights` maps site id to its option and encoded tensors; `kv` maps attention site id to its option.
        """
        out = torch.empty(self.token_ids.shape)
        with self.changed(weights):
            for i, row in enumerate(self.token_ids):
                changed = self._log_probabilities(row, kv or {})
                reference = self._reference[i]
                out[i] = (reference.exp() * (reference - changed)).sum(-1)
        return out

    def log_likelihood(
        self,
        weights: Mapping[str, tuple[WeightOption, Mapping[str, torch.Tensor]]] | None = None,
        kv: Mapping[str, KVOption] | None = None,
    ) -> float:
        """Mean log-likelihood of the text's own next tokens, nats per token (so perplexity is `exp(-x)`)."""
        with self.changed(weights or {}):
            total = 0.0
            for i, row in enumerate(self.token_ids):
                unchanged = not weights and not kv
                scores = self._reference[i] if unchanged else self._log_probabilities(row, kv or {})
                total += float(scores[:-1].gather(1, row[1:, None]).sum())
        return total / (self.token_ids.shape[0] * (self.token_ids.shape[1] - 1))

    @contextmanager
    def changed(self, weights: Mapping[str, tuple[WeightOption, Mapping[str, torch.Tensor]]]) -> Iterator[None]:
        """The model with packed sites attached, and its own parameters back afterwards."""
        packed = self._packed(weights)
        kept = []
        for item in packed:
            for name in (item.site.module, *item.site.tied_modules):
                module = self.model.get_submodule(name)
                kept.append((module, item.site.parameter, module._parameters[item.site.parameter]))
        attach(self.model, packed, self.model.dtype)
        try:
            yield
        finally:
            for module, parameter, tensor in reversed(kept):
                module._parameters[parameter] = tensor

    def _packed(self, weights: Mapping[str, tuple[WeightOption, Mapping[str, torch.Tensor]]]) -> list[PackedSite]:
        """Changed sites, and the untouched ones that share a parameter with them."""
        touched = {(s.module, s.parameter) for s in map(self.described.site, weights)}
        packed = []
        for site in self.described.weights:
            if (site.module, site.parameter) in touched:
                option, tensors = weights.get(site.id) or (WeightOption(), self._neutral(site))
                packed.append(PackedSite(site, packed_matrix(site, option, tensors)))
        return packed

    def _neutral(self, site: WeightSite) -> dict[str, torch.Tensor]:
        return {"weight": read_site(self.checkpoint, site)}

    def continuation(
        self, context: Sequence[int], question: Sequence[int], num_tokens: int, kv: Mapping[str, KVOption] | None = None
    ) -> list[int]:
        """Greedy tokens after a context and a question, which is read after the context was cached: a cache that drops or
        packs tokens does so before it sees the question. Runs the model as it is, inside `changed` or not."""
        cache = self._cache(kv or {}, len(context) + len(question) + num_tokens)
        logits = torch.empty(0)
        with torch.inference_mode():
            for ids in (*torch.tensor(context).split(self.chunk_tokens), torch.tensor(question)):
                logits = self.model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            out = [int(logits[0, -1].argmax())]
            while len(out) < num_tokens:
                step = torch.tensor([[out[-1]]])
                logits = self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                out.append(int(logits[0, -1].argmax()))
        return out

    def _cache(self, kv: Mapping[str, KVOption], capacity_tokens: int) -> HaversackCache:
        sites = self.described.attention
        options = tuple(kv.get(site.id, KVOption()) for site in sites)
        return HaversackCache(KVPlan(sites, options, 1, capacity_tokens, self.described.dtype))

    def _log_probabilities(self, row: torch.Tensor, kv: Mapping[str, KVOption]) -> torch.Tensor:
        """`(tokens, vocab_size)` float32."""
        cache = self._cache(kv, len(row))
        out = []
        with torch.inference_mode():
            for chunk in row.split(1 if cache.plan.spares_steps else self.chunk_tokens):
                logits = self.model(input_ids=chunk[None], past_key_values=cache, use_cache=True).logits[0]
                out.append(torch.log_softmax(logits.float(), -1))
        return torch.cat(out)


def packed_matrix(site: WeightSite, option: WeightOption, tensors: Mapping[str, torch.Tensor]) -> PackedMatrix:
    """A matrix whose tensors stay where they are."""
    return PackedMatrix(site.id, option, site.out_features, site.in_features, lambda: tensors)


def paired_bootstrap(
    first: torch.Tensor, second: torch.Tensor, *, num_samples: int = 2000, seed: int = 0, block_tokens: int = 64
) -> tuple[float, float]:
    """95% interval of mean(first - second) over paired blocks: rows `(sequences, tokens)` are cut into blocks of `block_tokens`,
    since neighbouring tokens are not independent."""
    difference = (first - second).reshape(-1)
    blocks = difference[: difference.numel() // block_tokens * block_tokens].reshape(-1, block_tokens).mean(1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(blocks), (num_samples, len(blocks)), generator=generator)
    means = blocks[draws].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))
