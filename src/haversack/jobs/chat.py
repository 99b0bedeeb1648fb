"""Several turns with a packed folder: the folder's own chat template, and a cache that is kept from turn to turn.

At each turn the whole conversation is rendered again, for templates may rewrite what was said before (some drop earlier
reasoning). The cache keeps the longest beginning that both renderings share, and only the rest is computed. When a
conversation outgrows the planned context, its oldest turns are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.errors import DoesNotFitError, PlanError, UsageError
from haversack.jobs.answer import Ends, answer
from haversack.jobs.interrupt import stoppable
from haversack.jobs.run import check_new_tokens, check_prompt, load, open_decoder, open_tokenizer

if TYPE_CHECKING:
    from haversack.engine.choice import Choice

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

KEPT_SHARE = 0.5
"""Of the context, what the conversation may fill after turns were forgotten. Forgetting moves all that follows, so that the
rest is computed again: fewer would be forgotten, and it would happen at every turn."""


class Chat:
    """A conversation with a loaded model. `turns` holds a question and its answer each; `notes` what to know beforehand.

    Raises PlanError for a folder that is not packed, or whose template can't be used; UsageError for a system message
    that the template refuses; DoesNotFitError for one that leaves no room.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        choice: Choice | None = None,
        budget: str | int | None = None,
    ):
        from haversack.engine.sampling import Sampler, end_strings, end_tokens
        from haversack.engine.sequence import PlannedSequence

        check_new_tokens(max_new_tokens)
        self.folder = folder
        self.model, self.tokenizer = load(folder, budget), open_tokenizer(folder)
        self.capacity_tokens: int = self.model.haversack.kv_plan.capacity_tokens
        self.max_new_tokens = max_new_tokens
        self.sampler = Sampler(self.model.generation_config, choice)
        self.decoder, self.loop_reason = open_decoder(self.model)
        self.sequence = PlannedSequence(self.model, self.model.haversack.kv_plan, decoder=self.decoder)
        self.turns: list[tuple[str, str]] = []
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        templated = bool(getattr(self.tokenizer, "chat_template", None))
        self._render: TemplateRendering | PlainRendering
        self._render = TemplateRendering(self.tokenizer) if templated else PlainRendering(self.tokenizer)
        config = self.model.generation_config
        self._ends = Ends(
            end_tokens(config, self.tokenizer) | self._render.end_tokens, end_strings(config) + self._render.end_strings
        )
        self.notes = (*self._render.notes, *self.sampler.notes)
        check_prompt(self._ids("?"), self.model, folder)

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns.clear()

    def say(
        self,
        message: str,
        on_text: Callable[[str], None] | None = None,
        on_forget: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Answer one message; the text, why it ended, and what it took. `on_forget` is told before turns are forgotten.

        Ctrl-C ends the answer alone; what was said until then stays in the conversation. Raises UsageError for an empty
        message, DoesNotFitError for one beyond the context; the conversation is then as it was.
        """
        if not message.strip():
            raise UsageError("the message is empty; write some words.")
        ids, forgotten = self._fitted(message)
        if forgotten and on_forget is not None:
            on_forget(forgotten)
        room = self.capacity_tokens + 1 - len(ids)  # the last token is never stored
        kept = self.sequence.rewind(min(_shared(self.sequence.tokens, ids), len(ids) - 1))
        with stoppable() as stopped:
            given = answer(
                self.sequence,
                ids[kept:],
                self.sampler,
                self.tokenizer,
                max_new_tokens=min(self.max_new_tokens or room, room),
                ends=self._ends,
                on_text=on_text,
                stopped=stopped,
            )
        del self.turns[:forgotten]
        if given.tokens:
            self.turns.append((message, given.text))
        cut = given.finish == "length" and len(given.tokens) == room
        return {
            "text": given.text,
            "finish": "context" if cut else given.finish,
            "prompt_tokens": len(ids),
            "read_tokens": len(ids) - kept,
            "new_tokens": len(given.tokens),
            "forgotten_turns": forgotten,
            "context_tokens": self.capacity_tokens,
            "seconds_to_first_token": given.seconds_to_first_token,
            "tokens_per_second": given.tokens_per_second,
            "sampling": self.sampler.settings,
        }

    def _fitted(self, message: str) -> tuple[list[int], int]:
        """The conversation's tokens with room for an answer, and how many turns must be forgotten for it."""
        wanted = self.max_new_tokens or self.model.haversack.plan["workload"]["generate_tokens"]
        room = max(1, min(wanted, self.capacity_tokens // 2))
        ids, forgotten = self._ids(message), 0
        limit = self.capacity_tokens + 1 - room
        while len(ids) > limit and forgotten < len(self.turns):
            forgotten += 1
            limit = min(limit, int(self.capacity_tokens * KEPT_SHARE))
            ids = self._ids(message, forgotten)
        if len(ids) > self.capacity_tokens:
            raise DoesNotFitError(
                f"the message makes {len(ids)} tokens with its frame, but the plan holds {self.capacity_tokens}; "
                "shorten it, or pack with a longer --context."
            )
        return ids, forgotten

    def _ids(self, message: str, forgotten: int = 0) -> list[int]:
        messages = list(self._system)
        for question, reply in self.turns[forgotten:]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return self._render([*messages, {"role": "user", "content": message}])


def _shared(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    both = zip(held, wanted)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(held), len(wanted)))


class TemplateRendering:
    """Messages as the folder's chat template writes them, up to where the assistant begins."""

    notes: tuple[str, ...] = ()
    end_strings: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.end_tokens = frozenset(self._turn_end())

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        return list(self._tokenizer(self._text(messages), add_special_tokens=False)["input_ids"])

    def _text(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
        """Raises UsageError for a conversation that the template refuses, PlanError where it can't be used at all."""
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            problem: str | None = f"line {error.lineno}: {error.message}"
        except jinja2.TemplateError as error:  # what a template raises on purpose
            if any(message["role"] == "system" for message in messages):
                raise UsageError(
                    f"this model's chat template refuses the conversation ({_line(error)}); leave --system out."
                ) from None
            problem = _line(error)
        except Exception as error:  # templates are programs, and fail as programs do
            problem = f"{type(error).__name__}: {_line(error)}"
        raise PlanError(f"the folder's chat template can't be used ({problem}); mend it, or run without --chat.")

    def _turn_end(self) -> list[int]:
        """The special token that the template writes after an assistant's words: a model ends its turn with it, whatever its
        generation config says."""
        words = "words"
        text = self._text([{"role": "user", "content": "?"}, {"role": "assistant", "content": words}], prompt=False)
        after = text[text.rfind(words) + len(words) :].lstrip()
        special = {token.content: i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return [i for content, i in special.items() if after.startswith(content)]


class PlainRendering:
    """Messages as plain text, for a model without a chat template: names before colons, as in a play."""

    end_tokens: frozenset[int] = frozenset()
    end_strings = ("\nUser:",)
    notes = (
        "this folder has no chat template, so turns are written as plain text (User: ... Assistant: ...), "
        "which its model was not trained on",
    )

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        begins = {"system": "", "user": "User: ", "assistant": "Assistant:"}
        ends = {"system": "\n\n", "user": "\n", "assistant": "\n"}
        told = [begins[message["role"]] + message["content"] + ends[message["role"]] for message in messages]
        return list(self._tokenizer("".join([*told, begins["assistant"]]))["input_ids"])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(".")
