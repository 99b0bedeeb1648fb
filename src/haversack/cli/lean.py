"""Fewer imports for a process that makes one plan and ends, which changes what is imported and never the answer.

A third of a plan's processor time was importing what no plan uses: torch's compiler, and what transformers imports for training on many devices (DTensor,
accelerate) or for losses of other tasks (scipy). `plan_alone` does two things, once, before either is imported:

- transformers asks three questions before such imports, and keeps the answers. They are put to it while those packages are hidden, so that it keeps a no.
- torch's compiler becomes a module that runs when something is first asked of it, which nobody does: marks for it are left out.

Both rest on how two packages are written, so that they are done with versions that this was tested with and with no others, on a command line alone
(a library must not do that to its caller), and not where somebody imported either before. Then everything is imported as it will.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

TESTED = {"torch": "2.13.", "transformers": "5.23."}
"""Versions begin so. With another, `test_lean.py` fails where that is installed: look at what it imports, then say so here."""

_COMPILER = "torch._dynamo"

_QUESTIONS = ("is_torch_distributed_available", "is_accelerate_available", "is_scipy_available")
"""What transformers asks before it imports DTensor, accelerate and scipy.optimize."""

_TOLD_TO_COMPILER = ("assume_constant_result", "allow_in_graph", "disable")
"""Marks that transformers puts on functions for the compiler."""


is_own_process = False
"""Whether this process runs one verb and ends, as `haversack` does on a command line."""


def plan_alone() -> None:
    """Let torch and transformers be imported for planning alone, where that is known to be safe; else do nothing."""
    if not is_own_process or _COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        return
    import torch
    import transformers
    from transformers.utils import import_utils

    known = all(package.__version__.startswith(TESTED[package.__name__]) for package in (torch, transformers))
    if not known or _COMPILER in sys.modules:
        return
    put_off(_COMPILER, _TOLD_TO_COMPILER)
    torch.compiler.disable = _disable
    with _hidden("accelerate", "scipy"), _without_distributed(torch.distributed):
        for name in _QUESTIONS:
            question = getattr(import_utils, name)
            question.cache_clear()
            question()  # and keeps the answer


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Packages that can't be found meanwhile: None in `sys.modules` says that there is no such module."""
    before = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def _without_distributed(distributed: ModuleType) -> Iterator[None]:
    is_available = distributed.is_available
    distributed.is_available = lambda: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        distributed.is_available = is_available  # type: ignore[attr-defined]


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
