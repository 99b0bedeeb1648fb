"""Cells of keys: keys and values on another tier under an index on the device; a step scans the cells nearest to its queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Regions
from haversack.parts.kv.retrieval import RetrievedGroups, Retrieving

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KeyCells(Retrieving):
    """Put keys and values that leave the window on another tier; each KV head scans `scan_tokens` keys per step, of the cells whose mean has the largest product with a query, and
    attends to the `read_tokens` best of them.

    Cells are `num_cells` running means of each KV head's keys, begun with keys of the first group, to which every group adds its keys at once (Sculley 2010, doi 10.1145/1772690.1772862). Bytes on the
    device: the window; 4 (key_head_dim + 1) num_cells per KV head; one per token and KV head. On the tier: a key and a value per token
    behind the window. Over the link, per KV head and step: `scan_tokens` keys and `read_tokens` values; and each token once when it leaves. Error: what unread tokens would have added; none while no more lie behind the window than
    are read. Differs from the source in the index: an inverted list of cells instead of a graph between queries and keys.
    """

    id: ClassVar[str] = "kv.key-cells"
    title: ClassVar[str] = "Keys and values on another tier, in cells that steps scan a few of"
    source: ClassVar[Source | None] = Source(
        "Liu et al.", 2024, "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval", "2409.10516", "section 3"
    )  # fmt: skip
    far: ClassVar[tuple[str, ...]] = ("keys", "values")

    scan_tokens: int = 512
    num_cells: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.scan_tokens >= self.read_tokens
        check_range(self.id, "scan_tokens", self.scan_tokens, f"at least read_tokens ({self.read_tokens})", least)
        most = f"1 to group_size ({self.group_size})"
        check_range(self.id, "num_cells", self.num_cells, most, 1 <= self.num_cells <= self.group_size)

    @property
    def label(self) -> str:
        scanned = f"{self.read_tokens} of {self.scan_tokens} scanned in {self.num_cells} cells"
        return f"keys and values on {self.tier}, {scanned} read per step g{self.group_size} +{self.recent_tokens}"

    def index(self, site: AttentionSite, num_tokens: int, batch_size: int) -> tuple[StoredTensor, ...]:
        leading = (batch_size, site.num_kv_heads)
        return (
            StoredTensor("cells.means", "F32", (*leading, self.num_cells, site.key_head_dim)),
            StoredTensor("cells.counts", "F32", (*leading, self.num_cells, 1)),
            StoredTensor("cells.of", "U8", (*leading, num_tokens)),
        )

    def link_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, held_tokens: int, dtype: str
    ) -> int:
        behind = self.num_groups(regions) * self.group_size
        put_away = self.group_size if behind else 0
        keys = (min(self.scan_tokens, behind, held_tokens) + put_away) * site.key_head_dim
        values = (min(self.read_tokens, behind, held_tokens) + put_away) * site.value_head_dim
        return batch_size * site.num_kv_heads * (keys + values) * DTYPE_BYTES[dtype]

    def selection_bytes(self, site: AttentionSite, num_tokens: int, *, batch_size: int, num_queries: int) -> int:
        """Products with cells, each token's cell and its product; scanned keys as they come and in float32, and their logits."""
        f32, rows, heads = DTYPE_BYTES["F32"], batch_size * site.num_heads * num_queries, batch_size * site.num_kv_heads
        scanned = min(self.scan_tokens, num_tokens)
        finding = rows * self.num_cells * 2 * f32 + heads * num_tokens * (2 * 8 + 3 * f32 + 2 * 8)
        scanning = heads * scanned * (site.key_head_dim * 2 * f32 + 4 * 8 + 2 * f32) + rows * scanned * 2 * f32
        return finding + scanning

    def indexing_bytes(self, site: AttentionSite, *, batch_size: int) -> int:
        """One group's keys, its distances to cells, and which cell each is in; the cells before and after."""
        heads, f32 = batch_size * site.num_kv_heads, DTYPE_BYTES["F32"]
        keys = 2 * self.group_size * site.key_head_dim * f32
        return heads * (
            keys + self.group_size * (4 * self.num_cells * f32 + 8) + 4 * self.num_cells * site.key_head_dim * f32
        )

    def groups(self, site: AttentionSite, num_groups: int, tensors: dict[str, torch.Tensor]) -> RetrievedGroups:
        return _ByCells(self, num_groups, tensors)


class _ByCells(RetrievedGroups):
    """Tokens chosen by their cell, then by their key."""

    part: KeyCells

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().write(rows, first_slot, keys, values)
        for i, group in enumerate(keys.split(self.group_tokens, 2)):
            self._index(rows, first_slot + i, group.to(self.tensors["cells.means"]))

    def _index(self, rows: slice, slot: int, keys: torch.Tensor) -> None:
        """Give one group's keys `(rows, kv_heads, group_tokens, head_dim)` to the nearest cells, which move towards them."""
        import torch

        means, counts = self.tensors["cells.means"][rows], self.tensors["cells.counts"][rows]
        if slot == 0:
            means.copy_(keys[:, :, :: self.group_tokens // self.part.num_cells][:, :, : self.part.num_cells])
            counts.zero_()
        nearest = (keys @ means.mT).sub_(means.square().sum(-1)[:, :, None] / 2).argmax(-1)  # (rows, kv_heads, tokens)
        at = slice(slot * self.group_tokens, (slot + 1) * self.group_tokens)
        self.tensors["cells.of"][rows, :, at] = nearest
        members = torch.nn.functional.one_hot(nearest, self.part.num_cells).to(keys).mT
        joined = members.sum(-1, keepdim=True)
        counts.add_(joined)
        means.add_((members @ keys).sub_(joined * means).div_(counts.clamp_min(1.0)))

    def chosen(
        self, query: torch.Tensor, until: torch.Tensor, weights: torch.Tensor | None, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        used = int(until.max())
        near = query @ self.tensors["cells.means"].mT
        if weights is not None:
            near.masked_fill_(~weights, -torch.inf)
        of = self.tensors["cells.of"][:, :, :used].long()
        found = near.amax(2).gather(2, of).masked_fill_(torch.arange(used, device=query.device) >= until, -torch.inf)
        # a cell that is cut keeps its oldest tokens, in any company
        scanned = found.sort(dim=-1, descending=True, stable=True).indices[..., : self.part.scan_tokens]
        del near, of, found
        keys = self.fetch("keys", scanned)
        logits = query @ keys.mT
        if weights is not None:
            logits.masked_fill_(~weights, -torch.inf)
        logits = logits.amax(2).masked_fill_(scanned >= until, -torch.inf)
        best = logits.topk(self.part.read_tokens, dim=-1, sorted=False).indices
        return scanned.gather(2, best), keys.gather(2, best[..., None].expand(-1, -1, -1, keys.shape[-1]))
