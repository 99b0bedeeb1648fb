"""Haversack: pack any LLM into the memory you have.

Importing this package costs milliseconds and has one side effect, documented in docs/design.md: a lazy hook through which
transformers finds our quantizer when, and only when, transformers itself is imported.
"""

from typing import Any

from haversack import _hook
from haversack._version import __version__

__all__ = ["__version__", "resize"]


def resize(model: Any, budget: str | int) -> int:
    """Shrink or grow a model loaded from a folder that `haversack pack --elastic` wrote, in place (`engine/elastic.py`); the bytes of
    packed weights that it holds then."""
    from haversack.engine.elastic import resize as in_place

    return in_place(model, budget)


_hook.install()
