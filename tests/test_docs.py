"""The documentation is what its programs would write: real outputs, methods, file map, and links that lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(generate: ModuleType) -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in generate.pages().items() if path.read_text() != text]
    assert not stale, f"run `make docs`: {stale}"


def test_the_time_of_all_benchmarks_is_told_from_their_results(generate: ModuleType) -> None:
    stored = [{"name": "kernels", "seconds": 1800}, {"name": "kv", "seconds": 5400}, {"name": "plans"}]
    stored.append({"name": "published", "seconds": 10**6})  # not of `make bench`
    first, untimed, missing = generate._total_time(stored)
    assert "Results of 3 are stored; 2 of them say how long they took: 2.0 hours together" in first
    assert "`make bench-quick` takes 30 minutes" in first
    assert untimed == "Stored before times were, so that their next run will say: plans."
    assert "weights" in missing and "plans" not in missing and "published" not in missing


def test_every_module_is_named_once(generate: ModuleType) -> None:
    package = ROOT / "src" / "haversack"
    named = re.findall(r"^- `([\w/]+\.py)`: (.*)$", (ROOT / "docs" / "files.md").read_text(), re.MULTILINE)
    inside = [name for name, _ in named if not name.startswith(("reference/", "benchmarks/", "docs/"))]
    assert sorted(inside) == sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))
    assert all(len(line) > 10 for _, line in named)


def test_every_method_is_named(generate: ModuleType) -> None:
    from haversack.recipes.base import list_methods

    page = (ROOT / "docs" / "methods.md").read_text()
    assert list_methods()
    assert not [row["id"] for row in list_methods() if f"| `{row['id']}` |" not in page]


def test_the_shown_diff_of_a_method_is_whole(generate: ModuleType, tmp_path: Path) -> None:
    """Without the shown files the package lists all other methods, and the generated pages lack the shown lines alone."""
    shown = generate.METHOD.search((ROOT / "docs" / "adding.md").read_text())
    assert shown is not None
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.safetensors", "*.txt", "__pycache__")
    )
    for name in ("docs", "reference", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in shown["paths"].split():
        (tmp_path / path).unlink()
    code = (
        "import runpy, sys, json, pathlib; g = runpy.run_path(sys.argv[1]); root = pathlib.Path.cwd();"
        "g['files_page'].__globals__['ROOT'] = root; print(json.dumps([g['methods_page'](), g['files_page']()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "docs" / "generate.py")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    added = [line[1:] for line in shown[0].splitlines() if line.startswith("+")]
    for without, page in zip(json.loads(done.stdout), ("methods.md", "files.md"), strict=True):
        now = (ROOT / "docs" / page).read_text().splitlines()
        assert len(now) > len(without.splitlines())
        assert [line for line in now if line not in added] == [
            line for line in without.splitlines() if line not in added
        ]


def test_readme_is_short_and_shows_the_picture() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert "](docs/pictures/memory.svg)" in readme


def test_the_picture_stands_alone() -> None:
    text = (ROOT / "docs" / "pictures" / "memory.svg").read_text()
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in text and "href" not in text
    assert "budget" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "docs" / "outputs").glob("*"))], ids=lambda path: path.name)
def test_no_private_paths(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp)/", path.read_text()), path


def test_every_stored_output_belongs_to_a_command(generate: ModuleType) -> None:
    stored = {path.stem for path in (ROOT / "docs" / "outputs").glob("*.txt")}
    assert stored <= set(generate.COMMANDS), stored - set(generate.COMMANDS)
    for name in stored:
        first = (ROOT / "docs" / "outputs" / f"{name}.txt").read_text().splitlines()[0]
        assert first == f"$ {generate.COMMANDS[name]}", name


def test_every_shown_command_exists() -> None:
    """Options written in the documentation are options of the verb."""
    from typer.main import get_command

    from haversack.cli.app import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for page in PAGES:
        for verb, rest in re.findall(
            r"haversack (plan|pack|run|verify|eval kv|report|methods)\b([^\n`|]*)", page.read_text()
        ):
            command = verbs["eval"].commands["kv"] if verb == "eval kv" else verbs[verb]
            known = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
            unknown = set(re.findall(r"(?<!\S)(--[a-z-]+|-[a-z])\b", rest)) - known - {"--help"}
            assert not unknown, f"{page.name}: haversack {verb} has no {unknown}"


def test_the_design_states_the_order_that_tests_enforce() -> None:
    from test_architecture import ORDER

    stated = re.search(r"`(errors, units.*?)`", (ROOT / "docs" / "design.md").read_text())
    assert stated is not None
    rooms = [tuple(room.strip() for room in level.split(",")) for level in stated[1].split("->")]
    assert rooms == [tuple(name for name in level if not name.startswith("_")) for level in ORDER]
