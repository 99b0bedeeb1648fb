"""The margin between two answers per token, pushed above a target by a logistic loss: no reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.loss.preference import Preference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LengthMargin(Preference):
    """`-log sigmoid(m - gamma) + likelihood * nats`, `m = beta * (c / |c| - r / |r|)` of log-likelihoods per token, and `nats` the
    chosen answer's own loss per token.

    Nothing is held for it. Source: Tang et al. 2024, arXiv 2410.18533, its loss and the likelihood that keeps the model from
    unlearning, after Meng et al. 2024, arXiv 2405.14734, whose released settings for Llama 3 Instruct (v0.2) `beta` and `gamma` are; `likelihood` is a
    choice. Differs in
    that a prompt has one rejected answer, and positions stay those of the data.
    """

    id: ClassVar[str] = "length-margin"
    title: ClassVar[str] = "the margin between two answers per token, above a target"
    source: ClassVar[Source] = Source(
        "Tang, Sun, Li, Zhu and Zhang",
        2024,
        "LOGO: Long cOntext aliGnment via efficient preference Optimization",
        "2410.18533",
    )
    uses_reference: ClassVar[bool] = False

    beta: float = 10.0
    gamma: float = 3.0
    likelihood: float = 0.1

    def __post_init__(self) -> None:
        check_range(self.id, "beta", self.beta, "above 0", self.beta > 0)
        check_range(self.id, "gamma", self.gamma, "0 or more", self.gamma >= 0)
        check_range(self.id, "likelihood", self.likelihood, "0 or more", self.likelihood >= 0)

    def pair_losses(
        self, log_likelihoods: torch.Tensor, num_tokens: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch.nn.functional as F

        per_token = log_likelihoods / num_tokens
        margins = self.beta * (per_token[:, 0] - per_token[:, 1])
        return F.softplus(self.gamma - margins) - self.likelihood * per_token[:, 0], margins
