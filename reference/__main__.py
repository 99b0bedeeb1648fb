"""Everything, from text to measured cards, for models A and B: what `make reference` runs.

    python -m reference [--minutes 120] [--finish-minutes 20] [--documents ROOT]

Run again, it trains on from where it stopped: text and tokenizer are kept, the stable checkpoints are extended, then decayed anew.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from reference.paths import scratch

MODELS = ("a", "b")


def run_module(module: str, *arguments: str) -> subprocess.Popen:
    """One step as its own process, in this interpreter. Threads that wait don't spin: two trainings share the cores."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    return subprocess.Popen([sys.executable, "-m", f"reference.{module}", *arguments], env=environment)


def wait(*processes: subprocess.Popen) -> None:
    """Until all have ended. Raises CalledProcessError for the first that failed."""
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", default="120", help="of training before the decay (default 120)")
    parser.add_argument("--finish-minutes", default="20", help="of decay (default 20)")
    parser.add_argument(
        "--documents", type=Path, default=Path("/"), metavar="ROOT", help="where usr/share/doc lies (default /)"
    )
    arguments = parser.parse_args()
    if not (scratch() / "train-code.npy").exists():
        wait(run_module("data", "--documents", str(arguments.documents)))
        wait(run_module("tokenizer"))
    threads = str(max(1, (os.cpu_count() or 1) // len(MODELS)))
    wait(*(run_module("train", name, "--threads", threads, "--minutes", arguments.minutes) for name in MODELS))
    finish = ("--finish", "--minutes", arguments.finish_minutes)
    wait(*(run_module("train", name, "--threads", threads, *finish) for name in MODELS))
    for name in MODELS:
        wait(run_module("card", name))


if __name__ == "__main__":
    main()
