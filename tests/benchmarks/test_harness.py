"""The harness: rows are made once, a missing peer is an error, identical weights lose nothing, intervals are paired."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.scorer import Scorer, mean_by_text, paired_interval  # noqa: E402

from benchmarks import contest, finished_rows, goals, peer, results_file  # noqa: E402
from haversack import data  # noqa: E402


def test_a_row_is_made_once_and_survives_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_rows, "FOLDER", tmp_path)
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"kl": len(made)}

    first = finished_rows.FinishedRows("x").get(["a", 1], make)
    (tmp_path / "x.jsonl").open("a").write('["torn", {"kl"')
    again = finished_rows.FinishedRows("x")
    assert again.get(["a", 1], make) == first == {"kl": 1}
    assert again.get(["a", 2], make) == {"kl": 2}


def test_a_resumed_benchmark_counts_the_seconds_of_the_rows_it_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_rows, "FOLDER", tmp_path)
    rows = [["wanted", {}, 40.0], ["stale", {}, 500.0], ["older", {}]]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(finished_rows, "digest", lambda of: of)
    resumed = finished_rows.FinishedRows("x")
    assert resumed.get("wanted", dict) == {} and resumed.earlier_seconds == 40 and resumed.untimed_rows == 0
    assert resumed.get("older", dict) == {} and resumed.earlier_seconds == 40 and resumed.untimed_rows == 1
    assert resumed.get("new", lambda: {"kl": 1}) == {"kl": 1}
    assert resumed.earlier_seconds == 40 and resumed.untimed_rows == 1
    assert finished_rows.FinishedRows("x").rows.keys() == {"wanted", "stale", "older", "new"}


def test_a_missing_peer_is_an_error_that_names_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "ENVIRONMENTS", tmp_path)
    with pytest.raises(peer.PeerError, match="make peers-kvpress"):
        list(peer.run_peer("kvpress", [{"task": "describe"}]))


SCRIPT = f"""
import sys
sys.path.insert(0, {str(peer.SCRIPTS)!r})
from exchange import serve
serve({{"double": lambda request: {{"is": request["of"] * 2}}}}, [])
"""


def test_a_failing_peer_keeps_its_answers_and_says_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x" / "bin").mkdir(parents=True)
    (tmp_path / "x" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "x" / ".stamp").touch()
    (tmp_path / "use_x.py").write_text(SCRIPT)
    monkeypatch.setattr(peer, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peer, "SCRIPTS", tmp_path)
    answers = peer.run_peer("x", [{"task": "double", "of": 4}, {"task": "double", "of": None}])
    assert next(answers)["is"] == 8
    with pytest.raises(peer.PeerError, match=r"(?s)'of': None.*unsupported operand"):
        next(answers)


def test_results_state_their_time_and_rows_whose_time_was_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_rows, "FOLDER", tmp_path)
    monkeypatch.setattr(finished_rows, "_OPENED", [])
    monkeypatch.setattr(results_file, "RESULTS", tmp_path / "results")
    (tmp_path / "x.jsonl").write_text(
        f'["{finished_rows.digest(1)}", {{}}, 7000]\n["{finished_rows.digest(2)}", {{}}]\n'
    )
    rows = finished_rows.FinishedRows("x")
    assert rows.get(1, dict) == rows.get(2, dict) == {}
    record = json.loads(results_file.write_results("x", [{"kl": 1}]).read_text())
    assert record["seconds"] >= 7000 and record["untimed_rows"] == 1


def test_make_bench_runs_every_benchmark() -> None:
    """But for the one that is given rows to score; what serves requests is a part of others."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    listed = [
        name
        for line in makefile.splitlines()
        if line.startswith(("QUICK", "LONG", "BESIDE"))
        for name in line.split()[2:]
    ]
    sources = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    runnable = [name for name, text in sources.items() if "__main__" in text and "serve(" not in text]
    assert sorted([*listed, "published"]) == sorted(runnable)


def test_every_peer_has_a_script_pins_and_a_target() -> None:
    names = {path.stem for path in peer.SCRIPTS.glob("*.txt")}
    assert names | set(peer.LODGERS) == {path.stem.removeprefix("use_") for path in peer.SCRIPTS.glob("use_*.py")}
    assert set(peer.LODGERS.values()) <= names
    targets = (ROOT / "Makefile").read_text().split("PEERS := ", 1)[1].split("\n", 1)[0].split()
    assert names == set(targets)
    for name in names:
        for line in (peer.SCRIPTS / f"{name}.txt").read_text().splitlines():
            assert "==" in line, f"{name}: {line} is not pinned"


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(data.reference_model("b"), num_windows=2, seq_len=64)


def test_the_checkpoint_itself_loses_nothing_and_noise_does(scorer: Scorer) -> None:
    name = next(name for name, tensor in scorer.original.items() if tensor.ndim == 2)
    same = scorer.score({name: scorer.original[name]})
    noisy = scorer.score({name: scorer.original[name] + torch.randn(scorer.original[name].shape) * 0.1})
    again = scorer.score({})
    assert same["kl"] == again["kl"] and max(map(abs, same["kl"])) < 1e-6
    assert min(noisy["kl"]) > 1e-3
    assert same["nll"] == again["nll"] != noisy["nll"]


