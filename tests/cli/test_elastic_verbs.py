"""`pack --elastic`: one folder at any budget, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import Ran, pack_command

from haversack.describe.model import describe_model
from haversack.formats.packed_folder import PackedFolder
from haversack.jobs.measured_run import measure_tensors
from haversack.plan.schema import Plan


@pytest.fixture(scope="module")
def elastic(source: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from haversack.cli.app import run

    folder = tmp_path_factory.mktemp("elastic") / "packed"
    assert run(pack_command(source, folder, calibration_text, "--elastic", budget="1GiB")) == 0
    return folder


def plan_of(folder: Path) -> Plan:
    return Plan.from_json(PackedFolder.open(folder).plan_text)


def test_a_folder_runs_and_verifies_at_a_budget(cli, elastic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted at a size between is what is counted on storages there, resident by resident."""
    from haversack.describe.machine import known
    from haversack.plan.elastic import plan_at

    plan = plan_of(elastic)
    number = len(plan.elastic.blocks) // 2
    budget = plan.elastic.blocks[number - 1].peak_bytes
    ran = cli("run", elastic, "--prompt", "abc", "--max-new-tokens", "3", "--budget", str(budget), "--json")
    assert ran.code == 0 and ran.json["new_tokens"] == 3
    at = plan_at(plan, describe_model(elastic_source(plan)), known(), number)
    measured = measure_tensors(elastic, budget)
    owners = at.prediction.timeline["decode"]
    assert {name: owners[name]["device"] for name in measured["residents"]} == measured["residents"]
    monkeypatch.setattr(
        "haversack.jobs.verify._run_fresh",
        lambda folder, instrument, budget=None: {**measured, **FIGURES},
    )
    report = cli("verify", elastic, "--budget", str(budget + 1), "--no-quality", "--json").json
    assert report["within_budget"] and report["budget_bytes"] == budget + 1
    rows = {row["what"]: (row["predicted"], row["measured"]) for row in report["bytes"]}
    assert rows["weights"] == (owners["weights"]["device"],) * 2


def elastic_source(plan: Plan) -> str:
    return plan.model.source


FIGURES = {
    "tensor_peaks": {"decode": 1}, "peak_private_bytes": 1, "imported_private_bytes": 0, "loaded_private_bytes": 0, "file_bytes": 0, "load_seconds": 1.0, "prefill_seconds": 1.0,
    "decode_tokens_per_second": 1.0, "seconds_per_step": 1.0, "kernels": {}, "loop": "transformers", "disk_read_bytes_per_second": None,
}  # fmt: skip


def test_what_it_says_and_goes_on_from(
    cli, source: Path, calibration_text: Path, tmp_path: Path, elastic: Path
) -> None:
    signs = pack_command(
        source, tmp_path / "signs", calibration_text, "--elastic", "--recipe", "bitstack", budget="1GiB"
    )
    ran: Ran = cli(*signs)
    assert ran.code == 0 and "It can be held at any peak from" in ran.out and "--budget" in ran.out
    assert plan_of(tmp_path / "signs").elastic.floor_blocks == 1
    without = pack_command(source, tmp_path / "all", calibration_text, "--elastic", "--json")
    del without[without.index("--tensor-budget") : without.index("--tensor-budget") + 2]
    whole = cli(*without).json
    assert whole["plan"]["budget"]["num_bytes"] is None
    assert len(whole["plan"]["elastic"]["blocks"]) == len(plan_of(elastic).elastic.blocks)


def test_nonsense_is_refused(
    cli, source: Path, packed: Path, calibration_text: Path, tmp_path: Path, elastic: Path
) -> None:
    floor = plan_of(elastic).elastic.floor_peak_bytes
    for verb in (("run", elastic, "--prompt", "abc"), ("verify", elastic, "--no-quality")):
        cli(*verb, "--budget", str(floor - 1)).refuses("at least", "short", code=1)
        cli(*verb, "--budget", "much").refuses("much")
    cli("run", packed, "--prompt", "abc", "--budget", "1GiB").refuses("--elastic")
    cli("verify", packed, "--budget", "1GiB").refuses("--elastic")
    for more, words in (
        (("--recipe", "gptq"), ["any-precision or bitstack"]),
        (("--retune", "1"), ["--retune", "--elastic"]),
        (("--max-damage", "0.1"), ["--max-damage"]),
        (("--placement", "streamed"), ["--placement streamed"]),
    ):
        cli(*pack_command(source, tmp_path / "no", calibration_text, "--elastic", *more)).refuses(*words)
    small = pack_command(source, tmp_path / "no", calibration_text, "--elastic", budget="60KiB")
    cli(*small).refuses("60.0 KiB", "short", code=1)
    assert not list(tmp_path.glob("no*"))
