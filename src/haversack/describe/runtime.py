"""What a process of ours holds before a model is loaded: its private bytes, measured once in fresh processes and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from haversack.describe.machine import Machine, keep, rates_file
from haversack.describe.measure_machine import RUNTIME_IMPORTS, is_there, runtime_pages
from haversack.errors import OutputError

MATTERS_BELOW_BYTES = 8 << 30
"""A runtime that was guessed is some 100 MiB off, a hundredth of this: peaks above need no measurement."""

_TRAINING_PROBE = """
import haversack.cli.app
from haversack.jobs.training_run import runtime_private_bytes
print(runtime_private_bytes())
"""


def with_runtimes(machine: Machine) -> Machine:
    """This machine with what a process holds that serves and one that trains, before they load anything.

    Measured when first asked (two fresh processes, some ten seconds of processor time), then read from a file that is named after the
    versions of what they import. What can't be measured stays unknown.
    """
    path = _file(machine)
    kept = _read(path)
    if kept is None:
        kept = {"serve": _serving_bytes(), "train": _training_bytes()}
        with contextlib.suppress(OutputError):  # measured again next time
            keep(path, json.dumps(kept))
    rates = machine.rates
    return dataclasses.replace(
        machine,
        rates=dataclasses.replace(
            rates,
            runtime_private_bytes=rates.runtime_private_bytes or kept["serve"],
            training_private_bytes=kept["train"],
        ),
    )


def _file(machine: Machine) -> Path:
    names = ("haversack", "torch", "transformers")
    versions = [metadata.version(name) if is_there(name) else "" for name in names]
    key = "|".join([machine.cpu_model, str(machine.cores), platform.python_version(), *versions])
    return rates_file(machine).with_name(f"runtime-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json")


def _read(path: Path) -> dict[str, int | None] | None:
    try:
        kept = json.loads(path.read_text())
        return (
            kept
            if set(kept) == {"serve", "train"} and all(type(n) in (int, type(None)) for n in kept.values())
            else None
        )
    except (OSError, ValueError, TypeError):
        return None


def _serving_bytes() -> int | None:
    return runtime_pages(tuple(name for name in RUNTIME_IMPORTS if is_there(name)), [])[0]


def _training_bytes() -> int | None:
    probe = subprocess.run([sys.executable, "-c", _TRAINING_PROBE], capture_output=True, text=True)
    return None if probe.returncode else int(probe.stdout.split()[-1])
