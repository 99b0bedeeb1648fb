"""A plan alone in its process: what it does without is not imported, and the answer is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.cli import lean
from haversack.cli.app import run

PROGRAM = """
import contextlib, io, json, sys
from haversack.cli import lean
from haversack.cli.app import run
lean.is_own_process = True
answers = []
for asked in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(asked) == 0
    present = [name for name in ("torch._dynamo.utils", "torch.distributed.tensor", "accelerate") if name in sys.modules]
    answers.append([json.loads(out.getvalue()), present])
import scipy.optimize, torch.distributed
there = torch.distributed.is_available() and callable(torch._dynamo.reset)
print(json.dumps({"answers": answers, "there": there}))
"""
TRAINED = ("--with", "recompute=full", "--with", "optimizer=adamw8bit")


def test_answers_are_the_same_with_fewer_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Serving, tuning and training of dense models and experts; afterwards everything can be imported as ever."""
    asked = []
    for family, more in (
        ("llama", ()),
        ("gpt_oss", ()),
        ("gemma3", ("--task", "train", *TRAINED)),
        ("mixtral", ("--task", "tune", "--with", "method=lora")),
    ):
        config = tmp_path / f"{family}.json"
        config.write_text(json.dumps({**FAMILIES[family], "dtype": "bfloat16"}))
        question = ("--context", "32", "--machine", "h100-80gb", "--tensor-budget", "1GiB", "--json")
        asked.append(["plan", str(config), *question, *more])
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # which workspaces are counted for
    command = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout.splitlines()[-1])
    assert alone["there"]
    for question, (answer, present) in zip(asked, alone["answers"], strict=True):
        own = {"torch.distributed.tensor"} if "--task" in question else set()  # torch's, for traced updates
        assert set(present) <= own
        assert run(question) == 0
        usual = json.loads(capsys.readouterr().out)
        assert answer["timeline"] == usual["timeline"] and answer["peak_bytes"] == usual["peak_bytes"]
        assert answer.get("prediction_hash") == usual.get("prediction_hash")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_versions_that_nobody_tried_are_left_alone(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers  # noqa: F401

    monkeypatch.setattr(lean, "put_off", lambda *given: pytest.fail("an import was put off"))
    monkeypatch.setattr(lean, "is_own_process", True)
    for name in ("torch._dynamo", "transformers.modeling_utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys.modules[package], "__version__", "9.0")
    lean.plan_alone()
    assert torch.distributed.is_available()


def test_a_process_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "put_off", lambda *given: pytest.fail("an import was put off"))
    lean.plan_alone()


def test_what_was_put_off_is_imported_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "outer" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "import sys\nsys.inner_ran = True\nanswer = 42\ndef mark(fn): return 'marked'\n"
    )
    (package / "light.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "inner_ran", False, raising=False)
    import outer  # type: ignore[import-not-found]

    lean.put_off("outer.inner", ("mark",))
    from outer.inner import light  # type: ignore[import-not-found]

    assert light.value == 1 and outer.inner.mark("as it was") == "as it was" and not sys.inner_ran  # type: ignore[attr-defined]
    assert outer.inner.answer == 42 and sys.inner_ran  # type: ignore[attr-defined]
    assert outer.inner.mark("as it was") == "marked"
    with pytest.raises(AttributeError):
        _ = outer.inner.nothing
    for name in ("outer", "outer.inner", "outer.inner.light"):
        del sys.modules[name]
