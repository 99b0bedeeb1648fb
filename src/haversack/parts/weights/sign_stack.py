"""A stack of blocks, each a matrix of signs times one of low rank: every block holds what those before it left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.bitmap import pack_bits, unpack_bits
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Stack, WeightTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SignStack(Stack):
    """Adds `blocks` (1 to 16) of signs times `up @ down` of `rank` (1 to 256): stores `1 + 16 rank (1 / out + 1 / in)` bits per weight and block.

    A block takes the signs of what is left, and the leading singular directions of its magnitudes, with columns weighed by the root mean square of their inputs where that is known.
    So the first blocks of a longer stack are the shorter stack, bit for bit. Error: falls with every block on matrices met; no bound. Source: Wang et al. 2024
    (arXiv 2410.23918, section 2.2).
    """

    id: ClassVar[str] = "sign-stack"
    title: ClassVar[str] = "a stack of signs times low rank"
    source: ClassVar[Source | None] = Source(
        "Wang, Wang, Wang, Zhang, Zhou, Qiu",
        2024,
        "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
        "2410.23918",
        "section 2.2",
    )

    blocks: int = 2
    rank: int = 16

    def __post_init__(self) -> None:
        check_range(self.id, "blocks", self.blocks, "from 1 to 16", 1 <= self.blocks <= 16)
        check_range(self.id, "rank", self.rank, "from 1 to 256", 1 <= self.rank <= 256)

    def shortened(self, blocks: int) -> SignStack:
        return replace(self, blocks=blocks)

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        rank = min(self.rank, out_features, in_features)
        block = (
            StoredTensor("signs", "U8", (out_features, -(-in_features // 8))),
            StoredTensor("up", "F16", (out_features, rank)),
            StoredTensor("down", "F16", (rank, in_features)),
        )
        return tuple(tensor.prefixed(str(number)) for number in range(self.blocks) for tensor in block)

    def correct(self, task: WeightTask, approximation: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        from haversack.parts.weights.low_rank import leading_directions

        left, columns = task.weight - approximation, torch.ones(task.weight.shape[1])
        if task.hessian is not None:
            root = task.hessian.diagonal().clamp_min(0).sqrt()
            columns = root.clamp_min(1e-3 * float(root.max().clamp_min(1e-20)))
            columns = columns / columns.mean()
        found: dict[str, torch.Tensor] = {}
        for number in range(self.blocks):
            negative = left < 0
            rank = min(self.rank, *left.shape)
            up, sizes, down = leading_directions(left.abs() * columns, rank)
            sizes = sizes[:rank]
            shared = sizes[:rank].sqrt()
            up, down = (up[:, :rank] * shared).half(), (shared[:, None] * down[:rank] / columns).half()
            found |= {f"{number}.signs": pack_bits(negative), f"{number}.up": up, f"{number}.down": down}
            left = left - torch.where(negative, -1.0, 1.0) * (up.float() @ down.float())
        return found

    def contribute(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        import torch

        from haversack.kernels.decoded_tiles import matmul

        in_features = x.shape[-1]
        return matmul(
            x,
            lambda rows: self.rows(torch.arange(rows.start, rows.stop), tensors, in_features),
            out_features,
            self._row_bytes(in_features),
        )

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        import torch

        total = torch.zeros(len(index), in_features)
        for number in range(self.blocks):
            signs, up, down = (tensors[f"{number}.{name}"] for name in ("signs", "up", "down"))
            total += (
                unpack_bits(signs[index], in_features).float().mul_(-2).add_(1).mul_(up[index].float() @ down.float())
            )
        return total

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The result, one block's signs as bytes and numbers, and its magnitudes; its `up` rows, and `down` in float32."""
        return num_rows * (18 * in_features + 6 * self.rank + 64) + 4 * self.rank * in_features

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        from haversack.kernels.decoded_tiles import workspace_bytes

        tiles = workspace_bytes(self._row_bytes(in_features), num_tokens, out_features, in_features, dtype)
        return tiles + num_tokens * out_features * DTYPE_BYTES[dtype] + 4 * self.rank * in_features

    def _row_bytes(self, in_features: int) -> int:
        return 18 * in_features + 6 * self.rank + 64
