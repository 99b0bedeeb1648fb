"""What is asked: budgets, lengths, machines, bounds; and the answers' shape."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import WORKLOAD

from haversack.cli import console

B = ("--tensor-budget", "260KiB")
PLAN_KEYS = {
    "fits", "budget_bytes", "budget_kind", "peak_bytes", "peak_time_point", "shortfall_bytes", "cheapest_change",
    "timeline", "damage", "seconds", "sites", "prediction_hash", "plan", "operators", "per_million_tokens",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["no budget", "--max-damage"]),
        (["--budget", "0"], ["'0'", "above zero", "8GiB"]),
        (["--budget", "-3GiB"], ["'-3GiB'", "8GiB"]),
        (["--budget", "8 potatoes"], ["'8 potatoes'", "8GiB"]),
        (["--budget", ""], ["''", "8GiB"]),
        (["--budget", "nan"], ["'nan'", "8GiB"]),
        (["--budget", "0%"], ["'0%'", "at most at 100"]),
        (["--budget", "150%"], ["'150%'", "at most at 100"]),
        (["--budget", "1GiB", "--tensor-budget", "1GiB"], ["--budget and --tensor-budget"]),
        (["--max-damage", "-1"], ["-1 nats", "at least 0"]),
        (["--max-damage", "nan"], ["nan nats", "at least 0"]),
        ([*B, "--min-tokens-per-second", "-1"], ["-1", "above 0"]),
        ([*B, "--context", "65"], ["65 positions", "has 64"]),
        ([*B, "--context", "0"], ["--context is 0", "from 1"]),
        ([*B, "--prompt-tokens", "-10"], ["--prompt-tokens is -10", "from 1"]),
        ([*B, "--generate-tokens", "-1"], ["--generate-tokens is -1", "from 0"]),
        ([*B, "--users", "0"], ["--users is 0", "from 1"]),
        ([*B, "--users", "9" * 30], ["--users is 999", "1,000,000"]),
        ([*B, "--users", "1.5"], ["'--users'", "--help"]),
        ([*B, "--context", "20", "--prompt-tokens", "30"], ["--prompt-tokens 30", "--context says 20"]),
        (
            [*B, "--context", "20", "--prompt-tokens", "10", "--generate-tokens", "5"],
            ["10", "5 make 15", "--context says 20"],
        ),
        ([*B, "--placement", "moon"], ["'moon'", "streamed"]),
        ([*B, "--machine", "h1000"], ["'h1000'", "h100-80gb"]),
        ([*B, "--machine", "nofile.json"], ["no machine file 'nofile.json'"]),
        ([*B, "--potatoes"], ["--potatoes", "--help"]),
        ([*B, "--recipe", "gptx"], ["no recipe 'gptx'", "did you mean 'gptq'?"]),
        ([*B, "--recipe", "gptq", "--recipe", ""], ["no recipe ''", "haversack methods", "adaquant to zipcache"]),
        (["--task", "tune", *B, "--recipe", "gptq"], ["--recipe", "--task"]),
        (
            ["--task", "tune", *B, "--with", "saved=tokens", "--with", "recompute=full"],
            ["saved is 'tokens'", "choose one of them"],
        ),
        (["--task", "tune", *B, "--with", "saved=tokens"], ["the model has 2", "keep activations as they are"]),
        (["--task", "tune", *B, "--with", "saved=resting"], ["saved is 'resting' with method lora", "method full"]),
        (
            ["--task", "tune", *B, "--with", "saved=reversible", "--with", "lora_dropout=0.1"],
            ["'reversible' with lora_dropout 0.1", "leave it at 0"],
        ),
        (
            ["--task", "train", *B, "--with", "saved=resting", "--with", "update=backward"],
            ["update is 'backward' with saved 'resting'", "choose update step"],
        ),
        (["--task", "tune", *B, "--with", "precision=int8"], ["precision is 'int8' with method lora", "method full"]),
        (["--task", "train", *B, "--with", "precision=int9"], ["precision is 'int9'", "rotated8, int8"]),
        ([*B, "--batch", "8"], ["--batch was given", "--users"]),
        ([*B, "--with", "optimizer=sgdm"], ["--with was given", "--task tune and train"]),
        ([*B, "--evaluations", "2"], ["--evaluations", "add --calibrate"]),
        ([*B, "--calibration", "no-such-text"], ["no-such-text", "No such file"]),
        ([*B, "--calibration-tokens", "0", "--calibration", "x"], ["--calibration-tokens is 0", "at least 2"]),
    ],
)
def test_nonsense_is_refused_in_a_sentence(cli, source, options, words):
    cli("plan", source, *options).refuses(*words)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "[" * 100_000, '{"name": 3}', '{"name": "x", "cores": -1, "memory_bytes": 1}',
        '{"name":"x","cores":1,"memory_bytes":9,"available_bytes":10}',
        '{"name":"x","cores":0,"memory_bytes":0,"available_bytes":0,"devices":[{"name":"y","memory_bytes":9,'
        '"available_bytes":9,"read_bytes_per_second":"fast"}]}',
    ],
)  # fmt: skip
def test_a_broken_machine_file_is_refused(cli, source, tmp_path, text):
    file = tmp_path / "machine.json"
    file.write_text(text)
    cli("plan", source, *B, "--machine", file).refuses()


def test_above_need_everything_stays_as_it_is(cli, source):
    ran = cli("plan", source, "--tensor-budget", "10GiB", *WORKLOAD, "--json")
    assert ran.code == 0 and set(ran.json) == PLAN_KEYS
    assert all(site["option"] in ({}, {"represent": {"part": "kv.plain"}}) for site in ran.json["sites"])
    assert ran.json["damage"]["nats"] == 0


def test_below_need_the_answer_says_what_is_short_and_what_would_do(cli, source, tmp_path):
    output = tmp_path / "plan.json"
    ran = cli("plan", source, "--tensor-budget", "10KiB", *WORKLOAD, "--json", "-o", output)
    answer = ran.json
    assert ran.code == 1 and set(answer) == PLAN_KEYS and answer["fits"] is False
    assert answer["shortfall_bytes"] == answer["peak_bytes"] - answer["budget_bytes"] > 0
    assert "would do" in answer["cheapest_change"] and "KiB short" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_another_bound_than_bytes_is_named(cli, source):
    ran = cli("plan", source, "--tensor-budget", "9MiB", *WORKLOAD, "--min-tokens-per-second", "1e12")
    assert ran.code == 1 and "1e+12 tokens/s" in ran.out and "0 B short" not in ran.out


def test_the_question_turned_round(cli, source):
    exact, lossy = (cli("plan", source, "--max-damage", d, *WORKLOAD, "--json").json for d in ("0", "0.5"))
    assert exact["fits"] and exact["damage"]["nats"] == 0 and exact["budget_bytes"] is None
    assert lossy["fits"] and lossy["peak_bytes"] < exact["peak_bytes"]


def test_a_recipe_restricts_what_is_offered(cli, source, calibration_text):
    """The weights get that recipe's options, or stay as they are; caches may have any."""
    more = ("--calibration", calibration_text, "--calibration-tokens", "256", "--evaluations", "0")
    ran = cli("plan", source, "--tensor-budget", "260KiB", *WORKLOAD, *more, "--recipe", "k-quants", "--json")
    assert ran.code == 0, ran.err
    grids = [row["option"]["grid"]["part"] for row in ran.json["sites"] if "role" in row and row["option"]]
    assert grids and set(grids) == {"codebook"}
    assert ran.json["plan"]["recipes"] == ["k-quants"]


