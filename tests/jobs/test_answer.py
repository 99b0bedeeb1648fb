"""Text is passed on as soon as it is certain, and never what an end string begins with."""

from __future__ import annotations

import pytest

from haversack.jobs.answer import Ends, StreamedText, answer


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")


def streamed(text: str, ends=()):
    pieces: list[str] = []
    stream = StreamedText(Bytes(), ends, pieces.append)
    for byte in text.encode():
        if stream.add(byte):
            break
    stream.finish()
    assert "".join(pieces) == stream.text
    return pieces


def test_characters_of_many_bytes_come_whole():
    assert streamed("aé語🎒!") == ["a", "é", "語", "🎒", "!"]


def test_an_unfinished_character_is_shown_at_the_end():
    pieces: list[str] = []
    stream = StreamedText(Bytes(), (), pieces.append)
    stream.add("é".encode()[0])
    assert pieces == []
    stream.finish()
    assert pieces == ["\ufffd"]


@pytest.mark.parametrize(
    ("text", "ends", "shown"),
    [
        ("one\nUser: two", ("\nUser:",), "one"),
        ("one\nUse it", ("\nUser:",), "one\nUse it"),
        ("aab", ("ab",), "a"),
        ("abcx", ("bc", "abc"), ""),
        ("xx", ("x",), ""),
    ],
)
def test_end_strings_are_never_shown(text, ends, shown):
    assert "".join(streamed(text, ends)) == shown


class Countdown:
    """A sequence whose next token is one less than the last; the sampler takes it as it comes."""

    def __init__(self):
        self.tokens: list[int] = []

    def read(self, ids, stopped=lambda: False):
        if stopped():
            return None
        self.tokens += ids
        return ids[-1] - 1

    def choose(self, logits, tokens):
        assert list(tokens) == self.tokens
        return logits


@pytest.mark.parametrize(
    ("ends", "limit", "stop_after", "tokens", "finish"),
    [
        (Ends(), 3, 99, (70, 69, 68), "length"),
        (Ends(frozenset({69})), 9, 99, (70, 69), "stop"),
        (Ends(strings=("E",)), 9, 99, (70, 69), "stop"),  # 69 is E
        (Ends(), 9, 1, (70,), "interrupted"),
        (Ends(), 9, 0, (), "interrupted"),
    ],
)
def test_why_an_answer_ends(ends, limit, stop_after, tokens, finish):
    loop, asked = Countdown(), iter(range(100))
    given = answer(
        loop, [80, 71], loop, Bytes(), max_new_tokens=limit, ends=ends, stopped=lambda: next(asked) >= stop_after
    )
    assert (given.tokens, given.finish) == (tokens, finish)
    assert (
        given.text == bytes(t for t in tokens if t not in ends.tokens and t != (69 if ends.strings else None)).decode()
    )
    assert len(loop.tokens) == 2 + max(0, len(tokens) - 1) if tokens else loop.tokens == []
