"""Workloads refuse what makes no sense, by field, and round-trip."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haversack.describe.workload import ServeWorkload, check_positions
from haversack.errors import PlanError, UsageError

workloads = st.builds(
    ServeWorkload,
    st.integers(1, 10_000),
    st.integers(0, 10_000),
    users=st.integers(1, 64),
    prefill_chunk_tokens=st.none() | st.integers(1, 5_000),
    min_tokens_per_second=st.none() | st.floats(0.1, 1e6),
)


@given(workloads)
def test_round_trips_through_json(workload):
    assert ServeWorkload.from_dict(json.loads(json.dumps(workload.to_dict()))) == workload


@given(workloads, st.none() | st.integers(1, 5_000))
def test_chunks_cover_the_prompt(workload, chunk_tokens):
    chunks = workload.prefill_chunks(chunk_tokens)
    assert sum(chunks) == workload.prompt_tokens
    limit = chunk_tokens or workload.prefill_chunk_tokens or workload.prompt_tokens
    assert all(0 < chunk <= limit for chunk in chunks)
    assert len(set(chunks[:-1])) <= 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0, but must be a whole number of at least 1"),
        ({"prompt_tokens": 1.5}, "prompt_tokens is 1.5"),
        ({"prompt_tokens": True}, "prompt_tokens is True"),
        ({"generate_tokens": -1}, "generate_tokens is -1"),
        ({"users": 0}, "users is 0"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens is 0"),
        ({"min_tokens_per_second": 0}, "min_tokens_per_second is 0"),
        ({"min_tokens_per_second": float("nan")}, "min_tokens_per_second is nan"),
    ],
)
def test_nonsense_is_refused_by_field(fields, complaint):
    numbers = {"prompt_tokens": 8, "generate_tokens": 8} | fields
    with pytest.raises(UsageError, match=complaint):
        ServeWorkload(**numbers)
    with pytest.raises(PlanError, match=complaint):
        ServeWorkload.from_dict({"task": "serve", **numbers})


def test_other_tasks_and_fields_are_refused():
    with pytest.raises(PlanError, match="'tune'"):
        ServeWorkload.from_dict({"task": "tune"})
    with pytest.raises(PlanError, match="speed"):
        ServeWorkload.from_dict({"task": "serve", "prompt_tokens": 1, "generate_tokens": 1, "speed": 3})


def test_context_beyond_the_positions_is_refused():
    workload = ServeWorkload(1000, 25)
    check_positions(workload, 1025, "a model")
    check_positions(workload, None, "a model")
    with pytest.raises(UsageError, match=r"need 1025 positions, but a model has 1024; ask for at most 1024"):
        check_positions(workload, 1024, "a model")
