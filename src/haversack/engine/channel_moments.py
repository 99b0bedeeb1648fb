"""Second moments of a model's queries, keys and values by layer, and the channels and bases that lose least under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from haversack.describe.site import AttentionSite
from haversack.engine.attention import haversack_attention, registered
from haversack.parts.kv.low_rank import LowRankKV, encoded

SHRINKAGE = 1e-3
"""Share of a moment's mean diagonal that is added to it before it is inverted: few tokens see few directions."""

GRADIENT_SHRINKAGE = 0.1
"""The same of the gradients' moments, which are noisier."""

_NAME = "haversack-moments"


@dataclass(frozen=True)
class ChannelMoments:
    """Of one layer, over tokens, float64: `queries` `(heads, head_dim, head_dim)`; `keys` and `values` `(kv_heads * head_dim,)` squared, heads end to end;
    `value_gradients` as the values', of the tokens' negative log-likelihood; `keys_with_before` and `values_with_before` the products of what this layer's
    heads hold with what the same heads of the layer before do, zero in the first."""

    site: AttentionSite
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    value_gradients: torch.Tensor
    keys_with_before: torch.Tensor
    values_with_before: torch.Tensor

    def turned_to_before(self) -> LowRankKV:
        """Each head turned, channels and all, to where it is nearest to the same head of the layer before: the orthogonal map of least squared distance
        (Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem"). It changes no logit, and outputs are turned back."""
        width = self.site.key_head_dim, self.site.value_head_dim
        bases = []
        for together, each in zip((self.keys_with_before, self.values_with_before), width):
            blocks = [_block(together, head, 1, each) for head in range(self.site.num_kv_heads)]
            left, _, right = torch.linalg.svd(torch.stack(blocks))
            bases.append(encoded(left @ right))
        return LowRankKV(*width, key_basis=bases[0], value_basis=bases[1])

    @property
    def query_energy(self) -> list[list[float]]:
        """`[KV head][channel]`: mean square, summed over the head's group."""
        found = self.queries.diagonal(dim1=1, dim2=2).unflatten(0, (self.site.num_kv_heads, -1)).sum(1)
        return [[float(x) for x in head] for head in found]

    @property
    def key_energy(self) -> list[list[float]]:
        return self._energy(self.keys)

    @property
    def value_energy(self) -> list[list[float]]:
        return self._energy(self.values)

    def _energy(self, moment: torch.Tensor) -> list[list[float]]:
        found = moment.diagonal().unflatten(0, (self.site.num_kv_heads, -1))
        return [[float(x) for x in head] for head in found]

    def fitted(self, part: LowRankKV, *, per_frequency: bool = False) -> LowRankKV:
        """The part with bases that lose least: of keys in the logits' mean square, of values in what the gradients weigh (their outer products' mean, a diagonal
        added); what it leaves as it is stays so. `per_frequency` keeps to bases that commute with a rotary embedding of whole heads, halves paired."""
        heads, width = self.site.num_kv_heads, self.site.key_head_dim
        together = part.heads_together
        asked = self.queries.unflatten(0, (heads, -1)).sum(1)
        key_bases, value_bases = [], []
        for first in range(0, heads, together):
            queries = torch.block_diag(*asked[first : first + together])
            keys = _block(self.keys, first, together, width)
            rank = part.key_rank or width
            if per_frequency:
                key_bases.append(least_loss_by_frequency(keys, queries, rank, width))
            else:
                key_bases.append(least_loss(keys, queries, rank))
            at = first, together, self.site.value_head_dim
            weights = _shrunk(_block(self.value_gradients, *at), GRADIENT_SHRINKAGE)
            value_bases.append(
                least_loss(_block(self.values, *at), weights, part.value_rank or self.site.value_head_dim)
            )
        (keys_in, keys_out), (values_in, values_out) = (
            [torch.stack(basis) for basis in zip(*bases)] for bases in (key_bases, value_bases)
        )
        if part.projects_keys:
            part = replace(part, key_basis=encoded(keys_in), query_basis=encoded(keys_out))
        if part.projects_values:
            part = replace(part, value_basis=encoded(values_in), output_basis=encoded(values_out))
        return part


