"""Low rank: keys and values projected onto a few directions, of one KV head or of several together."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import UsageError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Project, Projection
from haversack.parts.kv.projected import narrower
from haversack.parts.kv.slabs import allocate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRankKV(Project):
    """Store `key_rank` numbers for the keys of `heads_together` KV heads, and `value_rank` for their values (0: a head's own width).

    With k the keys of heads that lie together, end to end, c = A k is stored, and a query q of one of them meets c as B q, where B has the rows of its head; values
    and outputs likewise. Bases are calibrated (`engine.projections`), float16 in base64, `(groups, heads_together * head_dim, rank)` each: `key_basis` A, `query_basis`
    B, `value_basis`, `output_basis`; a missing query or output basis is the other's. Without bases, the mean of the heads' first channels is stored, as converting to grouped heads by pooling does. Rotated
    keys are projected: a basis that mixes channels of different speeds depends on the position, one that keeps to a speed's
    pairs commutes with the rotation (`per_frequency` when it is calibrated), and could be folded into the weights.

    Of heads that stay apart, what has rank 0 and no basis is stored as it comes: keys alone can be projected.

    Bytes per token: those of `num_kv_heads / heads_together` heads of these ranks; and 2 rank head_dim num_kv_heads for each of the four bases of a layer.
    Error: the projection's; none at full rank but the rounding of bases to float16. Everything behind sees fewer, narrower heads.
    """

    id: ClassVar[str] = "kv.low-rank"
    title: ClassVar[str] = "Keys and values by a few calibrated directions of one or several heads"
    source: ClassVar[Source | None] = Source(
        "Saxena et al.", 2024, "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression", "2408.05646", "section 4"
    )  # fmt: skip

    key_rank: int = 0
    value_rank: int = 0
    heads_together: int = 1
    key_basis: str = field(default="", repr=False)
    query_basis: str = field(default="", repr=False)
    value_basis: str = field(default="", repr=False)
    output_basis: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        check_range(self.id, "key_rank", self.key_rank, "0 or more", self.key_rank >= 0)
        check_range(self.id, "value_rank", self.value_rank, "0 or more", self.value_rank >= 0)
        check_range(self.id, "heads_together", self.heads_together, "1 or more", self.heads_together >= 1)

    @property
    def label(self) -> str:
        several = f" of {self.heads_together} heads together" if self.heads_together > 1 else ""
        ranks = [str(rank) if rank else "as many as channels" for rank in (self.key_rank, self.value_rank)]
        return f"keys by {ranks[0]} and values by {ranks[1]} directions{several}"

    def _ranks(self, site: AttentionSite) -> tuple[int, int]:
        widths = site.key_head_dim, site.value_head_dim
        if site.num_kv_heads % self.heads_together:
            raise UsageError(
                f"{self.id} takes {self.heads_together} heads together, but {site.id} has {site.num_kv_heads}."
            )
        for name, rank, width in zip(("key_rank", "value_rank"), (self.key_rank, self.value_rank), widths):
            most = width * self.heads_together
            check_range(self.id, name, rank, f"at most {most} at {site.id}", rank <= most)
        return self.key_rank or widths[0], self.value_rank or widths[1]

    def inside(self, site: AttentionSite) -> AttentionSite:
        return narrower(site, site.num_kv_heads // self.heads_together, *self._ranks(site))

    def _bases(self, site: AttentionSite) -> dict[str, tuple[str, int, int]]:
        """By name the stored bases: their base64, and a head's width and rank."""
        key_rank, value_rank = self._ranks(site)
        found = {}
        if self.projects_keys:
            found["keys"] = self.key_basis, site.key_head_dim, key_rank
            found["queries"] = self.query_basis or self.key_basis, site.key_head_dim, key_rank
        if self.projects_values:
            found["values"] = self.value_basis, site.value_head_dim, value_rank
            found["outputs"] = self.output_basis or self.value_basis, site.value_head_dim, value_rank
        return found

    @property
    def projects_keys(self) -> bool:
        return self.heads_together > 1 or bool(self.key_rank or self.key_basis)

    @property
    def projects_values(self) -> bool:
        return self.heads_together > 1 or bool(self.value_rank or self.value_basis)

    def stored(self, site: AttentionSite) -> tuple[StoredTensor, ...]:
        groups = site.num_kv_heads // self.heads_together
        return tuple(
            StoredTensor(name, "F16", (groups, self.heads_together * width, rank))
            for name, (_, width, rank) in self._bases(site).items()
        )

    def build(self, site: AttentionSite, device: str | torch.device) -> Projection:
        tensors = allocate(self.stored(site), device)
        for name, (text, width, rank) in self._bases(site).items():
            basis = _decoded(text, tensors[name].shape, self.id, site) if text else self._mean(width, rank)
            tensors[name].copy_(basis)
        return _Directions(tensors, site.num_kv_heads, self.heads_together)

    def _mean(self, width: int, rank: int) -> torch.Tensor:
        """The mean of heads that lie together, over sqrt(heads) on either side; beyond their width, further channels of theirs."""
        import torch

        heads = self.heads_together
        return (
            torch.eye(width).repeat(heads, heads)[:, :rank] / heads**0.5
            if rank <= width
            else torch.eye(width * heads)[:, :rank]
        )


class _Directions(Projection):
    """Products with the stored bases, in float32."""

    def __init__(self, tensors: dict[str, torch.Tensor], num_kv_heads: int, heads_together: int):
        self.tensors = tensors
        self.num_kv_heads = num_kv_heads
        self.heads_together = heads_together

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_head(x, self._basis("queries")) if "queries" in self.tensors else x

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._stored(x, "keys")

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self._stored(x, "values")

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_head(x, self._basis("outputs").transpose(1, 2)) if "outputs" in self.tensors else x

    def _basis(self, name: str) -> torch.Tensor:
        """`(num_kv_heads, head_dim, rank)` float32."""
        basis = self.tensors[name].float()
        return basis.reshape(self.num_kv_heads, -1, basis.shape[-1])

    def _stored(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name not in self.tensors:
            return x
        batch_size, _, num_tokens, head_dim = x.shape
        together = x.float().reshape(batch_size, -1, self.heads_together, num_tokens, head_dim)
        together = together.transpose(2, 3).reshape(batch_size, -1, num_tokens, self.heads_together * head_dim)
        return _product(together, self.tensors[name].float()).to(x.dtype)

    def _by_head(self, x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """`(batch, heads, tokens, n)` by their KV head's `(num_kv_heads, n, m)`."""
        batch_size, num_heads, num_tokens, _ = x.shape
        grouped = x.float().reshape(batch_size, self.num_kv_heads, -1, x.shape[-1])
        return _product(grouped, basis).to(x.dtype).reshape(batch_size, num_heads, num_tokens, -1)


def _product(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, rows, n)` by each head's `(heads, n, m)`, all sequences' rows together, or the basis would be copied for each."""
    batch_size, heads, rows, width = x.shape
    together = x.transpose(0, 1).reshape(heads, batch_size * rows, width)
    return (together @ basis).view(heads, batch_size, rows, -1).transpose(0, 1)


def encoded(basis: torch.Tensor) -> str:
    """A basis as a plan file holds it: float16 in base64, little-endian."""
    import torch

    return base64.b64encode(basis.detach().to(torch.float16).contiguous().numpy().astype("<f2").tobytes()).decode()


def _decoded(text: str, shape: torch.Size, part: str, site: AttentionSite) -> torch.Tensor:
    import numpy
    import torch

    try:
        numbers = numpy.frombuffer(base64.b64decode(text, validate=True), dtype="<f2")
    except ValueError:
        raise UsageError(f"{part}: a basis is not float16 in base64.") from None
    if len(numbers) != shape.numel() or not numpy.isfinite(numbers).all():
        raise UsageError(
            f"{part}: a basis has {len(numbers)} numbers, but {site.id} needs {shape.numel()} finite ones."
        )
    return torch.from_numpy(numbers.copy()).view(shape)
