"""Haversack: pack any LLM into the memory you have.

Importing this package costs milliseconds and has one side effect, documented in docs/design.md: a lazy hook through which
transformers finds our quantizer when, and only when, transformers itself is imported.
"""

from haversack import _hook
from haversack._version import __version__

__all__ = ["__version__"]

_hook.install()
