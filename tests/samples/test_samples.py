"""Training data: every bad row is named, completions are masked, rows are packed apart, the order is a function of the step."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from haversack.data import reference_model
from haversack.errors import MissingDependencyError
from haversack.samples.packing import NOT_TRAINED, PackedRows, best_fit, rows_of_step
from haversack.samples.read import BadRow, DataError, Row, read_rows
from haversack.samples.store import TokenStore, make_store, open_store
from haversack.samples.tokens import Tokenizing

CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(reference_model("a"))


def _store(folder: Path, tokenizer: Any, name: str, text: str | bytes, max_tokens: int | None = None) -> TokenStore:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return make_store(
        folder / "data",
        [file],
        Tokenizing(tokenizer, "the model"),
        max_tokens=max_tokens,
        bad_rows_file=folder / "bad.jsonl",
    )


def _bad(folder: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    return {row["row"]: row["reason"] for row in rows}


NONSENSE = (
    b"{not json",
    b'"a string"',
    b"[1, 2]",
    b"null",
    b"{}",
    b'{"prompt": "no completion"}',
    b'{"prompt": "x", "completion": ""}',
    b'{"prompt": 3, "completion": "x"}',
    b'{"prompt": "x", "completion": null}',
    b'{"text": "of another form"}',
    b'{"messages": []}',
    b'{"prompt": "\xff\xfe", "completion": "x"}',
    b"[" * 100_000,
    b'{"prompt": "x", "completion": "' + b"long " * 400 + b'"}',
)
"""Rows that can't be trained on, each in its own way."""


def test_ten_thousand_malformed_rows_in_twenty_thousand_are_all_named(tmp_path: Path, tokenizer: Any) -> None:
    chosen = random.Random(0)
    wrong = set(chosen.sample(range(2, 20_001), 10_000))
    cheap = [row for row in NONSENSE if len(row) < 10_000]
    with (tmp_path / "rows.jsonl").open("wb") as file:
        for number in range(1, 20_001):
            good = json.dumps({"prompt": f"{number} is", "completion": " a number"}).encode()
            file.write((chosen.choice(cheap) if number in wrong else good) + b"\n")
    tokenizing = Tokenizing(tokenizer, "the model")
    store = make_store(tmp_path / "data", [tmp_path / "rows.jsonl"], tokenizing, max_tokens=64, bad_rows_file=tmp_path / "bad.jsonl")  # fmt: skip
    assert set(_bad(tmp_path)) == wrong
    assert store.num_bad_rows == 10_000 and store.num_samples == 10_000


def test_each_kind_of_nonsense_has_its_reason(tmp_path: Path, tokenizer: Any) -> None:
    good = b'{"prompt": "x", "completion": "y"}'
    _store(tmp_path, tokenizer, "rows.jsonl", b"\n".join([good, *NONSENSE]), max_tokens=64)
    reasons = _bad(tmp_path)
    assert sorted(reasons) == list(range(2, len(NONSENSE) + 2))
    for number, words in (
        (2, "not JSON"),
        (3, "not an object"),
        (6, "none of"),
        (8, "completion is empty"),
        (11, "a row of plain text"),
    ):
        assert words.replace("plain ", "") in reasons[number]
    assert "not UTF-8" in reasons[13] and "tokens, but a row holds 64" in reasons[15]


def test_completions_alone_are_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    store = _store(tmp_path, tokenizer, "rows.jsonl", '{"prompt": "one two three", "completion": " four"}\n')
    ids, trained = store.arrays["tokens"].tolist(), store.arrays["trained"].tolist()
    completion = tokenizer(" four", add_special_tokens=False)["input_ids"]
    assert ids == [*tokenizer("one two three")["input_ids"], *completion, tokenizer.eos_token_id]
    assert sum(trained) == len(completion) + 1 and trained[-len(completion) - 1 :] == [1] * (len(completion) + 1)


def test_what_the_assistant_says_is_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        ("system", "be kind"),
        ("user", "hello"),
        ("assistant", "good day"),
        ("user", "more"),
        ("assistant", "of it"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(DataError, match="no chat template"):
        _store(tmp_path, tokenizer, "chat.jsonl", json.dumps(row))
    other = AutoTokenizer.from_pretrained(reference_model("a"))
    other.chat_template = CHATML
    store = _store(
        tmp_path, other, "chat.jsonl", json.dumps(row) + "\n" + json.dumps({"messages": row["messages"][:2]})
    )
    said = [t for t, is_trained in zip(store.arrays["tokens"], store.arrays["trained"], strict=True) if is_trained]
    assert other.decode(said) == "good day\nof it\n"
    assert "no message of the role 'assistant'" in _bad(tmp_path)[2]


def test_pairs_are_two_samples_of_which_the_answers_count(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "one two", "chosen": " three", "rejected": " six of them"},
        {"prompt": "one two", "chosen": " three", "rejected": " three"},
        {"prompt": "one two", "chosen": " three", "rejected": " "},
        {"prompt": "one two", "chosen": " three"},
        {"prompt": "one", "chosen": " word" * 40, "rejected": " b"},
        {"chosen": "no prompt", "rejected": " at all"},
        {"prompt": "four", "chosen": " five", "rejected": " nine"},
    ]
    store = _store(tmp_path, tokenizer, "rows.jsonl", "\n".join(map(json.dumps, rows)), max_tokens=40)
    assert store.is_pairs and store.num_samples == 2 and len(store.arrays["ends"]) == 4
    reasons = _bad(tmp_path)
    assert "are the same" in reasons[2] and "rejected answer is empty" in reasons[3] and "none of" in reasons[4]
    assert "in both answers with their prompts, but a row holds 40" in reasons[5] and "must both be text" in reasons[6]
    packed = PackedRows(store, 32, 0)
    batch = packed.rows(range(len(packed)))
    assert batch.samples is not None and batch.sequences is not None and batch.positions is not None
    assert batch.num_averaged == 2 and sorted(batch.samples.tolist()) == [0, 1, 2, 3]
    said = {}
    for place, sample in enumerate(batch.samples):
        own = (batch.sequences == place) & (batch.labels != NOT_TRAINED)
        said[int(sample)] = tokenizer.decode(batch.ids[own], skip_special_tokens=True)
    assert said == {0: " three", 1: " six of them", 2: " five", 3: " nine"}


