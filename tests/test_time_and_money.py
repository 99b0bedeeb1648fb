"""Operators and what they wait for, prices, sweeps and the cheapest machines, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.describe.families import FAMILIES

from haversack.cli.app import run
from haversack.cost.parallel import sent_bytes
from haversack.cost.roofline import serving_operators, total_seconds, training_operators
from haversack.describe.experts import share_of_experts
from haversack.describe.machine import machine_names, named
from haversack.describe.model import describe_model
from haversack.describe.parallel import Parallelism
from haversack.describe.prices import read_prices
from haversack.describe.workload import ServeWorkload, TrainWorkload, TuneWorkload
from haversack.errors import UsageError

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}  # fmt: skip


def test_decoding_alone_waits_for_memory_and_a_prompt_for_compute() -> None:
    model, machine = describe_model(LLAMA_8B), named("h100-80gb")
    stored = {site.id: site.num_bytes for site in model.weights}
    workload = ServeWorkload(2048, 1)
    rows = serving_operators(model, workload, machine, stored_bytes=stored, kv_bytes=2**28, chunk_tokens=2048)
    by_point = {point: [row for row in rows if row.point == point] for point in ("prefill", "decode")}
    assert {row.bottleneck for row in by_point["decode"]} == {"memory"}
    assert {row.bottleneck for row in by_point["prefill"] if row.name in ("gate", "up", "down")} == {"compute"}
    read = sum(row.num_bytes for row in by_point["decode"])
    assert total_seconds(by_point["decode"]) == pytest.approx(read / 3.35e12)
    layers = sum(s.num_parameters for s in model.weights if s.layer is not None)
    products = sum(row.flops for row in by_point["prefill"] if row.name not in ("attention", "head"))
    assert products == 2.0 * layers * 2048


def test_a_training_step_is_six_operations_per_weight_and_token() -> None:
    model, machine = describe_model(LLAMA_8B), named("h100-80gb")
    multiplied = sum(s.num_parameters for s in model.weights if s.role != "embedding")

    def products(workload: Any) -> float:
        return sum(row.flops for row in training_operators(model, workload, machine) if row.name != "attention")

    assert products(TrainWorkload(1, 1024)) == 6.0 * multiplied * 1024
    assert products(TuneWorkload(1, 1024, method="lora")) == 4.0 * multiplied * 1024
    head = next(s.num_parameters for s in model.weights if s.role == "head")
    assert products(TrainWorkload(1, 1024, recompute="full")) == (8.0 * multiplied - 2.0 * head) * 1024


def test_fully_sharded_ranks_send_half_as_much_again() -> None:
    """Rajbhandari et al. 2019 (arXiv 1910.02054), section 7."""
    model, workload = describe_model(LLAMA_8B), TrainWorkload(1, 64)
    two, three = (sent_bytes(model, workload, Parallelism(data=8, zero=stage)) for stage in (2, 3))
    assert three == 1.5 * two and two == 2 * 2 * model.num_parameters * 7 / 8
    assert sent_bytes(model, workload, Parallelism()) == 0


def test_experts_that_are_read_and_those_that_are_there() -> None:
    assert share_of_experts(8, 2, 1) == 0.25 and share_of_experts(8, None, 1) == 1.0
    assert share_of_experts(8, 2, 100) == pytest.approx(1.0)
    model = describe_model(FAMILIES["mixtral"])
    experts = sum(s.num_parameters for s in model.weights if s.expert is not None)
    assert model.num_experts == 3
    assert model.num_parameters - model.num_active_parameters == pytest.approx(
        experts / 3, abs=1
    )  # two of three, transformers' default


def test_every_price_names_a_machine_and_a_source(tmp_path: Path) -> None:
    prices = read_prices()
    assert set(prices) <= set(machine_names()) and all(price.source for price in prices.values())
    assert len(machine_names()) >= 15
    file = tmp_path / "prices.toml"
    for text, complaint in (
        ("[x", "can't be read"),
        ("[x]\ndollars_per_hour = 1", "the fields dollars_per_hour, source"),
        ('[x]\ndollars_per_hour = -1\nsource = "me"', "above zero"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=complaint):
            read_prices(file)
    with pytest.raises(UsageError, match="can't be read"):
        read_prices(tmp_path / "none.toml")


def test_the_largest_model_of_a_family_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    small.write_text(json.dumps(FAMILIES["llama"]))
    large.write_text(json.dumps({**FAMILIES["llama"], "num_hidden_layers": 12}))
    asked = ["plan", str(small), "--among", str(large), "--largest", "model", "--context", "16", "--json"]
    for task in ("serve", "train"):
        assert run([*asked, "--task", task, "--tensor-budget", "1GiB"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["value"] == "large" and [row["name"] for row in answer["models"]] == ["large", "small"]
        between = str(sum(row["peak_bytes"] for row in answer["models"]) // 2)
        assert run([*asked, "--task", task, "--tensor-budget", between]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["value"] == ("small" if task == "train" else "large")  # who serves may round
        assert run([*asked, "--task", task, "--tensor-budget", "1KiB"]) == 1
        assert json.loads(capsys.readouterr().out)["value"] is None
    assert run([*asked[:-1], "--task", "train"]) == 2
    assert "without a budget" in capsys.readouterr().err


def test_the_verb_answers_what_people_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, prices, picture = tmp_path / "config.json", tmp_path / "prices.toml", tmp_path / "sweep.svg"
    config.write_text(json.dumps(FAMILIES["llama"]))
    prices.write_text('["l4-24gb"]\ndollars_per_hour = 3.6\nsource = "me"\n')
    base = ["plan", str(config), "--machine", "l4-24gb", "--tensor-budget", "300KiB"]
    assert run([*base, "--sweep", "users", "-o", str(picture), "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [p["users"] for p in points] == [2**i for i in range(len(points))]
    assert points[0]["fits"] and not points[-1]["fits"] and picture.read_text().startswith("<svg")
    assert run([*base, "--largest", "users", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["value"]
    assert points[-2]["users"] <= found < points[-1]["users"]
    assert run([*base, "--context", "32", "--operators", "--prices", str(prices)]) == 0
    out = capsys.readouterr().out
    assert "waits for" in out and "$3.6 an hour (me)" in out
    assert run(["plan", str(config), "--mix", "100:16:16", "--prices", str(prices), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machines"] == {"l4-24gb": 1}
    train = ["plan", str(config), "--task", "train", "--machine", "l4-24gb", "--tensor-budget", "2MiB"]
    assert run([*train, "--sweep", "batch", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["points"]
    assert run([*train, "--context", "16", "--operators", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"forward", "backward", "update"} <= {row["time_point"] for row in answer["operators"]}
    assert run([*train, "--context", "16", "--prices", str(prices)]) == 0
    assert "$3.6 an hour (me)" in " ".join(capsys.readouterr().out.split())
    for wrong, words in (
        (["--sweep", "batch"], "one of context, users"),
        (["--sweep", "users", "--operators"], "it tells of one plan"),
        (["--sweep", "users", "--calibrate"], "cite damages instead"),
        (["--largest", "users", "-o", "plan.json"], "leave it out with --largest"),
        (["--largest", "model"], "--among MODEL"),
        (["--among", str(config)], "--among MODEL"),
        (["--prices", str(tmp_path / "none.toml")], "No such file or directory; name a TOML file"),
        (["--sweep", "users", "-o", str(config)], "ends in .svg"),
        (["--sweep", "users", "--largest", "users"], "were both given"),
        (["--mix", "1:2:3"], "--mix goes with"),
    ):
        assert run([*base, *wrong]) == 2
        assert words in capsys.readouterr().err
    assert run(["plan", str(config), "--mix", "1:2"]) == 2
    assert "RATE:PROMPT:ANSWER" in capsys.readouterr().err


def test_a_cache_that_only_transformers_holds_is_counted_and_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.engine.test_native_cache import CONFIGS

    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["lfm2"]))
    assert run(["plan", str(config), "--tensor-budget", "8MiB", "--context", "32", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["planned"] and "conv" in answer["why"] and answer["peak_bytes"] > 0
    assert run(["plan", str(config), "--tensor-budget", "1KiB", "--context", "32"]) == 1
    assert "nothing is planned" in capsys.readouterr().out
