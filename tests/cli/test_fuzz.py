"""A small part of what `tests.cli.fuzz` runs by the thousand."""

from __future__ import annotations

from tests.cli.fuzz import Fuzzer


def test_mutants_raise_only_our_own_errors(tmp_path):
    fuzzer = Fuzzer(tmp_path)
    assert [text for seed in range(200) if (text := fuzzer.run(seed))] == []
