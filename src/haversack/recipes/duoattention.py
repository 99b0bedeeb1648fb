"""DuoAttention: retrieval heads keep every token, the others sinks and a recent window."""

from __future__ import annotations

from haversack.errors import DoesNotFitError
from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import SINK_TOKENS, CacheBudget, Options

WINDOW_TOKENS = (256, 128, 64, 32, 16)
"""Of streaming heads: the longest that leaves room for a retrieval head more is not known beforehand, so that all are tried."""


def whole_cache(budget: CacheBudget, whole: KVOption = KVOption()) -> Options:  # noqa: B008
    """As many whole heads as fit, those first whose loss costs the answers most; then the longest window for the others. `whole` heads hold every token.

    Differs from the source in how heads are told apart: no gates are trained, each KV head's damage when it streams is measured.
    """
    assert budget.statistics is not None
    damage = budget.statistics.head_damage
    order = sorted(
        ((layer, head) for layer, row in enumerate(damage) for head in range(len(row))),
        key=lambda at: -damage[at[0]][at[1]],
    )

    def with_whole(count: int, window_tokens: int) -> Options:
        retrieval, streaming = set(order[:count]), KVOption(score=SinksAndWindow(SINK_TOKENS, window_tokens))
        return tuple(
            by_head([whole if (i, head) in retrieval else streaming for head in range(site.num_kv_heads)])
            for i, site in enumerate(budget.sites)
        )

    found: list[tuple[int, int, Options]] = []
    for window_tokens in WINDOW_TOKENS:
        try:
            options = budget.largest(lambda n: with_whole(n - 1, window_tokens), len(order) + 1)  # noqa: B023
        except DoesNotFitError:
            continue
        found.append((sum(o == whole or whole in o.heads for o in options), window_tokens, options))
    if not found:
        return budget.largest(lambda n: with_whole(0, WINDOW_TOKENS[-1]), 1)
    return max(found, key=lambda row: row[:2])[2]


RECIPE = Recipe(
    id="duoattention",
    resident="kv",
    title="heads that find things again keep every token, the others sinks and a recent window",
    source=Source(
        "Xiao, Tang, Zuo, Guo, Yang, Tang, Fu and Han",
        2024,
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        "2410.10819",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    needs_statistics=True,
    published="memory up to 2.55 times less with full heads, 1.67 with grouped ones (abstract)",
    catalogue=("duoattention",),
)
