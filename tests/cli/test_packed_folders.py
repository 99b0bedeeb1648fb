"""Packed folders as people find them: edited, damaged, moved; and prompts that don't fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import CONTEXT_TOKENS

from allocations import peak_bytes
from haversack.plan.schema import Plan
from haversack.units import format_rate

MEASURED = {
    "residents": {"weights": 5}, "tensor_peaks": {"load": 5, "prefill": 5, "decode": 5}, "peak_private_bytes": 9,
    "imported_private_bytes": 2, "file_bytes": 3, "load_seconds": 1.0, "prefill_seconds": 1.0, "seconds_per_step": 1.0,
    "decode_tokens_per_second": 1.0, "kernels": {"k": ["as is"]}, "loop": "compiled step", "disk_read_bytes_per_second": None,
}  # fmt: skip


@pytest.fixture
def without_processes(monkeypatch):
    monkeypatch.setattr("haversack.jobs.verify._run_fresh", lambda folder, instrument: dict(MEASURED))


def append(file: Path, text: str = " ") -> None:
    file.write_bytes(file.read_bytes() + text.encode())


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


PACKED = "packed-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: (d / "config.json").unlink(), ["no config.json"]),
        (lambda d: (d / "config.json").write_text("{"), ["not packed"]),
        (lambda d: (d / "haversack.json").unlink(), ["haversack.json", "can't be read"]),
        (lambda d: append(d / "haversack.json"), ["haversack.json", "differs"]),
        (lambda d: append(d / "plan.json"), ["plan.json", "differs"]),
        (lambda d: (d / "plan.json").unlink(), ["plan.json", "can't be read"]),
        (lambda d: (d / PACKED).unlink(), ["missing"]),
        (lambda d: append(d / "model.safetensors"), ["bytes", "were packed"]),
    ],
)
def test_an_edited_folder_is_refused_before_it_loads(cli, packed, edit, words):
    edit(packed)
    for verb in (("run", packed, "--prompt", "abc"), ("verify", packed)):
        cli(*verb).refuses(*words, code=1)


def test_a_flipped_bit_is_found_by_the_whole_check(packed):
    from haversack.errors import PlanError
    from haversack.formats.packed_folder import PackedFolder

    flip_last_byte(packed / PACKED)
    folder = PackedFolder.open(packed)  # headers and lengths agree: the cheap check can't see it
    with pytest.raises(PlanError, match="1 of"):
        folder.verify()


def test_what_is_no_packed_folder(cli, source, tmp_path):
    (tmp_path / "file").write_text("x")
    for path, words in [
        (tmp_path / "nowhere", "no folder"),
        (tmp_path / "file", "no folder"),
        (tmp_path, "no config.json"),
        (source, "haversack pack"),
    ]:
        for verb in (("run", path, "--prompt", "abc"), ("verify", path)):
            cli(*verb).refuses(words, code=1)


def test_prompts_and_counts_beyond_reason(cli, packed):
    cli("run", packed, "--prompt", "").refuses("prompt is empty")
    cli("run", packed, "--prompt", " \n").refuses("prompt is empty")
    cli("run", packed, "--prompt", "a", "--max-new-tokens", "0").refuses("--max-new-tokens is 0")
    cli("run", packed, "--prompt", "a", "--cap", "8 potatoes").refuses("8 potatoes")
    cli("run", packed, "--prompt", "a", "--cap", "1KiB").refuses("1.00 KiB", "allow")
    cli("run", packed, "--prompt", "a", "--cap", "0%").refuses("0%", "at most at 100")
    cli("run", packed, "--prompt", "a", "--cap", "0.0001%").refuses("a cap of", "allow")
    ran = cli("run", packed, "--prompt", "a" * 90)
    ran.refuses("90 tokens", f"holds {CONTEXT_TOKENS - 1}", "--context", code=1)


def test_run_as_json(cli, packed):
    ran = cli("run", packed, "--prompt", "abc", "--max-new-tokens", "2", "--json")
    assert ran.code == 0 and set(ran.json) == {
        "text", "finish", "prompt_tokens", "new_tokens", "seconds_to_first_token", "tokens_per_second", "sampling", "notes",
        "peak_private_bytes", "cap_bytes", "seconds_to_load", "loop", "loop_reason",
    }  # fmt: skip
    assert ran.json["prompt_tokens"] == 3 and ran.json["new_tokens"] == 2
    more = cli("run", packed, "--prompt", "abc", "--max-new-tokens", "999", "--json").json
    cut = [note for note in more["notes"] if "999 new tokens were asked" in note and "was full after" in note]
    assert len(cut) == (more["finish"] == "length")


def test_another_models_tokenizer_is_refused(cli, packed):
    text = (packed / "tokenizer.json").read_text()
    (packed / "tokenizer.json").write_text(text.replace('"a": 3,', '"a": 999,'))
    cli("run", packed, "--prompt", "a").refuses("token 999", "has 72", code=1)
    (packed / "tokenizer.json").write_text('{"a": 1}')
    cli("run", packed, "--prompt", "a").refuses("tokenizer", code=1)


def test_verify_without_the_unpacked_model_says_so(cli, packed, without_processes):
    import haversack.jobs.quality as quality
    from haversack.errors import ModelNotFoundError

    def gone(source):
        raise ModelNotFoundError(f"There is no folder {source!r}.")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality, "describe_model", gone)
        ran = cli("verify", packed, "--json")
    assert ran.code == 0 and any("quality was not measured" in note for note in ran.json["notes"])
    assert {"within_budget", "budget_bytes", "peak_bytes", "bytes", "seconds", "figures", "kernels"} <= set(ran.json)
    step, shown = ran.json["seconds"]["decode step"], {row["what"]: row for row in ran.json["figures"]}
    assert step["predicted"] > 0 and shown["tokens/s"]["predicted"] == format_rate(1 / step["predicted"])


@pytest.mark.parametrize(("rate", "rows"), [(None, []), (2.0**31, ["2.00 GiB/s"])])
def test_verify_names_the_disks_rate_where_layers_are_streamed(cli, packed, monkeypatch, rate, rows):
    found = MEASURED | {"disk_read_bytes_per_second": rate}
    monkeypatch.setattr("haversack.jobs.verify._run_fresh", lambda folder, instrument: dict(found))
    shown = cli("verify", packed, "--json").json["figures"]
    assert [row["measured"] for row in shown if row["what"] == "disk read"] == rows


def test_all_that_loads_is_seen_by_the_allocator(packed):
    """What is read beside the building of the model is allocated where a profiler looks."""
    from transformers import AutoModelForCausalLM

    plan = Plan.read(packed / "plan.json")
    held = sum(row.stored_bytes for row in plan.weights)
    peak = peak_bytes(lambda: AutoModelForCausalLM.from_pretrained(packed))
    assert (
        held
        <= peak
        <= plan.ledger.total_bytes("load") - plan.ledger.timeline["load"].get("runtime", {}).get("device", 0)
    )


def test_verify_prints_80_columns_and_exits_1_beyond_the_budget(cli, packed, without_processes):
    MEASURED["tensor_peaks"]["decode"] = 2**30
    try:
        ran = cli("verify", packed, "--no-quality")
    finally:
        MEASURED["tensor_peaks"]["decode"] = 5
    assert ran.code == 1 and "BROKEN" in ran.out and max(map(len, ran.out.splitlines())) <= 80


def test_report(cli, packed, tmp_path, source):
    page = tmp_path / "report.html"
    ran = cli("report", packed, "-o", page, "--json")
    assert ran.code == 0 and ran.json["bytes"] == page.stat().st_size
    cli("report", source, "-o", page).refuses("not packed", code=1)
    cli("report", tmp_path / "nowhere", "-o", page).refuses("nowhere", code=1)
    cli("report", packed, "-o", tmp_path).refuses("is a folder", code=1)
    cli("report", packed / "plan.json", "-o", packed / "plan.json").refuses("is the plan itself", code=1)
    for text in ("", "[]", '{"bytes": [{}]}', json.dumps({"bytes": [], "figures": [], "prediction_hash": "other"})):
        (packed / "verified.json").write_text(text)
        cli("report", packed, "-o", page).refuses("verified.json", "haversack verify", code=1)
