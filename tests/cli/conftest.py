"""A tiny model folder with a tokenizer, and the command line run in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.tiny import save_tiny

CONTEXT_TOKENS = 24
WORKLOAD = ("--context", str(CONTEXT_TOKENS))
TEXT = "\n".join(f"line {n}: {n * n} is the square of {n}, and {n * 3} is three times as much" for n in range(400))


@dataclass(frozen=True)
class Ran:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as strict JSON."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    def refuses(self, *words: str, code: int = 2) -> None:
        """One sentence or two on one line of standard error, with these words in it, and nothing on standard output."""
        assert self.code == code, (self.code, self.out[-400:], self.err)
        assert self.out == ""
        message = self.err.strip()
        assert message.startswith("haversack: ") and "\n" not in message and message[-1] in ".?", message
        assert "Traceback" not in message and len(message) < 700
        for word in words:
            assert word in message, (word, message)


@pytest.fixture(autouse=True)
def _quiet_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of their own, no network, defects as tracebacks, one thread."""
    import huggingface_hub.constants

    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HAVERSACK_TRACEBACK", "1")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    from haversack.cli.app import run

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def _saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("saved") / "tiny-llama")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def model(_saved_model: Path, tmp_path: Path) -> Path:
    """A folder of this test's own, to be damaged."""
    return shutil.copytree(_saved_model, tmp_path / "tiny-llama")


@pytest.fixture(scope="session")
def source(_saved_model: Path) -> Path:
    """The same folder, not to be damaged."""
    return _saved_model


@pytest.fixture(scope="session")
def bf16_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same family in bfloat16, not to be damaged."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("saved") / "tiny-llama-bf16", "bfloat16")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def _packed_once(_saved_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from haversack.cli.app import run

    folder = tmp_path_factory.mktemp("packed") / "tiny-packed"
    assert run(pack_command(_saved_model, folder, calibration_text)) == 0
    return folder


@pytest.fixture
def packed(_packed_once: Path, tmp_path: Path) -> Path:
    """A packed folder of this test's own, to be damaged."""
    return shutil.copytree(_packed_once, tmp_path / "tiny-packed")


def pack_command(model: Path, output: Path, text: Path, *more: str, budget: str = "260KiB") -> list[str]:
    """Below need by default, calibrated on as little text as there can be, no whole plans measured."""
    fixed = (*WORKLOAD, "--calibration", str(text), "--calibration-tokens", "256", "--evaluations", "0")
    return ["pack", str(model), *fixed, "-o", str(output), "--tensor-budget", budget, *more]


def save_tokenizer(folder: Path, vocab_size: int = 72) -> None:
    """A tokenizer of single characters, as many as the model's vocabulary has."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?'-()\nABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters[:vocab_size])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
