"""Exact match on recall probes: with a full cache, with a simulated eviction, or with any real cache method.

An answer counts when every one of its tokens is the model's most likely one. Under teacher forcing that is the same as greedy decoding: the first
miss ends both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int

from haversack.probes.tasks import Probe, check_probe

Forward = Callable[
    [Int[torch.Tensor, "batch tokens"], Bool[torch.Tensor, "batch 1 tokens tokens"] | None],
    Float[torch.Tensor, "batch tokens vocab"],
]
"""(token ids (batch, tokens), keep mask (batch, 1, tokens, tokens) bool or None for causal) -> logits (batch, tokens, vocab)."""

Answerer = Callable[[list[int], list[int], int], Sequence[int]]
"""(context ids, question ids, number of answer tokens) -> the tokens the model gives. Where it compresses its cache is its own affair."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every transformers tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """How many tokens a text is: what the task makers steer lengths by."""
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class EncodedProbe:
    """Token ids of a probe, in the order in which a model reads them."""

    context: list[int]
    question: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.context + self.question + self.answer


def encode_probe(probe: Probe, tokenizer: Tokenizer, prefix: Sequence[int] = ()) -> EncodedProbe:
    """Tokens of a checked probe, after `prefix` (a beginning-of-text token, say).

    Raises AnswerInPrompt for a probe that gives itself away and ValueError where the tokenizer merges across the border of question and answer, so
    that no prompt ends where the answer begins.
    """
    check_probe(probe)
    whole = tokenizer.encode(probe.context + probe.question + probe.answer, add_special_tokens=False)
    prompt = tokenizer.encode(probe.context + probe.question, add_special_tokens=False)
    context = tokenizer.encode(probe.context, add_special_tokens=False)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(
            f"the tokenizer merges {probe.question!r} and {probe.answer!r}; let the answer start with a space"
        )
    if prompt[: len(context)] != context:
        raise ValueError(
            f"the tokenizer merges the context and {probe.question!r}; let the context end with a line break"
        )
    return EncodedProbe([*prefix, *context], prompt[len(context) :], whole[len(prompt) :])


def window_mask(num_tokens: int, *, window: int, sinks: int, cut: int) -> Bool[torch.Tensor, "tokens tokens"]:
    """What a cache keeps that is evicted once, after `cut` tokens, to its first `sinks` and last `window` positions. Bool (tokens, tokens).

    Rows are queries, columns keys. Positions before `cut` were read with everything there; later ones see the kept ones and one another. Evicting after
    the context (`cut` = its length) is a question that comes later; evicting one token before the question's end is one that was seen.
    """
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    kept = torch.zeros(num_tokens, dtype=torch.bool)
    kept[:sinks] = True
    kept[max(0, cut - window) :] = True
    causal[cut:] &= kept
    return causal


def exact_match(logits: Float[torch.Tensor, "tokens vocab"], probe: EncodedProbe) -> bool:
    """Whether the most likely tokens, from the question's last position on, are the answer. `logits` (tokens, vocab) over `probe.ids`."""
    start = len(probe.context) + len(probe.question) - 1
    predicted = logits[start : start + len(probe.answer)].argmax(-1).tolist()
    return predicted == probe.answer


@torch.inference_mode()
def score_forward(
    forward: Forward,
    probes: Sequence[EncodedProbe],
    *,
    window: int | None = None,
    sinks: int = 0,
    question_seen: bool = False,
    batch_size: int = 8,
) -> list[bool]:
    """Exact match of each probe, by forward passes; with `window`, as if the cache were cut to it and to the sinks.

    The cut falls after the context, or, with `question_seen`, right before the question's last token. A shorter probe is padded on the right, where
    causality keeps it unseen.
    """
    hits = []
    for start in range(0, len(probes), batch_size):
        batch = probes[start : start + batch_size]
        num_tokens = max(len(probe.ids) for probe in batch)
        ids = torch.zeros(len(batch), num_tokens, dtype=torch.long)
        masks = None if window is None else torch.zeros(len(batch), 1, num_tokens, num_tokens, dtype=torch.bool)
        for row, probe in enumerate(batch):
            ids[row, : len(probe.ids)] = torch.tensor(probe.ids)
            if masks is not None and window is not None:
                cut = len(probe.context) + (len(probe.question) - 1 if question_seen else 0)
                masks[row, 0] = window_mask(num_tokens, window=window, sinks=sinks, cut=cut)
        logits = forward(ids, masks)
        hits += [exact_match(logits[row], probe) for row, probe in enumerate(batch)]
    return hits


def score_answers(answer: Answerer, probes: Sequence[EncodedProbe]) -> list[bool]:
    """Exact match of each probe as answered by a real decoding loop over whatever cache it likes."""
    return [list(answer(probe.context, probe.question, len(probe.answer))) == probe.answer for probe in probes]
