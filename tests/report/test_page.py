"""The page: well-formed, self-contained, complete, and with the plan's own numbers."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.errors import PlanError
from haversack.plan.make import Question, make_plan
from haversack.plan.schema import Plan
from haversack.report.page import memory_picture, render, write_report
from haversack.units import format_bytes

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024, "vocab_size": 4096,
    "max_position_embeddings": 2048, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
VOID = {"meta", "br", "hr", "img", "input", "link"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    question = Question(
        describe_model(CONFIG), ServeWorkload(192, 64), Machine("test", 2, 2**35, 2**35), 12 * 2**20, "tensor"
    )
    answer = make_plan(question)
    assert answer.fits
    return answer.plan


@pytest.fixture(scope="module")
def measured(plan: Plan) -> dict:
    return {
        "prediction_hash": plan.prediction_hash,
        "bytes": [
            {"what": "weights", "predicted": 1000, "measured": 1000},
            {"what": "tensors at decode", "predicted": 4096, "measured": 4000},
            {"what": "unaccounted", "predicted": None, "measured": 77},
        ],
        "figures": [
            {"what": "decode step", "predicted": "3 ms", "measured": "5 ms"},
            {"what": "kernel generic", "predicted": "", "measured": "int4 g128"},
        ],
        "kernels": {"generic": ["int4 g128"]},
    }


@pytest.fixture(scope="module")
def page(plan: Plan, measured: dict) -> str:
    return render(plan, measured, "packed <here> & there")


class _Balance(HTMLParser):
    """Every element that opens closes, in order; attributes that could fetch something are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetches += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form"):
            self.fetches.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parsed(page: str) -> _Balance:
    parser = _Balance()
    parser.feed(page)
    parser.close()
    return parser


def test_is_well_formed_and_fetches_nothing(page: str) -> None:
    parser = _parsed(page)
    assert parser.open == [] and parser.fetches == []
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == (3 if "Damage against bytes" in page else 2)
    for drawing in drawings:
        assert ET.fromstring(drawing).tag.endswith("svg")


def test_source_is_escaped(page: str) -> None:
    assert "packed <here>" not in page and "packed &lt;here&gt; &amp; there" in page


def test_names_every_site_with_its_bytes_and_reason(plan: Plan, page: str) -> None:
    text = page
    for row in (*plan.weights, *plan.kv):
        cells = re.search(rf'<tr class="site"><td>{re.escape(row.site)}</td>.*?</tr>\n<tr class="why">.*?</tr>', text)
        assert cells is not None, row.site
        assert f">{format_bytes(row.stored_bytes)}<" in cells[0] and escape(row.why, quote=False) in cells[0]


def test_bars_sum_to_the_plan_to_the_digit(plan: Plan) -> None:
    root = ET.fromstring(memory_picture(plan))
    values = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text") if node.get("class") == "value"]
    planned = [format_bytes(plan.ledger.total_bytes(point)) for point in plan.prediction.timeline]
    assert values[1::2] == planned
    assert format_bytes(plan.prediction.peak_bytes) in planned


def test_bars_are_as_wide_as_their_bytes(plan: Plan) -> None:
    """All rectangles of one bar, over the bytes that its titles name, have one scale."""
    root = ET.fromstring(memory_picture(plan))
    group = root.find("{http://www.w3.org/2000/svg}g")
    assert group is not None
    rows: dict[str, float] = {}
    for node in group.iter("{http://www.w3.org/2000/svg}rect"):
        rows[node.get("y", "")] = rows.get(node.get("y", ""), 0.0) + float(node.get("width", "0"))
    planned = list(rows.values())[1::2]
    totals = [plan.ledger.total_bytes(point) for point in plan.prediction.timeline]
    scales = [width / total for width, total in zip(planned, totals)]
    assert max(scales) / min(scales) < 1.01  # marks are rounded to a tenth and are never thinner than 0.4


def test_picture_that_stands_alone_has_its_colours(plan: Plan) -> None:
    text = memory_picture(plan)
    assert "var(" not in text and "href" not in text


def test_shows_predicted_against_measured(page: str) -> None:
    assert re.search(r"<tr><td>weights</td>.*?>equal<", page)
    assert ">-96 B<" in page
    assert re.search(r"<tr><td>decode step</td>.*?3 ms.*?5 ms", page)
    assert re.search(r"<tr><td>generic</td><td>int4 g128</td>", page)


def test_works_without_measurements(plan: Plan) -> None:
    page = render(plan, None, "plan.json")
    assert _parsed(page).open == [] and "Nothing was measured yet" in page


def test_measurements_of_another_plan_are_refused(plan: Plan, measured: dict, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "verified.json").write_text(json.dumps(measured | {"prediction_hash": "0" * 64}))
    with pytest.raises(PlanError, match="another plan"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_plan_alone_says_so_and_how_to_go_on(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "the plan.json"
    file.write_text(plan.to_json())
    page = write_report(file, tmp_path / "report.html").read_text()
    assert "a plan</h1>" in page and "This is a plan alone" in page
    assert f"--plan &#39;{file}&#39; -o DIR" in page


def test_kinds_of_sites_sum_to_the_plan(plan: Plan) -> None:
    from haversack.report.page import KV_ROLE, _mixes

    rows = _mixes(plan)
    assert {row[0] for row in rows} == {weight.role for weight in plan.weights} | {KV_ROLE}
    assert rows[-1][0] == KV_ROLE and rows[-1][3] == "0-2"
    labels = [row[0] for row in rows]
    assert labels == sorted(labels, key=labels.index)  # rows of one kind stand together


def test_notes_are_escaped_and_their_code_is_marked(plan: Plan) -> None:
    noted = plan.model_copy(update={"notes": ("seconds are <assumed>; run `haversack machine --measure`.",)})
    page = render(noted, None, "plan.json")
    assert "seconds are &lt;assumed&gt;; run <code>haversack machine --measure</code>." in page
