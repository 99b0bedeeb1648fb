"""A small part of what `make fuzz` runs by the thousand, and everything that it ever found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.fuzz import CORPUS, Fuzzer


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_mutants_raise_only_our_own_errors(fuzzer):
    assert [found[0] for seed in range(225) if (found := fuzzer.run(seed))] == []


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*.json")), ids=lambda file: file.stem)
def test_what_once_surprised(fuzzer, file: Path):
    case = json.loads(file.read_text())
    assert fuzzer.problem(case["kind"], case["mutant"]) is None
