"""The one side effect of `import haversack`: transformers learns our quantizer when, and only when, it is imported itself.

A finder waits for `transformers.quantizers.auto`; once that module has run, the quantizer registers and the finder is gone.
If transformers was imported first, it registers at once. Nothing is patched.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


class _Finder:
    """A meta path finder for one module, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    importlib.import_module("haversack.engine.quantizer")


def install() -> None:
    """Wait for transformers, or register now if it is there."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