def test_pairs_of_chats_begin_with_what_they_have_in_common(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference_model("a"))
    tokenizer.chat_template = CHATML
    turns = [("user", "hello"), ("assistant", "good day"), ("user", "more")]
    begin = [{"role": role, "content": content} for role, content in turns]
    chosen, rejected = ({"role": "assistant", "content": said} for said in ("of it", "of that"))
    whole = {"chosen": [*begin, chosen], "rejected": [*begin, rejected]}
    split = {"prompt": begin, "chosen": [chosen], "rejected": [rejected]}
    store = _store(tmp_path, tokenizer, "chat.jsonl", json.dumps(whole) + "\n" + json.dumps(split))
    tokens, trained = store.arrays["tokens"], store.arrays["trained"]
    said = []
    for sample in range(4):
        start, end = store.bounds(sample)
        said.append(tokenizer.decode(tokens[start:end][trained[start:end] != 0]))
    assert said == ["of it\n", "of that\n"] * 2


def test_parquet_rows_are_read_like_json(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["a", "b", None], "completion": ["one", "two", "three"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = list(read_rows([tmp_path / "rows.parquet"]))
    assert [row.value for row in rows if isinstance(row, Row)][1] == {"prompt": "b", "completion": "two"}
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match="can't be read as parquet"):
        list(read_rows([tmp_path / "cut.parquet"]))


def test_parquet_without_pyarrow_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"haversack\[parquet\]"):
        list(read_rows([tmp_path / "rows.parquet"]))


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("gone.txt", None, "there is no file"),
        ("empty.txt", b"", "is empty"),
        ("program", b"\x7fELF\0\0\1", "is binary"),
        ("noise.jsonl", bytes(range(128, 256)) * 64, "is binary"),
        ("all.json", b"[]", "write one object per line"),
        ("rows.jsonl", b"{}\n{}\n", "none of the 2 rows .* can be trained on.* its fields"),
    ],
)
def test_data_that_is_none_is_refused(
    tmp_path: Path, tokenizer: Any, name: str, data: bytes | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        if data is None:
            list(read_rows([tmp_path / name]))
        else:
            _store(tmp_path, tokenizer, name, data)


def test_a_line_of_text_that_is_no_text_is_named_and_left_out(tmp_path: Path, tokenizer: Any) -> None:
    store = _store(tmp_path, tokenizer, "a.txt", b"one line\n\xff\xfe\nanother line\n" * 20)
    assert store.num_bad_rows == 20 and "\ufffd" not in tokenizer.decode(store.arrays["tokens"])


def test_text_is_a_stream_cut_into_rows(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(20_000))  # several pieces
    store = _store(tmp_path, tokenizer, "a.txt", text)
    assert (
        tokenizer.decode(store.arrays["tokens"][:-1]) == text and store.arrays["tokens"][-1] == tokenizer.eos_token_id
    )
    rows = PackedRows(store, 100, 0)
    batch = rows.rows([0, 3])
    assert batch.positions is None and np.array_equal(batch.ids[1], store.arrays["tokens"][300:400])
    assert batch.num_trained == 2 * 99 and open_store(tmp_path / "data") == store


def test_samples_lie_apart_in_a_row(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "go " * i, "completion": " now"} for i in range(1, 8)]
    store = _store(tmp_path, tokenizer, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    packed = PackedRows(store, 16, padding_id=7)
    batch = packed.rows(range(len(packed)))
    assert batch.positions is not None and packed.fill > 0.6
    begins = int((batch.positions == 0).sum())
    padded_rows = sum(sum(b - a for a, b in packed._spans(i)) < 16 for i in range(len(packed)))
    assert begins == 7 + padded_rows  # padding is a sample of its own
    trained = sum(int(store.arrays["trained"][a:b].sum()) for a, b in map(store.bounds, range(7)))
    assert batch.num_trained == trained and (batch.labels[batch.positions == 0] == NOT_TRAINED).all()
    assert packed.origins(0)[0].startswith("rows.jsonl:")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_best_fit_loses_no_sample_and_overfills_no_row(lengths: list[int]) -> None:
    rows = best_fit(lengths, 50)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= 50 for row in rows)
    assert len(rows) <= 11 / 9 * max(1, -(-sum(lengths) // 50) * 2) + 4


def test_the_order_is_a_function_of_the_step() -> None:
    per_step, num_rows = 3, 10
    drawn = [row for step in range(10) for row in rows_of_step(step, per_step, num_rows, seed=1)]
    assert all(sorted(drawn[i : i + num_rows]) == list(range(num_rows)) for i in (0, 10, 20))
    assert drawn[:10] != drawn[10:20] and rows_of_step(7, per_step, num_rows, seed=1) == drawn[21:24]
    assert rows_of_step(0, 25, num_rows, seed=1)[:20] == drawn[:20]


def test_bad_rows_are_no_rows() -> None:
    assert isinstance(Tokenizing(None, "x").samples(Row("f", 3, {"other": 1})), BadRow)
