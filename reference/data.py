"""Collect the text: packages and manuals under clean licences, filtered, de-duplicated and split four ways.

    python -m reference.data [--documents ROOT]

`train-prose` and `train-code` stay in the scratch folder. `calibration` (held out from training, same sources), `foreign-prose` and `foreign-code`
(sources that training never sees) are shipped, with `sources.json` saying what each part came from.
Manuals are looked for under `ROOT/usr/share/doc`, where Debian's packages (reference/README.md lists them) put them; `ROOT` is `/` unless told,
so unpacked packages (`dpkg -x`) will do.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from reference.paths import SHIPPED, scratch

MIN_DOCUMENT_BYTES = 400
# A document is cut at blank lines into blocks; a block this long that was seen before is dropped. Shorter ones ("return x") repeat by nature.
MIN_DUPLICATE_BYTES = 120
MAX_LINE_CHARS = 400  # longer lines are tables of numbers or embedded data
CALIBRATION_BYTES = 1_000_000
FOREIGN_BYTES = 500_000


@dataclass(frozen=True)
class Source:
    """One body of text: where it lies, how its files are read, under which licence, and whether training may see it."""

    name: str
    kind: str  # "prose" or "code"
    licence: str
    pattern: str  # globs, with spaces between them
    package: str | None = None  # an importable package, or
    documents: str | None = None  # a folder under usr/share/doc, or neither: the standard library
    debian: str | None = None  # the Debian package whose copyright file covers `documents`
    foreign: bool = False

    def folder(self, root: Path) -> Path:
        """Folder that holds the files. Raises FileNotFoundError naming what to install."""
        if self.documents:
            folder = root / "usr" / "share" / "doc" / self.documents
        elif self.package:
            spec = importlib.util.find_spec(self.package)
            if spec is None or spec.origin is None:
                raise FileNotFoundError(f"{self.name}: package not installed; pip install {self.package}")
            folder = Path(spec.origin).parent
        else:
            folder = Path(sysconfig.get_path("stdlib"))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{self.name}: no folder {folder}; install the Debian package or pass --documents ROOT"
            )
        return folder

    def version(self) -> str:
        """The installed version; manuals carry theirs in the folder's name."""
        if self.package:
            return importlib.metadata.version(self.package)
        return self.documents.split("/")[0] if self.documents else platform.python_version()

    def licence_text(self, root: Path) -> str:
        """The licence as the source itself carries it; every one of them asks to be kept with copies."""
        if self.package:
            files = importlib.metadata.files(self.package) or []
            paths = [
                Path(file.locate()) for file in files if re.search(r"dist-info/(licenses/)?LICENSE[^/]*$", str(file))
            ]
        elif self.debian:
            paths = [root / "usr" / "share" / "doc" / self.debian / "copyright"]
        else:
            paths = [Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"]
        return "\n".join(path.read_text(encoding="utf-8") for path in paths)


SOURCES = (
    Source(
        "postgresql-docs",
        "prose",
        "PostgreSQL",
        "*.html",
        documents="postgresql-doc-15/html",
        debian="postgresql-doc-15",
        foreign=True,
    ),
    Source("networkx", "code", "BSD-3-Clause", "**/*.py", package="networkx", foreign=True),
    Source("cpython-docs", "prose", "PSF-2.0", "**/*.rst.txt", documents="python3.11/html/_sources"),
    Source("sqlite-docs", "prose", "public domain", "*.html", documents="sqlite3", debian="sqlite3-doc"),
    Source("httpd-docs", "prose", "Apache-2.0", "**/*.html", documents="apache2-doc/manual/en", debian="apache2-doc"),
    Source(
        "django-docs",
        "prose",
        "BSD-3-Clause",
        "**/*.html",
        documents="python-django-doc/html",
        debian="python-django-doc",
    ),
    Source(
        "sqlalchemy-docs",
        "prose",
        "MIT",
        "**/*.rst",
        documents="python-sqlalchemy-doc/rst",
        debian="python-sqlalchemy-doc",
    ),
    Source(
        "llvm-docs",
        "prose",
        "Apache-2.0 WITH LLVM-exception",
        "**/*.rst.txt",
        documents="llvm-14-doc/html/_sources",
        debian="llvm-14-doc",
    ),
    Source(
        "rust-docs",
        "prose",
        "MIT OR Apache-2.0",
        "book/**/*.html nomicon/**/*.html reference/**/*.html embedded-book/**/*.html edition-guide/**/*.html rustc/**/*.html",
        documents="rust-doc/html",
        debian="rust-doc",
    ),
    Source("cpython-stdlib", "code", "PSF-2.0", "**/*.py"),
    Source("numpy", "code", "BSD-3-Clause", "**/*.py", package="numpy"),
    Source("scipy", "code", "BSD-3-Clause", "**/*.py", package="scipy"),
    Source("sympy", "code", "BSD-3-Clause", "**/*.py", package="sympy"),
    Source("torch", "code", "BSD-3-Clause", "**/*.py", package="torch"),
    Source("transformers", "code", "Apache-2.0", "**/*.py", package="transformers"),
)
# Installed packages inside the standard library's folder, bundled third parties, and manuals repeated as string constants.
EXCLUDED = re.compile(r"site-packages|_bundled|_vendor|pydoc_data|dist-packages|/lib2to3/tests/data/|/idlelib/.*\.txt")


class _Prose(HTMLParser):
    """Text of a manual's page (DocBook, Sphinx, mdBook, httpd, SQLite), without its navigation."""

    SKIPPED = frozenset({"script", "style", "head", "table", "nav", "footer", "form", "button", "svg"})
    NAVIGATION = frozenset(
        [
            "navheader",
            "navfooter",
            "toc",
            "related",
            "sphinxsidebar",
            "headerlink",
            "nosearch",
            "sidebar",
            "menu-bar",
            "hidden",
            "menu",
            "toplang",
            "bottomlang",
            "quickview",
            "page-header",
            "up",
            "top",
        ]
    )
    BREAKS = frozenset({"p", "div", "h1", "h2", "h3", "h4", "li", "dt", "pre", "br"})
    VOID = frozenset({"br", "hr", "img", "link", "meta", "input", "col"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        if tag in self.VOID:
            self.parts.append("\n" if tag == "br" else "")
            return
        if self.skipping or tag in self.SKIPPED or not self.NAVIGATION.isdisjoint(classes.split()):
            self.skipping.append(tag)
            return
        self.preformatted += tag == "pre"
        if tag in self.BREAKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            if tag in self.skipping:
                while self.skipping and self.skipping.pop() != tag:
                    pass
            return
        self.preformatted -= tag == "pre"
        if tag in self.BREAKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


# The manuals write typographic quotes and spaces; everything else outside ASCII drops the document.
_TO_ASCII = str.maketrans(
    {
        "\u00a0": " ",
        "\u2019": "'",
        "\u2018": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": " - ",
        "\u2013": "-",
        "\u2026": "...",
        "\u200b": "",
        "\u2002": " ",
        "\u00d7": "x",
        "\u2192": "->",
        "\u00b6": "",
    }
)


def read_document(path: Path) -> str | None:
    """ASCII text of one file, or None where it is too short, not ASCII, or not text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    if path.suffix == ".html":
        parser = _Prose()
        parser.feed(text)
        text = re.sub(r"[ ]*\n[ ]*\n\s*", "\n\n", "".join(parser.parts).translate(_TO_ASCII)).strip() + "\n"
    if not text.isascii():
        return None
    lines = [line.rstrip() for line in text.splitlines() if len(line) <= MAX_LINE_CHARS]
    text = "\n".join(lines).strip() + "\n"
    return text if len(text) >= MIN_DOCUMENT_BYTES else None


def drop_duplicates(text: str, seen: set[bytes]) -> str | None:
    """The document without its long blocks that occurred before; None where too little is left. `seen` grows."""
    kept = []
    for block in re.split(r"\n{2,}", text):
        if len(block) >= MIN_DUPLICATE_BYTES:
            digest = hashlib.blake2b(re.sub(r"\s+", " ", block).encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(block)
    text = "\n\n".join(kept).strip() + "\n"
    return text if len(text) >= MIN_DOCUMENT_BYTES and len("".join(kept)) >= MIN_DOCUMENT_BYTES else None


def documents(source: Source, root: Path, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every kept document of a source, in an order that no file system decides."""
    folder = source.folder(root)
    found = (path for pattern in source.pattern.split() for path in folder.glob(pattern))
    paths = sorted(found, key=lambda path: _order(path.relative_to(folder)))
    for path in paths:
        if EXCLUDED.search(str(path.relative_to(folder))) or path.is_symlink():
            continue
        text = read_document(path)
        text = text and drop_duplicates(text, seen)
        if text:
            yield str(path.relative_to(folder)), text


def _order(path: Path) -> bytes:
    return hashlib.blake2b(str(path).encode(), digest_size=8).digest()


def build(root: Path) -> dict:
    """Write train (scratch) and the shipped parts; returns the record that is saved as `sources.json`.

    Foreign sources come first, so that a block they share with a training source is dropped from training.
    """
    seen: set[bytes] = set()
    parts: dict[str, list[str]] = {
        name: [] for name in ("train-prose", "train-code", "calibration", "foreign-prose", "foreign-code")
    }
    calibration_share = CALIBRATION_BYTES / 60e6  # of each training source, about; cut to size below
    record = {"parts": {}, "sources": []}
    for source in SOURCES:
        num_bytes = dict.fromkeys(parts, 0)
        for path, text in documents(source, root, seen):
            if source.foreign:
                part = f"foreign-{source.kind}"
                if sum(map(len, parts[part])) > FOREIGN_BYTES:
                    continue
            else:
                share = (
                    int.from_bytes(hashlib.blake2b(f"{source.name}/{path}".encode(), digest_size=4).digest()) / 2**32
                )
                part = (
                    "calibration"
                    if share < 0.7 * calibration_share * (4 if source.kind == "prose" else 1)
                    else f"train-{source.kind}"
                )
            parts[part].append(text)
            num_bytes[part] += len(text)
        record["sources"].append(
            {
                "name": source.name,
                "version": source.version(),
                "licence": source.licence,
                "kind": source.kind,
                "foreign": source.foreign,
                "bytes": {k: v for k, v in num_bytes.items() if v},
            }
        )
    limits = {"calibration": CALIBRATION_BYTES, "foreign-prose": FOREIGN_BYTES, "foreign-code": FOREIGN_BYTES}
    for part, texts in parts.items():
        trained = part.startswith("train")
        if not part.startswith("foreign"):
            texts.sort(key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
        # Training keeps the borders between documents, as a zero byte; the shipped parts are plain text.
        text = ("\0" if trained else "\n").join(texts)[: limits.get(part)]
        folder = scratch() if trained else SHIPPED / "text"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part}.txt").write_text(text, encoding="ascii")
        record["parts"][part] = {
            "bytes": len(text),
            "blake2b": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        }
    licences = {source.name: source.licence_text(root) for source in SOURCES}
    rule = "=" * 100
    (SHIPPED / "text" / "LICENCES.txt").write_text(
        "".join(f"{rule}\n{name}\n{rule}\n{licence.strip()}\n\n" for name, licence in licences.items()),
        encoding="utf-8",
    )
    (SHIPPED / "text" / "sources.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--documents", type=Path, default=Path("/"), metavar="ROOT", help="where usr/share/doc lies (default /)"
    )
    record = build(parser.parse_args().documents)
    for source in record["sources"]:
        print(f"{source['name']:16} {source['version']:20} {source['licence']:14} {source['bytes']}")
    print({name: part["bytes"] for name, part in record["parts"].items()})


if __name__ == "__main__":
    main()
