"""A peer is another tool in an environment of its own, called as a process: JSON in, JSON out, several requests to a process.

`.peers/NAME` is its environment (`make peers-NAME` builds it from `benchmarks/peers/NAME.txt`), `benchmarks/peers/use_NAME.py`
the script that is run there. A missing environment is an error, never a gap in a table.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS = ROOT / ".peers"


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
            subprocess.Popen(command, env=environment(num_threads), stdout=output, stderr=output) as process,
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


def interpreter(name: str) -> Path:
    """The Python of a peer's environment. Raises PeerError where it was not built."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not (ENVIRONMENTS / name / ".stamp").exists():
        raise PeerError(
            f"peer {name} is not installed ({python.parent.parent} is missing or half-built): make peers-{name}"
        )
    return python


def script(name: str) -> Path:
    return SCRIPTS / f"use_{name}.py"


def environment(num_threads: int) -> dict[str, str]:
    """Environment variables of a peer's process: no network, as many threads as said, no site packages but its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "passive",
        "CUDA_VISIBLE_DEVICES": "",
    }


def fingerprint(name: str) -> str:
    """Changes with the peer's script, what the scripts share, and its pinned versions."""
    digest = hashlib.sha256()
    for path in (script(name), SCRIPTS / "exchange.py", SCRIPTS / f"{name}.txt"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
