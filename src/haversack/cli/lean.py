"""Imports that a process does without which only plans: torch's compiler, torch.distributed inside transformers, accelerate, scipy's share of transformers.

They take a third of the processor time of a plan, and nothing that is traced needs them. What is put off is imported when it is first asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"

_NOT_NEEDED = ("is_torch_distributed_available", "is_accelerate_available", "is_scipy_available")
"""What transformers asks before it imports DTensor, accelerate and scipy.optimize, which a plan of one process has no use for."""


_TOLD_TO_COMPILER = ("assume_constant_result", "allow_in_graph", "disable")
"""Marks that transformers puts on functions for the compiler, and that are left out where nothing will be compiled."""


is_own_process = False
"""Whether this process runs one verb and ends, as `haversack` does on a command line."""


def plan_alone() -> None:
    """Import torch and transformers for planning alone: transformers is told that there is no torch.distributed and no accelerate, functions are not
    marked for the compiler. Does nothing in a process that is not our own, or where either was imported before."""
    if not is_own_process or _COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        return
    import torch
    from transformers.utils import import_utils

    answers: list[Any] = [getattr(import_utils, name, None) for name in _NOT_NEEDED]
    known = all(hasattr(answer, "cache_clear") for answer in answers) and hasattr(import_utils, "_is_package_available")
    if _COMPILER in sys.modules or not known:  # another torch, or another transformers, which imports as it will
        return
    put_off(_COMPILER, _TOLD_TO_COMPILER)
    torch.compiler.disable = _disable
    with (
        _Instead(torch.distributed, "is_available", lambda: False),
        _Instead(import_utils, "_is_package_available", lambda name, return_version=False: (False, "0")),
    ):
        for answer in answers:  # each keeps its first answer
            answer.cache_clear()
            answer()


def put_off(package: str, marks: Sequence[str] = ()) -> None:
    """Let `package` be imported without running it until something beside its submodules, and `marks` that return their function, is
    asked of it."""
    parent, _, name = package.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"no package {package}"
    module = importlib.util.module_from_spec(spec)

    def run_and_get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if importlib.util.find_spec(f"{package}.{attribute}") is not None:
            return importlib.import_module(f"{package}.{attribute}")
        del module.__dict__["__getattr__"]
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return getattr(module, attribute)

    module.__dict__["__getattr__"] = run_and_get
    module.__dict__.update(dict.fromkeys(marks, _unmarked))
    sys.modules[package] = module
    setattr(sys.modules[parent], name, module)


def _unmarked(fn: Any, *args: object, **kwargs: object) -> Any:
    return fn


def _disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """`torch.compiler.disable`, which imports the compiler with the function's first call instead of its definition."""
    import torch

    return torch._disable_dynamo(fn, recursive)


class _Instead:
    """Something else under a module's name while the block runs."""

    def __init__(self, module: ModuleType, name: str, value: Any):
        self._module, self._name, self._value = module, name, value

    def __enter__(self) -> None:
        self._before = getattr(self._module, self._name)
        setattr(self._module, self._name, self._value)

    def __exit__(self, *error: object) -> None:
        setattr(self._module, self._name, self._before)
