"""What the scripts of this folder share: reading a request, writing an answer, counting bytes. Runs in the peers' environments."""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def serve(tasks, packages):
    """Answer the requests named on the command line, each by the function of its task: a list in, a list out, written after
    each, so that what is done is kept if a later one fails. With `-` for the requests, they come as lines on standard input, and
    each is answered before the next is read: processes can so take turns."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    answers = []
    for request in map(json.loads, sys.stdin) if sys.argv[1] == "-" else json.loads(Path(sys.argv[1]).read_text()):
        started = time.perf_counter()
        answer = tasks[request["task"]](request)
        answers.append({**answer, "seconds": time.perf_counter() - started, "versions": versions})
        partial = Path(sys.argv[2] + ".partial")
        partial.write_text(json.dumps(answers))
        partial.rename(sys.argv[2])


def tensor_bytes(folder):
    """Tensor name -> bytes, of every safetensors file in a folder, from the headers."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = last - first
    return found


def file_bytes(folder, suffix=".safetensors"):
    """Bytes of the weight files themselves, headers included."""
    return sum(path.stat().st_size for path in Path(folder).glob(f"*{suffix}"))
