"""Rows of training tokens: crops of text, and synthetic rows in which something must be found again.

Every row is a pure function of (seed, step, row), so that a resumed run reads what an uninterrupted one would have.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from haversack.probes.tasks import SEEN, WORDS, make_records

# Loss weight of synthetic tokens that nothing could predict (fresh keys and values), so that they don't drown the answers. Answers, copies and text count 1.
UNPREDICTABLE_WEIGHT = 0.1
ANSWER_WEIGHT = 4.0  # of an answer's tokens, which are one in 200 of a batch: at 1 they were learned last
PROSE_SHARE = 0.5  # of the text rows: a sixth of the text, and the harder part to predict
# Words that invented templates are made of; none of a held-out template's, nor of the tasks' keys and values.
_GLUE = """
    a an and are around as asks at away became before behind below beneath beside between bought brings brought built but by called carries
    chose cost early every finds for found from full gets gives goes had has have held here his holds in into is its keeps knows kept late
    leads likes made makes means met my near needs next now of often on once one only or our over owns paid quiet red saw says sees sends
    she sits so sold some soon stands stays still stores takes that the their then there these they this those till to told took toward under
    until up very via wants was wears were when where which while who will wins with without works writes yet you
"""
GLUE = tuple(_GLUE.split())
ENDS = ("\n", ".\n", ";\n", ",\n", " |\n", ". ", "; ", ", ")
INVENTED_SHARE = 0.5  # of recall episodes: with seven fixed templates alone, the model looked up by key in those seven and in no other


@dataclass(frozen=True)
class Phase:
    """One stretch of the curriculum; it ends when `gate` is met (see train.py) or after `max_tokens`."""

    seq_len: int
    synthetic_share: float
    echo_share: float  # of the synthetic episodes: the data that teaches looking one token back
    max_tokens: int | None
    gate: str | None  # "copy" or "word": which probes must reach train.GATE_ACCURACY, at
    gate_tokens: int  # this distance


PHASES = (
    Phase(64, 0.85, 0.25, 3_000_000, "copy", 32),
    Phase(256, 0.60, 0.05, 1_500_000, "word", 192),
    Phase(1024, 0.35, 0.0, 6_000_000, "word", 900),
    Phase(1024, 0.15, 0.0, None, None, 900),
)
# A value that stands before its key is found by another head than one after it; at one template in seven that head never formed.
VALUE_FIRST_SHARE = 0.35


class Rows:
    """Draws batches: `tokens` (rows, seq_len + 1) and `weights` (rows, seq_len) of the predicted ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: dict[str, np.ndarray], seed: int) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.seed = seed
        self.boundary = tokenizer.bos_token_id
        self.vocab_size = len(tokenizer)
        self._encode = tokenizer.backend_tokenizer.encode
        self._word_ids = [token for word in WORDS for token in self._encode(f" {word}").ids]

    def batch(self, step: int, phase: Phase, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random.Random(f"{self.seed}/{step}")
        tokens = np.zeros((num_rows, phase.seq_len + 1), dtype=np.int64)
        weights = np.zeros((num_rows, phase.seq_len + 1), dtype=np.float32)
        # Stratified, not drawn row by row: at four rows a batch, chance would make every other batch all text.
        synthetic = int(num_rows * phase.synthetic_share + rng.random())
        for row in range(num_rows):
            if row < synthetic:
                tokens[row], weights[row] = self._synthetic_row(rng, phase.seq_len + 1, phase.echo_share)
            else:
                tokens[row], weights[row] = self._text_row(rng, phase.seq_len + 1)
            if rng.random() < 0.5:
                tokens[row, 0] = self.boundary
        return tokens, weights[:, 1:]

    def _crop(self, rng: random.Random, num_tokens: int) -> np.ndarray:
        text = self.text["prose" if rng.random() < PROSE_SHARE else "code"]
        start = rng.randrange(len(text) - num_tokens)
        return text[start : start + num_tokens]

    def _text_row(self, rng: random.Random, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        return self._crop(rng, num_tokens), np.ones(num_tokens, dtype=np.float32)

    def _synthetic_row(self, rng: random.Random, num_tokens: int, echo_share: float) -> tuple[list[int], list[float]]:
        """Episodes end to end until the row is full; the last is cut. Half the long rows are one episode, for distance."""
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < num_tokens:
            left = num_tokens - len(tokens)
            length = left if left < 64 or rng.random() < 0.5 else rng.randint(48, left)
            episode = Rows._echo if rng.random() < echo_share else rng.choices(EPISODES, EPISODE_SHARES)[0]
            pieces = episode(self, rng, length)
            for ids, weight in pieces:
                tokens += ids
                weights += [weight] * len(ids)
        return tokens[:num_tokens], weights[:num_tokens]

    def _ids(self, text: str) -> list[int]:
        return self._encode(text).ids

    def _random_tokens(self, rng: random.Random, num_tokens: int) -> list[int]:
        """From all tokens, from the tasks' words, or from a few of them, so that one token is no match and a longer context must be."""
        alphabet = rng.choice(("all", "words", "few"))
        if alphabet == "all":
            return [rng.randrange(1, self.vocab_size) for _ in range(num_tokens)]
        words = rng.sample(self._word_ids, rng.randint(4, 24)) if alphabet == "few" else self._word_ids
        return rng.choices(words, k=num_tokens)

    def _echo(self, rng: random.Random, length: int) -> list[tuple[list[int], float]]:
        """Triples a b a, of fresh tokens each: the third is what stood one back. Matching comes later, and needs that first."""
        num_triples = rng.randint(2, max(2, min(length, 64) // 3))
        fresh = self._random_tokens(rng, 2 * num_triples)
        pieces = []
        for a, b in zip(fresh[::2], fresh[1::2], strict=True):
            pieces += [([a, b], UNPREDICTABLE_WEIGHT / 2), ([a], 1.0)]
        return pieces

    def _random_copy(self, rng: random.Random, length: int) -> list[tuple[list[int], float]]:
        """A stretch of random tokens over and over: what induction is, bare. Short stretches are the easy end, where it begins."""
        half = max(2, length // 2)
        num_tokens = min(half, int(2 * (half / 2) ** rng.random()) + 1)
        stretch = self._random_tokens(rng, num_tokens)
        again = (stretch * (length // num_tokens + 1))[: length - num_tokens]
        return [(stretch, UNPREDICTABLE_WEIGHT / 2), (again[:1], 0.0), (again[1:], 1.0)]

    def _word_copy(self, rng: random.Random, length: int) -> list[tuple[list[int], float]]:
        """A list of words, and the list again."""
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, max(2, min(200, (length - 12) // 4))))]
        first, rest = words[0], " ".join(["", *words[1:]])
        return [
            (self._ids(f"Copy this list: {first}{rest}.\n"), UNPREDICTABLE_WEIGHT),
            (self._ids(f"Copy: {first}"), UNPREDICTABLE_WEIGHT),
            (self._ids(f"{rest}\n"), 1.0),
        ]

    def _template(self, rng: random.Random) -> tuple[str, str]:
        """A statement and its question: one of the seven, or one invented for this episode, in which key and value stand apart by up to four words."""
        value_first = rng.random() < VALUE_FIRST_SHARE
        if rng.random() >= INVENTED_SHARE:
            return SEEN["gave" if value_first else rng.choice(list(SEEN))]
        before, between = (
            " ".join(rng.sample(GLUE, rng.choice(counts))) for counts in ((0, 1, 1, 2, 3), (0, 1, 2, 2, 3, 4))
        )
        if value_first:
            asking, linking = (" ".join(rng.sample(GLUE, rng.choice((1, 1, 2, 3)))) for _ in range(2))
            return f"{before} {{value}} {between} {{key}}{rng.choice(ENDS)}", f"{asking} {{key}} {linking}"
        told = " ".join(piece for piece in (before, "{key}", between) if piece)
        colon = rng.choice(("", "", ":", " =", " ->"))
        asking = rng.choice(("", "", "Question: ", "Now: ", f"{rng.choice(GLUE).capitalize()} {rng.choice(GLUE)}? "))
        return f"{told}{colon} {{value}}{rng.choice(ENDS)}", f"{asking}{told}{colon}"

    def _records(self, rng: random.Random, length: int) -> list[tuple[list[int], float]]:
        """Records of one template, then questions about them."""
        kind = rng.choice(("word", "digits"))
        statement, question = self._template(rng)
        num_records = rng.randint(2, max(2, length // 12))
        told_share = rng.uniform(
            0.3, 0.7
        )  # of the tokens; questions fill the rest, again and again where there are few records
        pieces, used = [], 0
        asked = []
        for key, value in make_records(rng, num_records, kind):
            ids = self._ids(statement.format(key=key, value=value))
            if asked and used + len(ids) > told_share * length:
                break
            used += len(ids)
            pieces.append((ids, UNPREDICTABLE_WEIGHT))
            asked.append((key, value))
        rng.shuffle(asked)
        return pieces + self._questions(question, asked, length - used)

    def _needles(self, rng: random.Random, length: int) -> list[tuple[list[int], float]]:
        """One to four statements within text, then questions about them. The text between trains as text."""
        kind = rng.choice(("word", "digits"))
        statement, question = self._template(rng)
        asked = make_records(rng, rng.randint(1, 4), kind)
        filler = max(len(asked), length - 32 * len(asked))
        cuts = sorted(rng.random() ** 1.5 for _ in asked)  # more of them early, far from the question
        pieces, place = [], 0.0
        for (key, value), cut in zip(asked, cuts, strict=True):
            pieces.append((self._crop(rng, 1 + int((cut - place) * filler)).tolist(), 1.0))
            pieces.append((self._ids("\n" + statement.format(key=key, value=value)), UNPREDICTABLE_WEIGHT))
            place = cut
        pieces.append((self._crop(rng, 1 + int((1 - place) * filler)).tolist(), 1.0))
        rng.shuffle(asked)
        pieces.append((self._ids("\n"), 0.0))
        return pieces + self._questions(question, asked, 32 * len(asked))

    def _questions(self, question: str, asked: list[tuple[str, str]], length: int) -> list[tuple[list[int], float]]:
        pieces, used = [], 0
        for key, value in itertools.cycle(asked):
            prompt, answer = self._ids(question.format(key=key)), self._ids(f" {value}")
            pieces += [(prompt, UNPREDICTABLE_WEIGHT), (answer, ANSWER_WEIGHT), (self._ids("\n"), UNPREDICTABLE_WEIGHT)]
            used += len(prompt) + len(answer) + 1
            if used > length:
                break
        return pieces


EPISODES = (Rows._random_copy, Rows._word_copy, Rows._records, Rows._needles)
EPISODE_SHARES = (0.1, 0.1, 0.55, 0.25)