def test_other_shapes_and_names_are_refused(scorer: Scorer) -> None:
    with pytest.raises(KeyError):
        scorer.score({"model.layers.99.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="model's is"):
        scorer.score({"model.norm.weight": torch.zeros(2)})


def test_intervals_are_paired() -> None:
    rng = random.Random(0)
    noise = [rng.gauss(1, 0.5) for _ in range(24)]
    low, high = paired_interval([x + 0.01 for x in noise], noise)
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    low, high = paired_interval(noise, [rng.gauss(1, 0.5) for _ in range(24)])
    assert low < 0 < high
    assert mean_by_text([1.0, 3.0, 5.0, 7.0]) == {"foreign-prose": 2.0, "foreign-code": 6.0}


def test_the_better_of_ours_answers_a_goal_and_is_named() -> None:
    """By its least ratio over theirs; the row of another tool that failed counts for nothing."""
    plain, rounded = "haversack int4", "haversack int4, 8-bit activations"
    rows: list[dict[str, object]] = [{"case": "prefill", "contender": name} for name in (plain, rounded)]
    for name, ratios in {"llama.cpp": (0.9, 1.7), "OpenVINO": (0.6, 1.1)}.items():
        over = {ours: {"median": ratio} for ours, ratio in zip((plain, rounded), ratios, strict=True)}
        rows.append({"case": "prefill", "contender": name, "ours_over_it": over})
    rows.append({"case": "prefill", "contender": "torchao", "failed": "no"})
    assert goals._better_over_peers(rows, "prefill", 1.0) == ("1.1, 8-bit activations", True)
    assert goals._better_over_peers(rows, "prefill", 2.0, "llama.cpp") == ("1.7, 8-bit activations", False)
    without = [{**row, "ours_over_it": {plain: {"median": 1.2}}} for row in rows if row["contender"] != rounded]
    assert goals._better_over_peers(without, "prefill", 1.0) == ("1.2, 16-bit activations", True)


def test_other_peoples_processor_time_is_a_share() -> None:
    assert 0 <= results_file.busy_share() <= 1.05


@pytest.fixture(scope="module")
def auto_round_script() -> ModuleType:
    source = (peer.SCRIPTS / "use_auto_round.py").read_text()
    module = ModuleType("use_auto_round")
    sys.path.insert(0, str(peer.SCRIPTS))
    exec(source.split("\nserve(")[0], module.__dict__)
    sys.path.remove(str(peer.SCRIPTS))
    return module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_fields_are_read_back(auto_round_script: ModuleType, bits: int) -> None:
    codes = torch.randint(2**bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    stream = ((codes[..., None] >> torch.arange(bits)) & 1).reshape(5, -1, 32)
    words = (stream << torch.arange(32)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(auto_round_script.unpacked(words, bits), codes.float())


def _cap(ours: dict[str, Any], theirs: dict[str, int], best: str) -> dict[str, Any]:
    rows = [{"contender": "haversack", "planned": "at the cap", **ours}]
    return {"rows": [*rows, *({"contender": n, "peak_bytes": p} for n, p in theirs.items())], "best_other": best}


def test_a_cap_is_won_by_the_lowest_loss_or_a_tie_below_the_peak() -> None:
    theirs = {"a": 100, "b": 90}
    lowest = _cap({"peak_bytes": 100, "others_minus_ours_95": {"a": [0.01, 0.02], "b": [0.02, 0.03]}}, theirs, "a")
    tied = _cap({"peak_bytes": 80, "others_minus_ours_95": {"a": [-0.01, 0.02], "b": [0.02, 0.03]}}, theirs, "a")
    above = _cap({"peak_bytes": 81, "others_minus_ours_95": {"a": [-0.01, 0.02], "b": [0.02, 0.03]}}, theirs, "a")
    worse = _cap({"peak_bytes": 50, "others_minus_ours_95": {"a": [-0.02, -0.01], "b": [0.02, 0.03]}}, theirs, "a")
    assert goals._under_caps({"missing": [], "caps": [lowest, tied]}) == ("2 of 2", True)
    assert goals._under_caps({"missing": [], "caps": [tied, above, worse]}) == ("1 of 3", False)
    with pytest.raises(KeyError):
        goals._under_caps({"missing": ["a row"], "caps": [lowest]})


def test_losses_are_paired_by_seed_and_window() -> None:
    rng = random.Random(0)
    hard = [[rng.gauss(3, 1) for _ in range(20)] for _ in range(3)]
    ours = {"windows": dict(enumerate(hard))}
    theirs = {"windows": {seed: [loss + 0.01 + rng.gauss(0, 0.005) for loss in hard[seed]] for seed in (0, 2)}}
    low, high = contest.difference(theirs, ours)
    assert 0.005 < low < 0.01 < high < 0.015
