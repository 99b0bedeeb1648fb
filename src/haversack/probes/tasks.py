"""Recall and copying tasks: text in which something must be found again, and how much of it there is.

One generator makes the reference models' curriculum and the evaluation of cache methods. It knows no model: lengths are steered by a
tokenizer's own count. Templates are split in two: `SEEN` ones may be trained on, `HELD_OUT` never are.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

ValueKind = Literal["word", "digits"]
Form = Literal["records", "needle"]

# Ordinary words of technical prose, so that in most vocabularies each is one token after a space: what is asked is then whether a place in
# the past is found, not whether a word is spelled.
_WORDS = """
    access action address after algorithm argument array attention audio axis base batch block bound break buffer build byte cache call case
    change channel character check child class code color column command common complex condition connection constant context control copy
    count current data decimal default detail device dictionary dimension directory display distance document domain double effect element
    empty entry error event example exception factor failure feature field file filter final flag force form format forward frame free full
    function future general global graph group hand handle hash head header height help hidden high hook host image index initial input
    integer interval issue item key kind label language last layer left length level library limit line link list local lock long loop loss
    lower main manager map mark mask match math matrix maximum memory message method mode model module name new node normal note number
    object offset open operation option order output package pair parameter parent parser part past patch path pattern place platform point
    port position present print problem process program protocol python query queue random range rank real reason record reference register
    relative report request response rest result return right ring root row run sample scale script search second section select sequence
    series server set shape shared shell side sign signal similar simple single size small socket soft solution source special split stack
    standard start state status step stream string structure style success support symbol system table target task tensor term test text
    thread time token top total transform tree true turtle type update upper user value vector version view wait weight width window word
    work zero
