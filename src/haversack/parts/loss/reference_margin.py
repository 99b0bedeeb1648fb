"""The margin between two answers over what it was before tuning, pushed up by a logistic loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.loss.preference import Preference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ReferenceMargin(Preference):
    """`-log sigmoid(m)`, `m = beta * ((c - r) - (c0 - r0))` of log-likelihoods `c`, `r` and those before tuning, `c0`, `r0`.

    The reference model is never held beside the tuned one: its figures are made once, 4 bytes per answer. Source: Rafailov et al. 2023,
    arXiv 2305.18290, equation 7; `beta` as in its experiments (appendix B).
    """

    id: ClassVar[str] = "reference-margin"
    title: ClassVar[str] = "the margin between two answers over what it was before tuning"
    source: ClassVar[Source] = Source(
        "Rafailov et al.",
        2023,
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
        "equation 7",
    )
    uses_reference: ClassVar[bool] = True

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_range(self.id, "beta", self.beta, "above 0", self.beta > 0)

    def pair_losses(
        self, log_likelihoods: torch.Tensor, num_tokens: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch.nn.functional as F

        assert reference is not None, "a reference margin needs the log-likelihoods before tuning"
        gained = log_likelihoods - reference
        margins = self.beta * (gained[:, 0] - gained[:, 1])
        return F.softplus(-margins), margins
