"""From a row to tokens, and which of them are trained on: all of a text, the completion of a prompt, a chat's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from haversack.samples.read import BadRow, DataError, Row

TEXT, COMPLETION, CHAT, PAIRS = "text", "prompt and completion", "chat", "chosen and rejected"
FORMS = {
    TEXT: "plain text, or rows with `text`",
    COMPLETION: "rows with `prompt` and `completion`",
    CHAT: "rows with `messages`, each with `role` and `content`",
    PAIRS: "rows with `prompt`, `chosen` and `rejected`",
}
"""What a file may hold. All its rows have one form: the first good row's."""


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether the model is trained to give it."""

    ids: list[int]
    trained: list[bool]


class BadSample(ValueError):
    """Why a row gives no sample, in one sentence."""


class Tokenizing:
    """Makes rows into samples with a tokenizer.

    A text's documents and completions end with the tokenizer's end token; answers of a chat end as its template ends them. Raises DataError,
    when a form is met that the tokenizer can't serve: completions without an end token, a chat without a template.
    """

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer = tokenizer
        self.name = name
        self.form: str | None = None

    def samples(self, row: Row) -> tuple[Sample, ...] | BadRow:
        """A row's sample, of a pair the chosen and the rejected one, or what is wrong with it."""
        try:
            form = _form_of(row.value)
            if self.form is None:
                self._check_form(form)
                self.form = form
            if form != self.form:
                raise BadSample(f"it is a row of {form} in data of {self.form}")
            if form == PAIRS:
                return self.pair(row)
            return (getattr(self, _METHODS[form])(row),)
        except BadSample as error:
            return BadRow(row.file, row.number, str(error))

    def text(self, row: Row) -> Sample:
        """All of a text, with the end token where a document ends."""
        text = row.value if isinstance(row.value, str) else row.value["text"]
        if not isinstance(row.value, str) and not text.strip():
            raise BadSample("its text is empty")
        ids = self._ids(text)
        end = self.tokenizer.eos_token_id
        if row.ends and end is not None:
            ids = [*ids, end]
        return Sample(ids, [True] * len(ids))

    def completion(self, row: Row) -> Sample:
        """Prompt and completion as they are, one after the other; the completion and the end token are trained on."""
        prompt, completion = row.value["prompt"], row.value["completion"]  # type: ignore[index]
        return self._completion(prompt, completion, "completion")

    def pair(self, row: Row) -> tuple[Sample, ...]:
        """The prompt with the chosen answer, and with the rejected one; what is counted of both is the answer. Chats may leave the
        prompt out: it is what both begin with."""
        prompt, chosen, rejected = (row.value.get(name) for name in ("prompt", "chosen", "rejected"))  # type: ignore[union-attr]
        if chosen == rejected:
            raise BadSample("its chosen and its rejected answer are the same")
        if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
            same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
            prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        return tuple(
            self._completion(prompt, answer, name) for name, answer in (("chosen", chosen), ("rejected", rejected))
        )

    def _completion(self, prompt: Any, completion: Any, name: str) -> Sample:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            if isinstance(prompt, list) and isinstance(completion, list):
                return self._chat([*prompt, *completion], first=len(prompt))
            raise BadSample(f"`prompt` and `{name}` must both be text, or both be lists of messages")
        if not completion.strip():
            raise BadSample(f"its {name} is empty" if name == "completion" else f"its {name} answer is empty")
        before = self._ids(prompt) if prompt else []
        begin = self.tokenizer.bos_token_id
        if not before and begin is not None:
            before = [begin]  # the first token of the completion needs something before it
        after = [*self.tokenizer(completion, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return Sample([*before, *after], [False] * len(before) + [True] * len(after))

    def chat(self, row: Row) -> Sample:
        """A chat as the tokenizer's template writes it; what the assistant says is trained on, to the end that the
        template gives it."""
        return self._chat(row.value["messages"], first=0)  # type: ignore[index]

    def _chat(self, messages: Any, first: int) -> Sample:
        """Answers from message `first` on are found by rendering the chat up to each of them: the text that comes on top."""
        _check_messages(messages)
        if self.tokenizer.chat_template is None:
            raise DataError(_NO_TEMPLATE.format(name=self.name))
        whole = self._render(messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < first:
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            until = self._render(messages[: index + 1])
            if not (until.startswith(before) and whole.startswith(until)):
                if index + 1 < len(messages):
                    raise BadSample(
                        "the chat template rewrites earlier turns, so that answers before the last can't be told"
                    )
                raise BadSample("the chat template begins an answer in another way than it asks for one")
            spans.append((len(before), len(until)))
        if not spans:
            raise BadSample("it has no message of the role 'assistant' to train on")
        coded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        trained = [
            any(start < until and end > before for before, until in spans) for start, end in coded["offset_mapping"]
        ]
        return Sample(list(coded["input_ids"]), trained)

    def _render(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
        except Exception as error:  # templates raise whatever they like
            raise BadSample(f"the chat template refuses it: {' '.join(str(error).split())[:120]}") from None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _check_form(self, form: str) -> None:
        if form in (COMPLETION, PAIRS) and self.tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {self.name} has no end token, so that a tuned model would never stop; set `eos_token` in its "
                "tokenizer_config.json."
            )
        if form == CHAT and self.tokenizer.chat_template is None:
            raise DataError(_NO_TEMPLATE.format(name=self.name))
        if form == CHAT and not self.tokenizer.is_fast:
            raise DataError(
                f"the tokenizer of {self.name} gives no positions in the text; a chat needs a fast tokenizer."
            )


_METHODS = {TEXT: "text", COMPLETION: "completion", CHAT: "chat"}
_NO_TEMPLATE = (
    "the tokenizer of {name} has no chat template, so that a chat can't be written down for it; add chat_template.jinja to "
    "its folder, or give rows of prompt and completion."
)


def _form_of(value: str | dict[str, Any]) -> str:
    if isinstance(value, str):
        return TEXT
    if "chosen" in value and "rejected" in value:
        return PAIRS
    if "messages" in value:
        return CHAT
    if "prompt" in value and "completion" in value:
        return COMPLETION
    if "text" in value:
        if not isinstance(value["text"], str):
            raise BadSample(f"its text is {_kind(value['text'])}, not text")
        return TEXT
    found = ", ".join(sorted(map(str, value))[:6]) or "none"
    raise BadSample(
        f"its fields ({found}) are none of: text; prompt and completion; messages; prompt, chosen and rejected"
    )


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadSample(f"its messages are {_kind(messages)}, not a list of some")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadSample(f"message {number} has no role")
        if not isinstance(message.get("content"), str):
            raise BadSample(f"message {number} has {_kind(message.get('content'))} as its content, not text")


def _kind(value: Any) -> str:
    return "nothing" if value in (None, [], {}) else f"a {type(value).__name__}"
