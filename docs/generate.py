"""What in the documentation is made by a program: real outputs, the table of methods, the file map, the picture.

    python docs/generate.py                     # or make docs: fills everything from docs/outputs/ and from the package
    python docs/generate.py --record [NAME...]  # runs the commands below first and stores what they print

A block in README.md or docs/*.md between `<!-- output NAME -->` and `<!-- end -->` is replaced by the stored output NAME;
`<!-- output NAME: weights | total -->` takes the command and the lines that begin so, and marks what it leaves out with an
ellipsis; `<!-- method PATH... -->` shows what these files, which add one method, change in the repository. The picture is drawn when `pack` is recorded, from the plan
that it made. `tests/test_docs.py` checks that every block is what this program would write.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "outputs"
PICTURE = ROOT / "docs" / "pictures" / "memory.svg"
MODEL = "src/haversack/data/reference-a"
PACKED = "out/packed"
TUNED = "out/tuned"
TEXT = "src/haversack/data/text/foreign-prose.txt"
CALIBRATION = "--calibration-tokens 4096"

COMMANDS = {
    "demo": "make demo",
    "help": "haversack --help",
    "plan-70b": "haversack plan docs/models/llama-70b --budget 48GiB --context 8192",
    "plan-70b-small": "haversack plan docs/models/llama-70b --budget 4GiB --context 8192",
    "plan-a-small": f"haversack plan {MODEL} --tensor-budget 4MiB --context 512",
    "plan-turned": f"haversack plan {MODEL} --max-damage 0.01 --context 512 --calibrate {CALIBRATION} --evaluations 0",
    "pack": f"haversack pack {MODEL} --tensor-budget 9MiB --context 512 {CALIBRATION} -o {PACKED}",
    "run": f"haversack run {PACKED} --prompt 'The function returns a list of' --max-new-tokens 40",
    "run-long": f'haversack run {PACKED} --prompt "$(cat LICENSE)"',
    "run-cap": f"haversack run {PACKED} --prompt 'The function' --max-new-tokens 8 --cap 200MiB",
    "chat": f"printf '%s\\n' 'The function returns a list of' 'The module defines' | haversack run {PACKED} --chat --max-new-tokens 24",
    "chat-full": f"tr -s ' \\n' ' ' < LICENSE | fold -w 700 | head -4 | haversack run {PACKED} --chat --max-new-tokens 16",
    "verify": f"haversack verify {PACKED}",
    "eval-kv": f"haversack eval kv {MODEL} --kv h2o --kv gear --kv duoattention --bytes 25% --context 512 --probes 1",
    "bad-cache": f"haversack eval kv {MODEL} --kv h2o --bytes 1% --context 512 --probes 1",
    "tune": f"haversack tune {MODEL} --data {TEXT} --budget 700MiB --method lora --seq-len 128 --batch 2 --steps 6 -o {TUNED}",
    "tune-small": f"haversack tune {MODEL} --data {TEXT} --budget 300MiB --seq-len 128 --batch 2 -o out/none",
    "tune-binary": f"haversack tune {MODEL} --data {MODEL}/model.safetensors --budget 700MiB -o out/none",
    "report": f"haversack report {PACKED} -o out/report.html",
    "methods": "haversack methods",
    "machine": "haversack machine raspberry-pi-5-8gb",
    "bad-budget": f"haversack plan {MODEL} --budget '8 potatoes'",
    "bad-context": f"haversack plan {MODEL} --budget 1GiB --context 100000",
    "bad-folder": "haversack plan no-such-model --budget 1GiB",
}
"""Name -> command, run in the repository's root, in this order: some use the folder that an earlier one packed."""

BLOCK = re.compile(r"<!-- output (?P<name>[\w-]+)(?::(?P<starts>[^\n]*))? -->\n.*?<!-- end -->", re.DOTALL)
METHOD = re.compile(r"<!-- method (?P<paths>[^\n]+) -->\n.*?<!-- end -->", re.DOTALL)


