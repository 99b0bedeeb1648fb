"""Token weighting: tokens that get much attention count more in the statistics that a rounding works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.errors import UsageError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source
from haversack.parts.weights.base import Grid, Transform, WeightTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenWeighting(Transform):
    """Puts statistics of tokens weighed by the attention they get in place of those of all tokens alike; stores nothing.

    For embeddings and heads, which lie in no layer, all tokens count alike. Error: none of its own: the product is unchanged. Source: Sung et
    al. 2025 (arXiv 2503.01820, section 4); how tokens are weighed is in `engine/token_weights.py`.
    """

    id: ClassVar[str] = "token-weighting"
    title: ClassVar[str] = "statistics of tokens weighed by attention"
    source: ClassVar[Source | None] = Source(
        "Sung, Yadav, Li, Yoon, Bansal",
        2025,
        "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
        "2503.01820",
        "section 4",
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "attended"})
    lossless: ClassVar[bool] = True

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return ()

    def apply(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        if task.attended is None:
            raise UsageError(
                f"{self.id} needs statistics of tokens weighed by attention, and this site has none; calibrate with a "
                "recipe that asks for them."
            )
        task.hessian = task.attended
        return {}

    def transform_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x

    def restore_rows(self, rows: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rows

    def workspace_bytes(self, num_tokens: int, in_features: int, dtype: str) -> int:
        return 0
