"""Modules of a model that run something else while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from torch import nn


class Rerouted:
    """Each of some modules runs what it is given here instead of its own `forward`. As a context manager it gives the model back as it
    was; otherwise it lasts until `remove`."""

    def __init__(self, forwards: Mapping[nn.Module, Callable[..., Any]]):
        self._rerouted = tuple(forwards)
        for module, forward in forwards.items():
            module.forward = forward

    def remove(self) -> None:
        """Let the modules run as they are."""
        for module in self._rerouted:
            module.__dict__.pop("forward", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
