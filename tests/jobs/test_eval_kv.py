"""`haversack eval kv` on the smaller shipped model: what it reports, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from haversack import data
from haversack.cli.app import run
from haversack.errors import DoesNotFitError, UnsupportedModelError, UsageError
from haversack.jobs.eval_kv import evaluate_caches

FOLDER = data.reference_model("b")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report():
    return evaluate_caches(
        FOLDER, policies=["sinks-and-window", "h2o"], num_bytes="40%", context_tokens=256, num_per_kind=1
    )


def test_every_policy_is_probed_within_its_bytes(report):
    names = [row["policy"] for row in report["policies"]]
    assert names == ["whole", "sinks-and-window", "h2o"]
    whole, *others = report["policies"]
    assert whole["worst_kl"] == 0 and whole["held_bytes"] == report["whole_cache_bytes"]
    for row in others:
        assert 0.25 * report["whole_cache_bytes"] < row["held_bytes"] <= report["budget_bytes"]
        assert row["worst_kl"] == max(f["kl"] for ways in row["probes"].values() for f in ways.values()) > 0


def test_a_window_loses_nothing_of_what_it_holds_and_much_of_what_it_does_not(report):
    """The last quarter of a text lies in the window, needles all over the context don't."""
    window = report["policies"][1]["probes"]
    assert window["text at 64"]["after"]["kl"] < 1e-3
    assert window["text at 64"]["after"]["exact"] is None and "before" not in window["text at 64"]
    assert window["several questions"]["after"]["kl"] > 0.05


def test_the_verb_prints_json(capsys):
    args = ["eval", "kv", str(FOLDER), "--kv", "kivi", "--context", "256", "--probes", "1", "--json"]
    assert run(args) == 0
    report = json.loads(capsys.readouterr().out)
    labels = [row["label"] for row in report["policies"][1:]]
    assert report["budget_bytes"] is None and len(labels) == 4 and labels[0].startswith("K2V2")


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"num_bytes": "1%", "policies": ["h2o"]}, DoesNotFitError, "its smallest form .* takes"),
        ({"context_tokens": 4096}, UsageError, "has 2048 positions, of which half are for the context"),
        ({"context_tokens": 100}, UsageError, "choose 256 to 1024"),
        ({"policies": ["snapkv"]}, UsageError, "there is no cache policy 'snapkv'; there are plan, all, "),
        ({"policies": ["plan"]}, UsageError, "is not packed, so it has no planned cache"),
        ({"num_per_kind": 0}, UsageError, "--probes is 0"),
        ({"policies": ["cake"]}, UsageError, "it is for a byte budget; give --bytes"),
        ({"text": "too short"}, UsageError, "can't be probed: the text has"),
    ],
)
def test_senseless_questions_are_refused(asked, error, message):
    with pytest.raises(error, match=message):
        evaluate_caches(FOLDER, **{"context_tokens": 256, "num_per_kind": 1, "policies": ["h2o"], **asked})


def test_a_family_out_of_reach_is_named_with_what_can_be_done():
    from tests.describe.families import FAMILIES

    from haversack.describe.model import describe_model
    from haversack.jobs.eval_kv import _check_reachable

    hidden = [name for name, config in FAMILIES.items() if not _plain(describe_model(config))]
    assert hidden
    for name in hidden:
        with pytest.raises(UnsupportedModelError, match=r"no cache policy reaches it; its weights can be packed"):
            _check_reachable(describe_model(FAMILIES[name]))


def _plain(model) -> bool:
    return not any(s.shares_with is not None or s.chunk_tokens is not None or s.is_latent for s in model.attention)