def test_a_recipe_without_published_figures_is_planned_with_unknown_damage(cli, source):
    ran = cli("plan", source, "--tensor-budget", "260KiB", *WORKLOAD, "--recipe", "nf4", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["damage"]["label"] == "unknown" and ran.json["damage"]["nats"] is None
    assert {row["option"]["grid"]["values"] for row in ran.json["sites"] if "role" in row and row["option"]} == {"nf4"}
    note = cli("plan", source, "--tensor-budget", "260KiB", *WORKLOAD, "--recipe", "dfloat11")
    assert note.code == 1 and "only the weights themselves say" in " ".join(note.out.split())


def test_the_same_question_has_the_same_answer(cli, source):
    first, second = (cli("plan", source, *B, *WORKLOAD, "--json").json for _ in range(2))
    for answer in (first, second):
        answer["plan"]["solve"].pop("seconds")
    assert first == second


def test_output_fits_80_columns(cli, source, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for options in (B, ("--tensor-budget", "10KiB"), ("--budget", "60%")):
        ran = cli("plan", source, *options, *WORKLOAD)
        assert "\x1b" not in ran.out and ran.err == ""
        assert max(map(len, ran.out.splitlines())) <= 80, ran.out


def test_an_unwritable_plan_is_told_before_work(cli, source, tmp_path):
    (tmp_path / "file").write_text("")
    cli("plan", source, *B, "-o", tmp_path / "file" / "plan.json").refuses("is a file", "another output", code=1)
    cli("plan", "no-such-model", *B, "-o", tmp_path).refuses("is a folder", "name a file", code=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_older_plan_and_promises_no_resuming(cli, source, tmp_path, monkeypatch):
    plan = tmp_path / "plan.json"
    plan.write_text("older")

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    ran = cli("plan", source, *B, *WORKLOAD, "-o", plan)
    ran.refuses("needs", "free some space or choose another output.", code=1)
    assert plan.read_text() == "older" and list(tmp_path.iterdir()) == [plan]


def test_a_narrow_window_is_kept_to(cli, source, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for verb in (
        ("plan", source, *B, *WORKLOAD),
        ("plan", source, "--tensor-budget", "10KiB", *WORKLOAD),
        ("methods",),
    ):
        out = cli(*verb).out
        assert max(map(len, out.splitlines())) <= 40, out


def test_bold_is_left_out_where_nobody_wants_it(cli, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "_is_terminal", lambda: True)
    monkeypatch.setattr(console.typer, "echo", print)  # which keeps the codes that a terminal gets
    assert "\x1b[1mid" in cli("methods").out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert "\x1b" not in cli("methods").out


def test_methods_and_plain_calls(cli):
    rows = cli("methods", "--json").json
    assert {"id", "kind", "resident", "title", "source", "catalogue"} == set(rows[0])
    assert max(map(len, cli("methods").out.splitlines())) <= 80
    assert cli().code == 0 and cli("--version").code == 0
    cli("frobnicate").refuses("frobnicate", "--help")
    cli("plan").refuses("MODEL", "--help")


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m haversack methods --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[", "")


@pytest.mark.parametrize("shell", ["{} | head -c 1", "{} --json | head -c 1", "{} >&-"])
@pytest.mark.long
def test_an_answer_keeps_its_exit_code_when_nobody_reads_it(source, shell):
    verb = f"{sys.executable} -m haversack plan {source} --tensor-budget 10KiB --context 24"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.format(verb)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 1 and done.stderr == ""


def test_a_defect_is_one_line_too(cli, source, monkeypatch):
    monkeypatch.delenv("HAVERSACK_TRACEBACK")
    monkeypatch.setattr("haversack.plan.make.make_plan", lambda *a: {}["gone"])
    cli("plan", source, *B).refuses("defect", "KeyError", "HAVERSACK_TRACEBACK=1", code=1)
    monkeypatch.setattr("haversack.plan.make.make_plan", lambda *a: (_ for _ in ()).throw(OSError(28, "No space", "x")))
    cli("plan", source, *B).refuses("x: No space", code=1)
    monkeypatch.setattr("haversack.plan.make.make_plan", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    cli("plan", source, *B).refuses("interrupted", code=130)


def test_json_is_strict(cli, source):
    json.loads(cli("plan", source, *B, *WORKLOAD, "--json").out, parse_constant=pytest.fail)


def test_what_fits_without_loss_loses_nothing(cli, bf16_source, calibration_text, tmp_path):
    """Between the size of its codes and its own, a bfloat16 model is coded, not rounded; nobody calibrates."""
    whole = cli("plan", bf16_source, "--tensor-budget", "1GiB", *WORKLOAD, "--json").json
    weights = sum(row["stored_bytes"] for row in whole["sites"] if "role" in row)
    budget = str(whole["peak_bytes"] - weights // 6)
    out = tmp_path / "coded"
    ran = cli(
        "pack",
        bf16_source,
        "-o",
        out,
        "--tensor-budget",
        budget,
        *WORKLOAD,
        "--calibration",
        calibration_text,
        "--json",
    )
    assert ran.code == 0, ran.err
    assert ran.json["damage"]["nats"] == 0 and ran.json["peak_bytes"] <= int(budget)
    parts = {row["option"]["code"]["part"] for row in ran.json["sites"] if "role" in row and row["option"]}
    assert parts == {"entropy-coded"}
    from transformers import AutoModelForCausalLM

    from haversack.engine import attention

    attention.register()
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(bf16_source, dtype="auto", attn_implementation=attention.NAME)(ids)
        ours = AutoModelForCausalLM.from_pretrained(out, dtype="auto")(ids)
    assert ours.logits.dtype == torch.bfloat16 and torch.equal(ours.logits, own.logits)