def least_loss(moment: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bases `(n, rank)`: A of what is stored, A^T x, and B of what meets it, such that y^T (x - B A^T x) is least in the mean square for
    x and y of these second moments `(n, n)`, each independent of the other: from the singular vectors of the product of their roots."""
    stored, asked, _ = _singular(moment, weights)
    return stored[:, :rank], asked[:, :rank]


def least_loss_by_frequency(
    moment: torch.Tensor, weights: torch.Tensor, rank: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of heads of `head_dim` within the pairs of channels that a rotary embedding turns together, as complex numbers, for what is linear in those
    commutes with turning; the largest singular values of all pairs are taken, and both halves of a pair lie as far apart as in a head of this rank."""
    half, total = head_dim // 2, moment.shape[0]
    found = []
    for f in range(half):
        at = torch.arange(f, total, head_dim)
        stored, asked, values = _singular(_complex(moment, at, at + half), _complex(weights, at, at + half))
        found += [(float(value), f, at, stored[:, i], asked[:, i]) for i, value in enumerate(values)]
    largest = sorted(found, key=lambda row: -row[0])[: rank // 2]
    bases = torch.zeros(2, total, rank, dtype=moment.dtype)
    for i, (_, _, at, *vectors) in enumerate(sorted(largest, key=lambda row: row[1])):
        for basis, vector in zip(bases, vectors):
            basis[at, i], basis[at + half, i] = vector.real, vector.imag
            basis[at, i + rank // 2], basis[at + half, i + rank // 2] = -vector.imag, vector.real
    return bases[0], bases[1]


def _singular(moment: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All columns of both bases, and the singular values that they are ordered by."""
    (root, inverse), (other_root, other_inverse) = (_roots(_shrunk(m, SHRINKAGE)) for m in (moment, weights))
    left, values, right = torch.linalg.svd(other_root @ root)
    balance = (
        weights.diagonal().real.sum() / moment.diagonal().real.sum()
    ) ** 0.25  # both bases of the same size, for float16
    scale = values.sqrt()
    return inverse @ right.mH * scale / balance, other_inverse @ left * scale * balance, values


def _complex(moment: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    """The second moment of x + iy, of that of x and y together."""
    xx, yy, yx = (moment[a[:, None], b] for a, b in ((real, real), (imaginary, imaginary), (imaginary, real)))
    return torch.complex(xx + yy, yx - yx.mT)


def _shrunk(moment: torch.Tensor, share: float) -> torch.Tensor:
    mean = moment.diagonal().real.mean().clamp_min(1e-30)
    return moment + share * mean * torch.eye(len(moment), dtype=moment.dtype)


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric root and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(1e-30).sqrt()
    return vectors * root @ vectors.mH, vectors / root @ vectors.mH


def _block(moment: torch.Tensor, first_head: int, num_heads: int, head_dim: int) -> torch.Tensor:
    at = slice(first_head * head_dim, (first_head + num_heads) * head_dim)
    return moment[at, at]


def channel_moments(
    model: Any, sites: Sequence[AttentionSite], texts: Sequence[Sequence[int]]
) -> tuple[ChannelMoments, ...]:
    """Of every layer over the tokens of `texts`, each in one pass without a cache. Raises UnsupportedModelError as the attention function does."""
    sums: list[dict[str, torch.Tensor]] = [{} for _ in sites]

    def add(layer: int, name: str, moment: torch.Tensor) -> None:
        sums[layer][name] = sums[layer].get(name, 0) + moment

    for text in texts:
        ids = torch.tensor([list(text)])
        moved: list[torch.Tensor] = []
        before: dict[str, torch.Tensor] = {}

        def observe(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            number = getattr(module, "layer_idx", None)
            layer = len(moved) if number is None else int(number)  # noqa: B023
            q = query[0].detach().double()
            add(layer, "queries", q.mT @ q)
            for name, x in (("keys", key), ("values", value)):
                flat = x[0].detach().double().transpose(0, 1).flatten(1)  # (tokens, kv_heads * head_dim)
                add(layer, name, flat.mT @ flat)
                earlier = before.get(name, torch.zeros_like(flat))  # noqa: B023
                add(
                    layer,
                    f"{name}_with_before",
                    flat.mT @ (earlier if earlier.shape == flat.shape else torch.zeros_like(flat)),
                )
                before[name] = flat  # noqa: B023
            shift = torch.zeros_like(value, dtype=torch.float32, requires_grad=True)
            moved.append(shift)  # noqa: B023
            return haversack_attention(module, query, key, value + shift.to(value.dtype), *args, **kwargs)

        with registered(model, _NAME, observe), torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            gradients = torch.autograd.grad(loss, moved)
        for layer, gradient in enumerate(gradients):
            flat = gradient[0].double().transpose(0, 1).flatten(1)
            add(layer, "value_gradients", flat.mT @ flat)
    count = sum(len(text) for text in texts)
    return tuple(
        ChannelMoments(site, **{name: moment / count for name, moment in found.items()})
        for site, found in zip(sites, sums, strict=True)
    )
