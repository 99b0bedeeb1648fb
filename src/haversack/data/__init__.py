"""What is shipped with the package: two small models that we trained, and the text that they are judged on.

`reference/` in the repository makes all of it. Nothing is read on import.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

TextName = Literal["calibration", "foreign-prose", "foreign-code"]


def reference_model(name: Literal["a", "b"]) -> Path:
    """Hugging Face folder of a shipped model: `a` (Qwen3, grouped heads, tied) or `b` (Llama, full multi-head, untied), 28 and 11 MB in bf16.

    Raises FileNotFoundError where the folder was not shipped, ValueError for another name.
    """
    if name not in ("a", "b"):
        raise ValueError(f"reference model {name!r}: there are 'a' and 'b'")
    return _shipped(f"reference-{name}")


def text_path(name: TextName) -> Path:
    """File of a shipped text: `calibration` (1 MB, from the sources that training saw, but held out), or `foreign-prose` or `foreign-code`
    (0.5 MB each, PostgreSQL's manual and networkx, sources that training never saw). ASCII.
    """
    return _shipped(f"text/{name}.txt")


def text(name: TextName) -> str:
    """The text itself; see `text_path`."""
    return text_path(name).read_text(encoding="ascii")


def _shipped(relative: str) -> Path:
    path = Path(str(files(__name__))) / relative
    if not path.exists():
        raise FileNotFoundError(
            f"{relative} is not in this installation ({path}); `make reference` builds it from a checkout"
        )
    return path
