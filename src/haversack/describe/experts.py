"""Experts of which each token uses a few: how many there are, and what share of them a step reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
"""Hugging Face's names of how many experts a token uses."""


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """How many experts a token uses, beside shared ones; None where the config names none."""
    values = (config.get(name) for name in _PER_TOKEN)
    return next((n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def share_of_experts(num_experts: int, per_token: int | None, num_tokens: int) -> float:
    """The expected share of a layer's experts that `num_tokens` use at least once, if each chooses `per_token` at random.

    `1 - (1 - k/E)^t`; real routers choose less evenly, so that it is an upper estimate. 1 where `per_token` is not known.
    """
    if per_token is None or per_token >= num_experts:
        return 1.0
    return 1.0 - (1.0 - per_token / num_experts) ** num_tokens
