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


def test_kernels_are_measured_for_packed_folders_alone(capsys, tmp_path) -> None:
    assert run(["machine", "--kernels", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert run(["machine", "h100-80gb", "--kernels", str(tmp_path)]) == 2
    assert "--kernels measures" in capsys.readouterr().err


def test_measured_kernels_are_what_runs_take(cli, packed, tmp_path, monkeypatch) -> None:
    from haversack.engine.load import open_packed
    from haversack.jobs import measure_kernels
    from haversack.jobs.measured_run import _kernels
    from haversack.kernels import registry

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measure_kernels, "MOST_TOKENS", 2)
    registry.forget_choices()
    before = _kernels(open_packed(packed))
    try:
        report = cli("machine", "--kernels", packed, "--json").json
        assert report["cases"] and {case["tokens"] for case in report["cases"]} == {1, 2}
        assert all(case["microseconds"][case["kernel"]] > 0 and case["threads"] is None for case in report["cases"])
        after = _kernels(open_packed(packed))
        assert any("(measured)" in name for name in after)
        assert not any("measured" in name for name in before) and len(after) >= len(before)
        shown = cli("machine", "--kernels", packed)
        assert shown.code == 0 and "Kept in" in shown.out and "int8" in shown.out
    finally:
        monkeypatch.undo()
        registry.forget_choices()
