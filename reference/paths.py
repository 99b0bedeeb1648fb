"""Where the trainer reads and writes: scratch outside the repository, shipped artefacts inside the package."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = REPOSITORY / "src" / "haversack" / "data"


def scratch() -> Path:
    """Folder of token arrays, checkpoints and logs: `$XDG_CACHE_HOME/haversack/reference`, made if missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "haversack" / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
