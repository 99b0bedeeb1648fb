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
from haversack.probes.tasks import SEEN, WORDS, Probe, make_copy, make_recall, make_records, make_statements

NUM_STATEMENTS = 4
TEXT_TOKENS = 64
"""Scored tokens of real text, after one that is given."""

COPY_TOKENS = 64
VISIT_TOKENS = 48
"""What is said of a topic before a conversation turns to another."""

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


def make_conversations(
    tokenizer: Tokenizer, *, context_tokens: int, num_topics: int, num_conversations: int, seed: int = 0
) -> tuple[Task, ...]:
    """Conversations that come back to each of `num_topics` topics several times, and then a question on each, asked of a copy of the cache.

    A topic has a name, which opens every visit and the question, and statements of one form, the longest of those that say the key first; a visit takes about `VISIT_TOKENS`, and topics take turns in random order. Raises ValueError for more topics than
    there are forms or words, and where the tokenizer merges across the probes' borders.
    """
    rng, count, forms = (
        random.Random(seed),
        token_counter(tokenizer),
        [form for form in SEEN.values() if form[0].find("{key}") < form[0].find("{value}")],
    )
    if not 1 <= num_topics <= len(forms):
        raise ValueError(f"{num_topics} topics were asked; there are forms for 1 to {len(forms)}")
    forms.sort(key=lambda form: -count(form[0]))
    tasks = []
    for _ in range(num_conversations):
        pairs = make_records(rng, 3 * len(WORDS) // 4, "word")
        chosen = rng.sample(forms[:num_topics], num_topics)
        openings = [f"Let us talk about the {pairs.pop()[0]}.\n" for _ in chosen]
        told: list[list[tuple[str, str]]] = [[] for _ in chosen]
        lines: list[str] = []
        num_tokens = 0
        while num_tokens < context_tokens:
            for topic in rng.sample(range(num_topics), num_topics):
                visit = [openings[topic]]
                while count("".join(visit)) < VISIT_TOKENS:
                    if not pairs:
                        raise ValueError(f"a conversation of {context_tokens} tokens takes more words than there are")
                    key, value = pairs.pop()
                    told[topic].append((key, value))
                    visit.append(chosen[topic][0].format(key=key, value=value))
                lines += visit
            num_tokens = count("".join(lines))
        context = "".join(lines)
        asked = [rng.choice(of_topic) for of_topic in told]
        probes = [
            Probe(context, opening + form[1].format(key=key), f" {value}")
            for opening, form, (key, value) in zip(openings, chosen, asked)
        ]
        tasks.append(_task("conversation", probes, tokenizer))
    return tuple(tasks)


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
