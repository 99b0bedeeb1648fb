"""A peer is another tool in an environment of its own, called as a process: JSON in, JSON out, several requests to a process.

`.peers/NAME` is its environment (`make peers-NAME` builds it from `benchmarks/peers/NAME.txt`), `benchmarks/peers/use_NAME.py`
the script that is run there. A missing environment is an error, never a gap in a table.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS = ROOT / ".peers"
OWN = {
    "haversack": ROOT / "benchmarks" / "decode_turns.py",
    "haversack_training": ROOT / "benchmarks" / "training_turns.py",
}
"""Scripts of this project's own, asked as peers are, in this environment."""
LODGERS = {"llama_cpp_caches": "llama_cpp"}
"""Scripts that run in another's environment: what one of them measured stays when the other changes."""


class PeerError(RuntimeError):
    """A peer that is not installed, or that failed; the message ends with what it printed last."""


def run_peer(
    name: str, requests: Sequence[Mapping[str, Any]], *, num_threads: int = 2, timeout_seconds: float = 7200
) -> Iterator[dict[str, Any]]:
    """Run requests in one process of the peer's environment and yield their answers in order, as they come.

    Raises PeerError where the environment is missing, and, after the answers that were given, where the process fails or is
    too slow. A caller that stops asking ends the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        question.write_text(json.dumps(list(requests)))
        command = [str(interpreter(name)), str(script(name)), str(question), str(answer)]
        given, deadline = 0, time.monotonic() + timeout_seconds
        with (
            log.open("w") as output,
            subprocess.Popen(command, env=environment(num_threads, name), stdout=output, stderr=output) as process,
        ):
            try:
                while given < len(requests):
                    ended = process.poll() is not None  # asked before the answers are read: none comes after it
                    answers = json.loads(answer.read_text()) if answer.exists() else []
                    yield from answers[given:]
                    given = len(answers)
                    if ended or time.monotonic() > deadline:
                        break
                    time.sleep(0.2)
            finally:
                if given < len(requests):
                    process.kill()
        if given < len(requests):
            said = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
            request = dict(requests[given])
            raise PeerError(f"peer {name} ended with code {process.returncode} at {request}:\n{said}")


class PeerProcess:
    """A process of a peer that stays between requests, so that several can take turns; to be used in a `with`."""

    def __init__(self, name: str, *, num_threads: int = 2):
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._answer, self._log = (Path(self._folder.name) / file for file in ("answer.json", "log"))
        command = [str(interpreter(name)), str(script(name)), "-", str(self._answer)]
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment(num_threads, name),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
            )
        self._given = 0

    def ask(self, request: Mapping[str, Any], *, timeout_seconds: float = 1800) -> dict[str, Any]:
        """The answer to one more request. Raises PeerError where the process failed or is too slow."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + timeout_seconds
        try:
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
            while time.monotonic() < deadline:
                ended = self._process.poll() is not None
                answers = json.loads(self._answer.read_text()) if self._answer.exists() else []
                if len(answers) > self._given:
                    self._given = len(answers)
                    return answers[-1]
                if ended:
                    break
                time.sleep(0.05)
        except BrokenPipeError:
            pass
        said = "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-15:])
        how = "is too slow" if self._process.poll() is None else f"ended with code {self._process.returncode}"
        raise PeerError(f"peer {self.name} {how} at {dict(request)}:\n{said}")

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def interpreter(name: str) -> Path:
    """The Python of a peer's environment. Raises PeerError where it was not built."""
    if name in OWN:
        return Path(sys.executable)
    name = LODGERS.get(name, name)
    python = ENVIRONMENTS / name / "bin" / "python"
    if not (ENVIRONMENTS / name / ".stamp").exists():
        raise PeerError(
            f"peer {name} is not installed ({python.parent.parent} is missing or half-built): make peers-{name}"
        )
    return python


def script(name: str) -> Path:
    return OWN[name] if name in OWN else SCRIPTS / f"use_{name}.py"


def environment(num_threads: int, name: str = "") -> dict[str, str]:
    """Environment variables of a peer's process: no network, as many threads as said, no site packages but its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, SCRIPTS)))} if name in OWN else {}
    return {
        **kept,
        **own,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "passive",
        "CUDA_VISIBLE_DEVICES": "",
    }


def fingerprint(name: str) -> str:
    """Changes with the peer's script, what the scripts share, and its pinned versions; this project's own, with its code."""
    digest = hashlib.sha256()
    pins = sorted((ROOT / "src").rglob("*.py")) if name in OWN else [SCRIPTS / f"{LODGERS.get(name, name)}.txt"]
    for path in (script(name), SCRIPTS / "exchange.py", SCRIPTS / "decoding.py", *pins):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
