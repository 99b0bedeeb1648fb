"""A plan alone in its process: what it does without is not imported, and the answer is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.describe.families import FAMILIES

from haversack.cli import lean
from haversack.cli.app import run

PROGRAM = """
import sys
from haversack.cli import lean
from haversack.cli.app import run
lean.is_own_process = True
code = run(sys.argv[1:])
print([n for n in ("torch._dynamo.utils", "torch.distributed.tensor", "accelerate") if n in sys.modules], file=sys.stderr)
raise SystemExit(code)
"""


def test_the_answer_is_the_same_with_fewer_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.json"
    config.write_text(json.dumps({**FAMILIES["llama"], "dtype": "bfloat16"}))
    asked = ["plan", str(config), "--context", "64", "--machine", "h100-80gb", "--tensor-budget", "1GiB", "--json"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert run(asked) == 0
    own, other = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert own["prediction_hash"] == other["prediction_hash"]
    assert own["timeline"] == other["timeline"]


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
