"""The scorer, on cases whose score is known by construction, before any model is scored with it."""

import random

import pytest
import torch

from haversack.probes import (
    HELD_OUT,
    SEEN,
    AnswerInPrompt,
    EncodedProbe,
    Probe,
    check_probe,
    encode_probe,
    make_copy,
    make_recall,
    score_answers,
    score_forward,
    token_counter,
    window_mask,
)

VOCAB_SIZE = 300


class ByteTokenizer:
    """One token per byte: merges nothing, so every border is kept."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


class MergingTokenizer(ByteTokenizer):
    """Merges a colon with the space after it: the border of a question that ends in a colon is lost."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return super().encode(text.replace(": ", "\x01"), add_special_tokens=add_special_tokens)


def perfect_copier(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Induction by construction: what followed the longest earlier match of the last tokens, among positions that the mask lets it see."""
    logits = torch.zeros(*ids.shape, VOCAB_SIZE)
    for row, tokens in enumerate(ids.tolist()):
        for here in range(len(tokens)):
            visible = range(here) if mask is None else [j for j in range(here) if mask[row, 0, here, j]]
            longest, follower = 0, None
            for there in visible:
                if there + 1 >= here or (mask is not None and not mask[row, 0, here, there + 1]):
                    continue
                length = 0
                while length <= there and tokens[there - length] == tokens[here - length]:
                    length += 1
                if length > longest:
                    longest, follower = length, tokens[there + 1]
            if follower is not None:
                logits[row, here, follower] = 1.0
    return logits


def probes(template: str, kind: str, distance_tokens: int, num_probes: int = 4) -> list[EncodedProbe]:
    rng = random.Random(f"{template}/{kind}/{distance_tokens}")
    tokenizer = ByteTokenizer()
    count = token_counter(tokenizer)
    made = [
        make_recall(rng, count, distance_tokens=distance_tokens, template=template, kind=kind)
        for _ in range(num_probes)
    ]
    return [encode_probe(probe, tokenizer) for probe in made]


@pytest.mark.parametrize("kind", ["word", "digits"])
@pytest.mark.parametrize("template", ["code", "pair", "box"])
def test_a_perfect_copier_scores_one(template, kind):
    assert score_forward(perfect_copier, probes(template, kind, 200)) == [True] * 4


def test_a_perfect_copier_copies_lists():
    rng = random.Random(0)
    tokenizer = ByteTokenizer()
    probe = encode_probe(make_copy(rng, token_counter(tokenizer), num_tokens=64), tokenizer)
    assert 48 <= len(probe.answer) <= 64
    assert score_forward(perfect_copier, [probe]) == [True]


def test_a_constant_model_scores_zero():
    def constant(ids, mask):
        return torch.zeros(*ids.shape, VOCAB_SIZE)

    assert score_forward(constant, probes("code", "word", 100)) == [False] * 4


def test_every_token_of_an_answer_must_match():
    probe = probes("pair", "digits", 120, 1)[0]

    def wrong_at_the_end(ids, mask):
        logits = perfect_copier(ids, mask)
        logits[:, len(probe.ids) - 2] = 0
        return logits

    assert score_forward(wrong_at_the_end, [probe]) == [False]


def test_padding_changes_no_score():
    short, long = probes("code", "word", 60, 1)[0], probes("code", "word", 240, 1)[0]
    assert score_forward(perfect_copier, [short, long]) == [True, True]


def test_beyond_the_window_nothing_is_found_and_within_it_everything():
    far, near = probes("pair", "word", 240), probes("pair", "word", 40)
    assert score_forward(perfect_copier, far, window=128, sinks=4) == [False] * 4
    assert score_forward(perfect_copier, near, window=128, sinks=4) == [True] * 4


def test_a_window_as_long_as_the_text_is_a_full_cache():
    assert score_forward(perfect_copier, probes("pair", "word", 240), window=10_000) == [True] * 4


def test_an_answer_in_the_prompt_is_caught():
    with pytest.raises(AnswerInPrompt):
        check_probe(Probe("The lake code is wolf.\n", "The lake code is wolf", " wolf"))
    with pytest.raises(AnswerInPrompt):  # only its first token
        check_probe(Probe("The lake code is wolf.\n", "The lake code is w", " wolf"))
    with pytest.raises(AnswerInPrompt):  # the space that starts it
        check_probe(Probe("The lake code is wolf.\n", "The lake code is ", " wolf"))
    with pytest.raises(AnswerInPrompt):  # never stated
        check_probe(Probe("The lake code is bear.\n", "The lake code is", " wolf"))


def test_a_border_lost_in_merging_is_caught():
    with pytest.raises(ValueError, match="merges"):
        encode_probe(Probe("lake: wolf\n", "lake:", " wolf"), MergingTokenizer())


@pytest.mark.parametrize("form", ["records", "needle"])
@pytest.mark.parametrize("template", [*SEEN, *HELD_OUT])
def test_the_statement_stands_at_the_distance(template, form):
    rng = random.Random(3)
    count = len
    filler = "".join(f"line number {i} of a long and dull text\n" for i in range(2000))
    probe = make_recall(
        rng, count, distance_tokens=900, template=template, kind="word", form=form, filler=filler, preamble_tokens=100
    )
    check_probe(probe)
    distance = len(probe.context) - probe.context.index(probe.answer)
    assert 900 - 2 * 60 < distance <= 900
    assert probe.context.count(probe.answer.strip()) >= 1


def test_held_out_templates_are_no_seen_ones():
    assert not set(HELD_OUT) & set(SEEN)
    assert not set(HELD_OUT.values()) & set(SEEN.values())


def test_window_mask_by_hand():
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],  # read before the eviction, with everything there
            [1, 0, 0, 1, 1, 0],  # after it: one sink, a window of one, and what came since
            [1, 0, 0, 1, 1, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(window_mask(6, window=1, sinks=1, cut=4), expected)


def test_a_question_seen_reads_the_context_before_the_cut():
    probe = probes("pair", "word", 240, 1)[0]
    seen = []

    def spy(ids, mask):
        seen.append(mask)
        return torch.zeros(*ids.shape, VOCAB_SIZE)

    score_forward(spy, [probe], window=16, sinks=4, question_seen=True)
    score_forward(spy, [probe], window=16, sinks=4)
    last_but_one = len(probe.context) + len(probe.question) - 2
    assert seen[0][0, 0, last_but_one].sum() == last_but_one + 1
    assert seen[1][0, 0, last_but_one].sum() == 4 + 16 + len(probe.question) - 1


def test_answers_of_a_decoding_loop():
    probe = probes("pair", "word", 100, 1)[0]
    assert score_answers(lambda context, question, num: probe.answer[:num], [probe]) == [True]
    assert score_answers(lambda context, question, num: [1] * num, [probe]) == [False]