def record(names: Sequence[str]) -> None:
    """Run commands and store what they print: the command, standard output and standard error together, and the exit code if not 0."""
    environment = {
        **os.environ,
        "PYTHONPATH": "src",
        "XDG_CACHE_HOME": "out/demo/cache",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    for name in names:
        command = COMMANDS[name]
        if name == "pack":
            shutil.rmtree(ROOT / PACKED, ignore_errors=True)
        shell = re.sub(r"(^|\| )haversack ", rf"\1{sys.executable} -m haversack ", command)
        shell = re.sub(r"^make demo$", f"demo/demo.sh {sys.executable}", shell)
        done = subprocess.run(
            ["bash", "-c", shell],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = [
            f"$ {command}",
            *(line.rstrip() for line in done.stdout.replace(f"{ROOT}/", "").strip("\n").splitlines()),
        ]
        if done.returncode:
            lines.append(f"(exit code {done.returncode})")
        (OUTPUTS / f"{name}.txt").write_text("\n".join(lines) + "\n")
        if name == "pack" and done.returncode == 0:
            PICTURE.write_text(picture(ROOT / PACKED / "plan.json"))
        print(f"recorded {name} (exit code {done.returncode})")


def fill(page: str) -> str:
    """A page with every block's output put in again."""

    def block(match: re.Match[str]) -> str:
        lines = (OUTPUTS / f"{match['name']}.txt").read_text().rstrip("\n").split("\n")
        mark = match["name"]
        if match["starts"] is not None:
            lines = _abridged(lines, [start.strip() for start in match["starts"].split("|")])
            mark += ":" + match["starts"]
        return "\n".join([f"<!-- output {mark} -->", "```text", *lines, "```", "<!-- end -->"])

    def method(match: re.Match[str]) -> str:
        return f"<!-- method {match['paths']} -->\n```diff\n{method_diff(match['paths'].split())}\n```\n<!-- end -->"

    return METHOD.sub(method, BLOCK.sub(block, page))


def method_diff(paths: Sequence[str]) -> str:
    """The difference between a repository without these files and this one: the files, and what the generated pages say of them.

    That nothing else would have to change is what `tests/test_docs.py` shows by leaving the files out.
    """
    texts = {path: (ROOT / path).read_text() for path in paths}
    package = "src/haversack/"
    names = [path.removeprefix(package) for path in paths]
    for text in texts.values():
        names += re.findall(r"^ +id(?:: ClassVar\[str\] =|=) ?\"([^\"]+)\"", text, re.MULTILINE)
    out: list[str] = []
    for path, text in texts.items():
        out += difflib.unified_diff([], text.splitlines(), "/dev/null", path, lineterm="")
    for page, text in (("docs/methods.md", methods_page()), ("docs/files.md", files_page())):
        lines = text.splitlines()
        before = [line for line in lines if not any(f"`{name}`" in line for name in names)]
        out += difflib.unified_diff(before, lines, page, page, n=0, lineterm="")
    return "\n".join(line.rstrip() for line in out)


def _abridged(lines: Sequence[str], starts: Sequence[str]) -> list[str]:
    """The first line and those that begin with one of `starts`; `...` where lines with text are left out."""
    chosen, left_out = [lines[0]], False
    for line in lines[1:]:
        if line.lstrip().startswith(tuple(starts)):
            chosen += ["...", line] if left_out else [line]
            left_out = False
        elif line.strip():
            left_out = True
    return [*chosen, *(["..."] if left_out else [])]


def methods_page() -> str:
    """docs/methods.md: every part and recipe."""
    from haversack.recipes.base import all_recipes, list_methods

    lines = [
        "# Methods",
        "",
        "Generated by `make docs` from what `haversack methods --json` prints. A **part** is one idea at one stage of one resident; a **recipe**",
        "composes parts as a paper does. *Catalogue* names the entries of `src/haversack/recipes/catalogue.jsonl` that it makes true.",
    ]
    rows = list_methods()
    for kind, heading in (("recipe", "Recipes"), ("part", "Parts")):
        lines += [
            "",
            f"## {heading}",
            "",
            "| id | resident | what it does | source | catalogue |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            if row["kind"] != kind:
                continue
            source = row["source"]
            cited = ""
            if source:
                paper = f"[{source['arxiv']}](https://arxiv.org/abs/{source['arxiv']})" if source["arxiv"] else ""
                cited = f"{source['authors']} {source['year']} {paper}".strip()
            catalogue = ", ".join(f"`{entry}`" for entry in row["catalogue"])
            lines.append(f"| `{row['id']}` | {row['resident']} | {row['title']} | {cited} | {catalogue} |")
    lines += [
        "",
        "## What the papers report",
        "",
        "The papers' own figures, on their models; none of them was measured here.",
        "",
    ]
    lines += [f"- `{recipe.id}`: {recipe.published}." for recipe in all_recipes().values() if recipe.published]
    return "\n".join(lines) + "\n"


def files_page() -> str:
    """docs/files.md: one line per module, from its docstring."""
    lines = [
        "# File map",
        "",
        "Generated by `make docs` from the modules' docstrings: one line each, rooms from the ground up. Imports point upwards in this list only.",
    ]
    package = ROOT / "src" / "haversack"
    for room, paths in _rooms(package):
        lines += ["", f"## {room}", ""]
        for path in paths:
            lines.append(f"- `{path.relative_to(package)}`: {_first_sentence(path)}")
    lines += ["", "## Beside the package", ""]
    for path in sorted([*ROOT.glob("reference/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]):
        if path.name != "__init__.py":
            lines.append(f"- `{path.relative_to(ROOT)}`: {_first_sentence(path)}")
    return "\n".join(lines) + "\n"


def _rooms(package: Path) -> list[tuple[str, list[Path]]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_architecture import ORDER  # the order that the tests enforce

    sys.path.pop(0)
    rooms = [("The package itself", sorted(package.glob("_*.py")))]
    for names in ORDER:
        for name in names:
            if (package / name).is_dir():
                rooms.append((name, sorted((package / name).rglob("*.py"))))
            elif not name.startswith("_"):
                rooms.append((name, [package / f"{name}.py"]))
    return rooms


def _first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", text)[0].rstrip(":")


MOST_ROWS = 40
"""More rows than this stay in the JSON file."""

MOST_SENTENCES = 5
"""A benchmark of more rows is shown as a table."""


def results_page() -> str:
    """docs/results.md: what the benchmarks stored."""
    stored = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    lines = [
        "# Results",
        "",
        "Generated by `make docs` from `benchmarks/results/`; each is what `python -m benchmarks.NAME` last wrote. Predictions were made before",
        "anything was loaded, and measured by instruments that predict nothing (the allocator's and the operating system's reports).",
        *_total_time(stored),
        "",
        *_goals(),
    ]
    for result in stored:
        lines += ["", *_result(result)]
    return "\n".join(lines) + "\n"


def _total_time(stored: list[dict[str, Any]]) -> list[str]:
    """How long `make bench` took, as its results say, and `make bench-quick`; those without a result, or whose result does not say, are named."""
    targets = {name: _makefile_list(name) for name in ("QUICK", "LONG", "BESIDE_PEERS")}
    every = [name for names in targets.values() for name in names]
    seconds = {result["name"]: result.get("seconds") for result in stored if result["name"] in every}
    timed = {name: each for name, each in seconds.items() if each is not None}
    quick = sum(timed.get(name, 0) for name in targets["QUICK"]) / 60
    lines = [
        f"`make bench` runs {len(every)} benchmarks. Results of {len(seconds)} are stored; {len(timed)} of them say how long they took: "
        f"{sum(timed.values()) / 3600:.1f} hours together, of which `make bench-quick` takes {quick:.0f} minutes."
    ]
    for names, what in (
        ([name for name in seconds if name not in timed], "Stored before times were, so that their next run will say"),
        ([name for name in every if name not in seconds], "Without a whole result yet"),
    ):
        if names:
            lines.append(f"{what}: {', '.join(sorted(names))}.")
    return lines


def _makefile_list(variable: str) -> list[str]:
    """The words of a variable of the Makefile."""
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(rf"^{variable} := (.*)$", lines, re.MULTILINE)
    assert found is not None, f"no {variable} in the Makefile"
    return found[1].split()


def _result(stored: dict[str, Any]) -> list[str]:
    """One benchmark: when and where it ran, and its tables, or its figures where it has none."""
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    where = f"{stored['machine']['cpu']}, {stored['machine']['cores']} cores"
    title = _first_sentence(ROOT / "benchmarks" / f"{stored['name']}.py")
    lines = [
        f"## {stored['name']}",
        "",
        f"{title} {stored['date'][:10]}, commit `{stored['commit'][:10]}`; {where}; {versions}.",
    ]
    lines += [f"Note: {note.rstrip('.')}." for note in stored["notes"]]
    if "seconds" in stored:
        untimed = stored.get("untimed_rows", 0)
        besides = f", beside {untimed} rows of earlier runs that kept no time" if untimed else ""
        lines[-1] += f" It took {stored['seconds'] / 60:.1f} minutes{besides}."
    if "busy" in stored:
        lines[-1] += f" Meanwhile other processes used {stored['busy']:.0%} of the machine's cores."
    for table in stored.get("tables", ()):
        lines += ["", f"**{table['title']}**", "", _markdown(table["columns"])]
        lines += ["|---" + "|---:" * (len(table["columns"]) - 1) + "|", *map(_markdown, table["rows"])]
    if "tables" in stored:
        return lines  # the figures are what the tables were made from
    figures = stored["figures"]
    if isinstance(figures, list) and len(figures) > MOST_SENTENCES:
        return [*lines, "", *_table(figures)]
    for row in figures if isinstance(figures, list) else [figures]:
        lines += _figures(row)
    return lines


def _figures(row: dict[str, Any]) -> list[str]:
    """Single figures as a sentence, groups of them as tables; `bytes` and `figures` are predicted against measured."""
    from haversack.units import format_bytes

    lines = ["", "; ".join(facts) + "."] if (facts := _facts(row)) else []
    for name, rows in row.items():
        if _is_grouped(rows):
            lines += ["", *_table([{name: key, **each} for key, each in rows.items()])]
        if name not in ("bytes", "figures") and _are_rows(rows):
            lines += ["", *_table(rows)]
    if "bytes" in row:
        lines += ["", "| what | predicted | measured | difference |", "|---|---:|---:|---:|"]
    for line in row.get("bytes", ()):
        said, found = line["predicted"], line["measured"]
        gap = (
            "" if said is None else "equal" if said == found else f"{found - said:+,} B ({(found - said) / said:+.2%})"
        )
        predicted = "" if said is None else format_bytes(said)
        lines.append(_markdown((line["what"], predicted, format_bytes(found), gap)))
    if isinstance(row.get("figures"), list):
        lines += ["", "| what | predicted | measured |", "|---|---:|---:|"]
        lines += [_markdown((line["what"], line["predicted"], line["measured"])) for line in row["figures"]]
    return lines


def _goals() -> list[str]:
    """What is aimed for, against what is stored."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.goals import readings

    sys.path.pop(0)
    rows = ["| goal | aim | measured | reached | benchmark |", "|---|---|---|---|---|"]
    for goal, reading in readings():
        if reading is None:
            rows.append(_markdown((goal.what, goal.aim, "not yet", "", goal.benchmark)))
            continue
        measured, reached = reading
        link = f"[{goal.benchmark}](#{goal.benchmark})"
        rows.append(_markdown((goal.what, goal.aim, measured, "yes" if reached else "**no**", link)))
    return rows


SCALARS = (str, int, float)


def _facts(row: dict[str, Any]) -> list[str]:
    """`name: value` of what is one value, or a few numbers, in the row and in what is grouped in it."""
    facts = []
    for name, value in row.items():
        if isinstance(value, SCALARS):
            facts.append(f"{name.replace('_', ' ')}: {_shown(name, value)}")
        elif isinstance(value, dict) and not _is_grouped(value):
            facts += [f"{name.replace('_', ' ')}, {fact}" for fact in _facts(value)]
        elif isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
            facts.append(f"{name.replace('_', ' ')}: {', '.join(_shown(name, v) for v in value)}")
    return facts


def _is_grouped(value: Any) -> bool:
    """Whether this is a table by the names of its rows."""
    return isinstance(value, dict) and bool(value) and all(isinstance(row, dict) for row in value.values())


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_ROWS and all(isinstance(row, dict) for row in value)


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows by all the fields that any of them has and that fit a cell: one value, or an interval."""
    names = [
        name for name in dict.fromkeys(n for row in rows for n in row) if any(_fits(row.get(name)) for row in rows)
    ]
    lines = [_markdown([n.replace("_", " ") for n in names]), "|---" * len(names) + "|"]
    return lines + [_markdown([_cell(name, row.get(name)) for name in names]) for row in rows]


def _fits(value: Any) -> bool:
    return isinstance(value, SCALARS) or (isinstance(value, list) and len(value) == 2)


def _cell(name: str, value: Any) -> str:
    if not _fits(value):
        return ""
    return f"{value[0]:+.4f} to {value[1]:+.4f}" if isinstance(value, list) else _shown(name, value)


def _shown(name: str, value: Any) -> str:
    from haversack.units import format_bytes

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("bytes"):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(plan_file: Path) -> str:
    """The memory chart of a plan, as the report draws it, in a file that stands alone."""
    from haversack.plan.schema import Plan
    from haversack.report.page import memory_picture

    return memory_picture(Plan.read(plan_file)) + "\n"


def pages() -> dict[Path, str]:
    """Every generated file with the text that it should have."""
    written = {
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "files.md": files_page(),
        ROOT / "docs" / "results.md": results_page(),
    }
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if path not in written:
            written[path] = fill(path.read_text())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", nargs="*", metavar="NAME", help="run these commands (all if none is named) first")
    arguments = parser.parse_args()
    if arguments.record is not None:
        record(arguments.record or list(COMMANDS))
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
