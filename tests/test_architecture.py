"""The listing is the architecture: imports point one way, parts of different families never meet, start-up is instant."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import haversack

ROOT = Path(haversack.__file__).parent
ORDER = (
    ("errors", "units", "cache", "ledger", "_version"),
    ("describe",),
    ("codecs", "kernels"),
    ("parts",),
    ("recipes",),
    ("formats",),
    ("data", "probes", "samples"),
    ("engine",),
    ("cost",),
    ("solve",),
    ("plan",),
    ("jobs",),
    ("report",),
    ("cli",),
)
"""Rooms from the ground up. `cost` builds the solver's problem, so it may name the types in `solve.problem`."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
EXCEPTIONS = {("cost", "haversack.solve.problem"), ("_hook", "haversack.engine.quantizer")}


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [
                f"{node.module}.{alias.name}" if node.module == "haversack" else node.module for alias in node.names
            ]
    return [name for name in names if name.startswith("haversack.")]


def _modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem in LEVEL]


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in _imports(path):
        other = name.split(".")[1]
        if (room, name) in EXCEPTIONS or other == room:
            continue
        assert other in LEVEL, f"{path} imports {name}, a room that the order does not know"
        assert LEVEL[other] <= LEVEL[room], f"{room} may not import {name}: it lies above"


def test_every_room_is_in_the_order() -> None:
    rooms = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - set(LEVEL) <= {"__init__", "__main__", "_hook", "__pycache__"}


def test_families_of_parts_never_meet() -> None:
    for path in (ROOT / "parts").rglob("*.py"):
        family = path.relative_to(ROOT / "parts").parts[0]
        for name in _imports(path):
            pieces = name.split(".")
            if pieces[1] == "parts" and len(pieces) > 2:
                assert pieces[2] in (family, "base"), f"{path} imports {name}"


def test_no_module_is_called_utils() -> None:
    assert not [path for path in ROOT.rglob("*.py") if "util" in path.stem]


def _cpu_seconds(code: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, *code.split(" ", 1)] if code.startswith("-m") else [sys.executable, "-c", code],
                   check=True, capture_output=True)  # fmt: skip
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize(
    "code", ["import haversack", "from haversack.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"]
)
def test_start_up_is_instant(code: str) -> None:
    """Under 0.3 s of CPU time; the best of three, since other work on the machine inflates CPU time too."""
    assert min(_cpu_seconds(code) for _ in range(3)) < 0.3


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, haversack; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_finds_the_quantizer_whichever_is_imported_first() -> None:
    for first in ("import haversack, transformers.quantizers.auto", "import transformers.quantizers.auto, haversack"):
        code = f"{first}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\nassert 'haversack' in m"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_listed_without_torch() -> None:
    code = "import sys\nfrom haversack.recipes.base import list_methods\nassert list_methods() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
