"""`haversack machine`: this one, named ones, and refusals."""

from __future__ import annotations

import json

from haversack.cli.app import run


def test_this_machine_is_described_without_measuring(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(["machine"]) == 0
    out = capsys.readouterr().out
    assert "cores" in out and "machine --measure" in out


def test_named_machines_are_listed_and_shown(capsys) -> None:
    assert run(["machine", "--names", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert len(names) >= 15
    for name in names:
        assert run(["machine", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == name


def test_nonsense_is_refused(capsys) -> None:
    assert run(["machine", "h1000"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert run(["machine", "h100-80gb", "--measure"]) == 2
