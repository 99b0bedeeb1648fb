"""The suite of probes: what each kind asks stands where it should, and is scored where it should."""

from __future__ import annotations

import pytest
import torch

from haversack.probes.suite import NUM_STATEMENTS, TEXT_TOKENS, make_conversations, make_suite

TEXT = "".join(f"line {i} of a long and dull text about nothing much\n" for i in range(2000))


class ByteTokenizer:
    """One token per byte: merges nothing."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def said(ids) -> str:
    return bytes(ids).decode()


@pytest.fixture(scope="module")
def suite():
    return make_suite(ByteTokenizer(), TEXT, context_tokens=1200, num_per_kind=3)


def test_every_kind_is_there_as_often_as_asked(suite):
    kinds = [task.kind for task in suite]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("needle", "needles in a row", "several questions", "records", "copying", "text at 300", "text at 600", "text at 1200"), 3
    )  # fmt: skip
    assert all(len(task.context) <= 1200 for task in suite)


def test_answers_are_stated_in_the_context_and_not_in_the_question(suite):
    for task in suite:
        for turn in task.turns:
            if task.announced:
                assert said(turn.answer) in said(task.context)
                assert said(turn.answer).split()[0] not in said(turn.question).split()
            else:
                assert len(turn.question) == 1 and len(turn.answer) == TEXT_TOKENS


def test_several_statements_are_all_asked(suite):
    for task in suite:
        expected = NUM_STATEMENTS if task.kind in ("needles in a row", "several questions") else 1
        assert len({turn.answer for turn in task.turns}) == len(task.turns) == expected
        assert task.in_a_row == (task.kind == "needles in a row")


def test_statements_stand_all_over_the_context(suite):
    """Each in its own share of the text, so that neither sinks nor a window hold them all."""
    for task in suite:
        if task.kind == "several questions":
            places = sorted(said(task.context).index(said(turn.answer)) / len(task.context) for turn in task.turns)
            assert places[0] < 0.3 and places[-1] > 0.7


def test_asked_before_the_questions_stand_ahead_and_nothing_else_changes(suite):
    task = suite[0]
    before = task.asked_before()
    assert said(before.context).startswith(said(task.turns[0].question))
    assert before.context[len(task.announced) :] == task.context and before.turns == task.turns


def test_the_same_seed_gives_the_same_suite(suite):
    assert make_suite(ByteTokenizer(), TEXT, context_tokens=1200, num_per_kind=3) == suite
    assert make_suite(ByteTokenizer(), TEXT, context_tokens=1200, num_per_kind=3, seed=1) != suite


def test_a_text_too_short_is_refused():
    with pytest.raises(ValueError, match="probes of 1200 need"):
        make_suite(ByteTokenizer(), TEXT[:2000], context_tokens=1200, num_per_kind=1)


def test_rows_end_with_their_answers_and_score_what_predicts_them(suite):
    from haversack.cost.cache_damages import TEXT as TEXT_KIND
    from haversack.cost.cache_damages import probe_rows

    filler = list(TEXT.encode())
    rows = probe_rows(suite, filler, 1300)
    asked = [task for task in suite if task.announced]
    assert rows.token_ids.shape == (len(asked) + 1, 1300)
    assert next(iter(rows.scored)) == TEXT_KIND
    assert rows.scored[TEXT_KIND].sum() == 1300
    for row, task in enumerate(asked):
        places = rows.scored[task.kind][row].nonzero().squeeze(1)
        turns = task.turns if task.in_a_row else task.turns[:1]
        answers = [token for turn in turns for token in turn.answer]
        assert rows.token_ids[row][places + 1].tolist() == answers
        assert int(places[-1]) == 1298
        assert sum(int(mask[row].sum()) for mask in rows.scored.values()) == len(answers)
    assert torch.equal(rows.token_ids[-1], torch.tensor(filler[:1300]))


def test_conversations_come_back_to_each_topic_and_ask_of_what_was_said_there():
    tasks = make_conversations(ByteTokenizer(), context_tokens=1500, num_topics=3, num_conversations=2)
    assert len(tasks) == 2
    for task in tasks:
        context = said(task.context)
        assert len(context) >= 1500 and len(task.turns) == 3 and not task.in_a_row
        for turn in task.turns:
            opening, question = said(turn.question).split("\n", 1)
            visits = context.split(opening + "\n")[1:]
            own = [visit.split("Let us talk")[0] for visit in visits]
            assert len(own) > 2 and sum(said(turn.answer).strip() in visit for visit in own) >= 1
            assert said(turn.answer) not in question
    for number in (0, 9):
        with pytest.raises(ValueError, match=f"{number} topics were asked; there are forms for 1 to"):
            make_conversations(ByteTokenizer(), context_tokens=500, num_topics=number, num_conversations=1)
    with pytest.raises(ValueError, match="takes more words than there are"):
        make_conversations(ByteTokenizer(), context_tokens=50_000, num_topics=2, num_conversations=1)
