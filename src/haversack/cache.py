"""Where this user keeps what was measured of a machine, compiled for it, or calibrated of a model: made again when it is missing."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str = "") -> Path:
    """`$XDG_CACHE_HOME/haversack/NAME`, by default under `~/.cache`; not made."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "haversack" / name
