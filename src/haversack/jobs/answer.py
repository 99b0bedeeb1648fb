"""One answer: read what is new, choose token after token, stream the text, and stop where the model or the user says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haversack.engine.sampling import Sampler
    from haversack.engine.sequence import TokenSequence

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


@dataclass(frozen=True)
class Ends:
    """What ends an answer besides its length: tokens, and words."""

    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The text without what ended it; why it ended: `stop` (the model said so), `length`, or `interrupted`; and times."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    seconds_to_first_token: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone, after the first token."""
        decoding = self.seconds - self.seconds_to_first_token
        return (len(self.tokens) - 1) / decoding if len(self.tokens) > 1 and decoding > 0 else 0.0


def answer(
    sequence: TokenSequence,
    prompt: Sequence[int],
    sampler: Sampler,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    ends: Ends,
    on_text: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Read `prompt` (the tokens that the sequence does not hold yet) and answer it.

    The last token is never stored: the sequence ends with the answer's last but one. `stopped` is asked between chunks
    of the prompt and between tokens.
    """
    started = time.perf_counter()
    text = StreamedText(tokenizer, ends.strings, on_text)
    new: list[int] = []
    first = 0.0
    logits = sequence.read(prompt, stopped)
    finish = "interrupted" if logits is None else "length"
    while logits is not None:
        token = sampler.choose(logits, sequence.tokens)
        new.append(token)
        first = first or time.perf_counter() - started
        if token in ends.tokens or text.add(token):
            finish = "stop"
            break
        if len(new) >= max_new_tokens:
            break
        if stopped():
            finish = "interrupted"
            break
        logits = sequence.read([token])
    text.finish()
    seconds = time.perf_counter() - started
    return Answer(text.text, tuple(new), finish, first or seconds, seconds)


class StreamedText:
    """Tokens as text, passed on as soon as it is certain: whole characters, and nothing that may begin an end string."""

    def __init__(self, tokenizer: Any, end_strings: Sequence[str], on_text: Callable[[str], None] | None):
        self.text = ""
        self._tokenizer = tokenizer
        self._end_strings = end_strings
        self._on_text = on_text
        self._tokens: list[int] = []
        self._begin = self._read = 0  # tokens before `_begin` are done with; those before `_read` are in `text`
        self._shown = 0

    def add(self, token: int) -> bool:
        """Take one more token; whether an end string is complete, which is then cut off."""
        self._tokens.append(token)
        self._take(final=False)
        ends = [at for words in self._end_strings if (at := self.text.find(words, self._shown)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            return True
        self._show(len(self.text) - self._held_back())
        return False

    def finish(self) -> None:
        """Pass on what was held back."""
        self._take(final=True)
        self._show(len(self.text))

    def _take(self, *, final: bool) -> None:
        """Append the text of new tokens. Decoding starts a few tokens back, since many decoders treat a first one differently."""
        before, now = self._decode(self._tokens[self._begin : self._read]), self._decode(self._tokens[self._begin :])
        if now.endswith(UNFINISHED) and not final:
            return
        self.text += now[len(before) :]
        self._begin, self._read = self._read, len(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _held_back(self) -> int:
        """Characters at the end that may begin an end string."""
        return max(
            (n for words in self._end_strings for n in range(1, len(words)) if self.text.endswith(words[:n])), default=0
        )

    def _show(self, until: int) -> None:
        if until > self._shown:
            if self._on_text is not None:
                self._on_text(self.text[self._shown : until])
            self._shown = until
