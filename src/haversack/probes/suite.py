"""The probes that judge a cache: contexts that are read once, and what is then asked of them.

needle             one statement in real text, then its question
needles in a row   several statements in real text, asked one after another in the same cache
several questions  the same, each asked of a copy of the cache as it was after the context
records            one of many like records
copying            a list, to be written again
text at N          real text goes on after N tokens: a quarter, half and all of the context

A question can also be read ahead of the context ("before"), so that what compresses the context may know what will be asked;
text has no question. Every task has the same contexts in any cache, so that damages are paired.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from haversack.probes.score import Tokenizer, encode_probe, token_counter
from haversack.probes.tasks import SEEN, make_copy, make_recall, make_statements

NUM_STATEMENTS = 4
TEXT_TOKENS = 64
"""Scored tokens of real text, after one that is given."""

COPY_TOKENS = 64
LEAST_CONTEXT_TOKENS = 192
TURNS_TOKENS = 128
"""Room for questions and answers beside the context, announced ones left out."""

FORM_TOKENS = 48
"""Room that a statement, a question and their line breaks take beyond a probe's stated distance."""


@dataclass(frozen=True)
class Turn:
    """Token ids: what is asked, and what is scored."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A context and its turns, `in_a_row` in one cache or each in a copy of it. `announced` are the questions as they are read
    ahead of the context, empty where there is nothing to announce."""

    kind: str
    context: tuple[int, ...]
    turns: tuple[Turn, ...]
    announced: tuple[int, ...] = ()
    in_a_row: bool = False

    @property
    def num_tokens(self) -> int:
        """The longest sequence that a cache sees, announcement included."""
        asked = [len(turn.question) + len(turn.answer) for turn in self.turns]
        return len(self.announced) + len(self.context) + (sum(asked) if self.in_a_row else max(asked))

    def asked_before(self) -> Task:
        """The same task with its questions read before the context too."""
        return replace(self, context=(*self.announced, *self.context), announced=())


def make_suite(
    tokenizer: Tokenizer, text: str, *, context_tokens: int, num_per_kind: int, seed: int = 0
) -> tuple[Task, ...]:
    """`num_per_kind` tasks of each kind, about `context_tokens` long, from `text`, which must be several times as long.

    Raises ValueError where the tokenizer merges across the probes' borders, or the text is too short.
    """
    rng, count = random.Random(seed), token_counter(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2 * (context_tokens + 1 + TEXT_TOKENS):
        needed = 2 * (context_tokens + 1 + TEXT_TOKENS)
        raise ValueError(f"the text has {len(ids)} tokens, but probes of {context_tokens} need {needed} or more")
    templates = list(SEEN)
    tasks: list[Task] = []
    for i in range(num_per_kind):
        template = templates[i % len(templates)]
        for kind, number in (
            ("needle", 1),
            ("needles in a row", NUM_STATEMENTS),
            ("several questions", NUM_STATEMENTS),
        ):
            probes = make_statements(
                rng, count, context_tokens=context_tokens, template=template, num_statements=number, filler=text
            )
            tasks.append(_task(kind, probes, tokenizer, in_a_row=kind == "needles in a row"))
        room = context_tokens - FORM_TOKENS
        record = make_recall(rng, count, distance_tokens=room, template=template, kind="word")
        tasks.append(_task("records", [record], tokenizer))
        listed = make_copy(rng, count, num_tokens=min(COPY_TOKENS, context_tokens // 2))
        filler = make_statements(
            rng, count, context_tokens=room - COPY_TOKENS, template=template, num_statements=0, filler=text
        )
        tasks.append(_task("copying", [replace(listed, context=filler[0].context + listed.context)], tokenizer))
    return (*tasks, *_text_tasks(rng, ids, context_tokens, num_per_kind))


def _task(kind: str, probes: Sequence, tokenizer: Tokenizer, *, in_a_row: bool = False) -> Task:
    encoded = [encode_probe(probe, tokenizer) for probe in probes]
    turns = [Turn(tuple(e.question), tuple(e.answer)) for e in encoded]
    line_break = tuple(tokenizer.encode("\n", add_special_tokens=False))
    if in_a_row:
        turns = [turns[0], *(replace(turn, question=line_break + turn.question) for turn in turns[1:])]
    announced = tuple(token for e in encoded for token in (*e.question, *line_break))
    return Task(kind, tuple(encoded[0].context), tuple(turns), announced, in_a_row)


def _text_tasks(rng: random.Random, ids: Sequence[int], context_tokens: int, num_per_kind: int) -> list[Task]:
    whole = context_tokens + 1 + TEXT_TOKENS
    tasks = []
    for place in (context_tokens // 4, context_tokens // 2, context_tokens):
        for _ in range(num_per_kind):
            start = rng.randrange(len(ids) - whole)
            piece = tuple(ids[start : start + place + 1 + TEXT_TOKENS])
            turn = Turn(piece[place : place + 1], piece[place + 1 :])
            tasks.append(Task(f"text at {place}", piece[:place], (turn,)))
    return tasks