"""
WORDS = tuple(_WORDS.split())

SEEN = {
    "list": ("{key} {value}\n", "{key}"),
    "code": ("The {key} code is {value}.\n", "What is the {key} code? The {key} code is"),
    "table": ("| {key} | {value} |\n", "Row {key} says:"),
    "assign": ("{key} = {value}\n", ">>> print({key})\n>>>"),
    "room": ("Note that {key} stays in room {value} today.\n", "Question: where does {key} stay? Answer: room"),
    "pair": ("{key}: {value}\n", "{key}:"),
    "gave": ("Someone gave {value} to {key} and left.\n", "What did {key} get? It was"),
}
HELD_OUT = {
    "box": ("Inside the {key} box lies {value};\n", "Look again. Inside the {key} box lies"),
}
TEMPLATES = SEEN | HELD_OUT


@dataclass(frozen=True)
class Probe:
    """One task: `context` is read (and may then be evicted), `question` ends right before `answer`, which starts with a space."""

    context: str
    question: str
    answer: str


class AnswerInPrompt(ValueError):
    """The question gives its answer away, or the context does not state it: a score would mean nothing."""


def check_probe(probe: Probe) -> None:
    """Raise AnswerInPrompt where the question holds (the start of) the answer, or the context does not hold it."""
    answer = probe.answer.strip()
    if not answer:
        raise AnswerInPrompt("empty answer")
    if answer not in probe.context:
        raise AnswerInPrompt(f"answer {answer!r} is not in the context")
    first = answer.split()[0]
    if first in probe.question.split() or probe.question.endswith((first, probe.answer[:2], " ")):
        raise AnswerInPrompt(f"question {probe.question!r} already holds (the start of) its answer {answer!r}")


def make_value(rng: random.Random, kind: ValueKind, not_among: Sequence[str] = ()) -> str:
    """A word, or three digits, that is not among the given ones."""
    while True:
        value = rng.choice(WORDS) if kind == "word" else f"{rng.randrange(1000):03d}"
        if value not in not_among:
            return value


def make_records(rng: random.Random, num_records: int, kind: ValueKind) -> list[tuple[str, str]]:
    """(key, value) pairs: keys are different words, no value is a key, digit values are drawn freely."""
    num_keys = min(num_records, 3 * len(WORDS) // 4)
    keys = rng.sample(WORDS, num_keys)
    return [(key, make_value(rng, kind, keys)) for key in keys]


def make_recall(
    rng: random.Random,
    count_tokens: Callable[[str], int],
    *,
    distance_tokens: int,
    template: str,
    kind: ValueKind,
    form: Form = "records",
    filler: str = "",
    preamble_tokens: int = 16,
) -> Probe:
    """A probe whose statement stands `distance_tokens` before the question, within a record's length.

    `form="records"`: other records fill the distance. `form="needle"`: `filler`, a long text, of which a random stretch is cut.
    About `preamble_tokens` of the same material come before the statement, so that sink tokens don't hold it.
    """
    statement, question = TEMPLATES[template]
    records = make_records(rng, 3 * len(WORDS) // 4, kind)
    key, value = records.pop()
    needle = statement.format(key=key, value=value)
    records = [record for record in records if record[1] != value]
    fill = _record_filler(records, statement) if form == "records" else _text_filler(rng, filler, value)
    before = _take(fill, count_tokens, preamble_tokens)
    after = _take(fill, count_tokens, distance_tokens - count_tokens(needle))
    return Probe(before + needle + after, question.format(key=key), f" {value}")


def make_copy(rng: random.Random, count_tokens: Callable[[str], int], *, num_tokens: int) -> Probe:
    """A list of different words, to be written again: the answer, `num_tokens` or a little less, is all of it but the first word, which the
    question gives.
    """
    words = rng.sample(WORDS, min(num_tokens, len(WORDS)))
    while count_tokens(" " + " ".join(words[1:])) > num_tokens:
        words.pop()
    text = " ".join(words)
    return Probe(f"Copy this list: {text}.\n", f"Copy: {words[0]}", text[len(words[0]) :])


def make_statements(
    rng: random.Random,
    count_tokens: Callable[[str], int],
    *,
    context_tokens: int,
    template: str,
    num_statements: int,
    filler: str,
) -> list[Probe]:
    """`num_statements` statements spread over about `context_tokens` of one text: a probe each (one without a question for none), in random order.

    Each statement stands at a random place in its share of the text, so that depths cover the whole of it.
    """
    statement, question = TEMPLATES[template]
    pairs = make_records(rng, 3 * len(WORDS) // 4, "word")
    chosen: list[tuple[str, str]] = []
    while len(chosen) < num_statements:
        key, value = pairs.pop()
        if value not in [other for _, other in chosen]:
            chosen.append((key, value))
    lines = [line for line in filler.splitlines(keepends=True) if line.strip()]
    lines = [line for line in lines if not any(f" {value}" in line for _, value in chosen)]
    start = rng.randrange(max(1, len(lines) // 2))
    told = [statement.format(key=key, value=value) for key, value in chosen]
    room = context_tokens - sum(count_tokens(one) for one in told)
    text = _take(lines[start:], count_tokens, room).splitlines(keepends=True)
    for i in reversed(range(num_statements)):
        low, high = (len(text) * j // num_statements for j in (i, i + 1))
        text.insert(rng.randrange(low, max(low + 1, high)), told[i])
    context = "".join(text)
    probes = [Probe(context, question.format(key=key), f" {value}") for key, value in chosen]
    rng.shuffle(probes)
    return probes or [Probe(context, "", "")]


def _record_filler(records: list[tuple[str, str]], statement: str) -> list[str]:
    return [statement.format(key=key, value=value) for key, value in records]


def _text_filler(rng: random.Random, filler: str, value: str) -> list[str]:
    lines = [line for line in filler.splitlines(keepends=True) if line.strip() and f" {value}" not in line]
    start = rng.randrange(max(1, len(lines) // 2))
    return lines[start:]


def _take(fill: list[str], count_tokens: Callable[[str], int], num_tokens: int) -> str:
    """Leading pieces of `fill`, removed from it, up to the token count (the last one that would pass it stays out)."""
    taken, counted = [], 0
    while fill:
        length = count_tokens(fill[0])
        if counted + length > num_tokens:
            break
        counted += length
        taken.append(fill.pop(0))
    return "".join(taken)
