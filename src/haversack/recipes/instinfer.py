"""InstInfer: keys and values stay in a drive that attends to them; only queries and outputs cross its link. Simulated."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.elsewhere import Elsewhere
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="instinfer",
    resident="kv",
    title="keys and values in a drive that attends to them, so that only queries and outputs cross its link (simulated)",
    source=Source(
        "Pan, Li, Li, Liang, Shan, Zhou, Luo, Wang and Zhang",
        2024,
        "InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference",
        "2409.04992",
    ),
    options=lambda: (KVOption(represent=Elsewhere()),),
    candidates=False,
    published="up to 11.1 times the throughput of SSD-based FlexGen, a 13B model on an A6000 (abstract)",
    catalogue=("instinfer",),
)
