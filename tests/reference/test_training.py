"""The trainer's promises on a model of a few thousand weights: resuming changes nothing, export computes the same, rows hold what they should."""

import numpy as np
import pytest
import torch
from reference.card import round_to_grid
from reference.curriculum import PHASES, Rows
from reference.data import drop_duplicates
from reference.export import export
from reference.model import ModelConfig, ReferenceModel
from reference.tokenizer import encode_documents, train
from reference.train import Run

from haversack.probes import HELD_OUT, SEEN

TEXT = "The lake code is wolf. Table access, key and value; def function(argument): return 123\n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train([TEXT])


def config(architecture: str, vocab_size: int) -> ModelConfig:
    num_kv_heads = 1 if architecture == "qwen3" else 2
    return ModelConfig(
        architecture,
        32,
        2,
        2,
        num_kv_heads,
        head_dim=16,
        ffn_size=64,
        seed=5,
        vocab_size=vocab_size,
        shared_embedding=True,
    )


def rows(tokenizer, seed: int = 0) -> Rows:
    tokens = encode_documents(tokenizer, TEXT)
    return Rows(tokenizer, {"prose": tokens, "code": tokens}, seed)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_resumed_run_is_the_uninterrupted_one(tokenizer, tmp_path, architecture):
    def make() -> Run:
        return Run("tiny", config(architecture, len(tokenizer)), rows(tokenizer), tmp_path, "cpu", compiled=False)

    whole, first, second = make(), make(), make()
    for _ in range(4):
        whole.train_step(1.0)
    for _ in range(2):
        first.train_step(1.0)
    first.save(tmp_path / "stable.safetensors")
    second.load(tmp_path / "stable.safetensors")
    for _ in range(2):
        second.train_step(1.0)
    assert second.progress == whole.progress
    for expected, found in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_transformers_computes_the_same_logits(tokenizer, tmp_path, architecture):
    model = ReferenceModel(config(architecture, len(tokenizer)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that no layer adds nothing
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    export(model, tmp_path, tokenizer)  # raises where logits differ
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    }


def test_rows_are_a_function_of_seed_and_step(tokenizer):
    tokens, weights = rows(tokenizer).batch(7, PHASES[1], 8)
    again, _ = rows(tokenizer).batch(7, PHASES[1], 8)
    other, _ = rows(tokenizer).batch(8, PHASES[1], 8)
    assert tokens.shape == (8, PHASES[1].seq_len + 1)
    assert weights.shape == (8, PHASES[1].seq_len)
    assert np.array_equal(tokens, again)
    assert not np.array_equal(tokens, other)


def test_the_held_out_template_is_never_trained_on(tokenizer):
    drawn = rows(tokenizer)
    text = "".join(tokenizer.decode(row) for step in range(20) for row in drawn.batch(step, PHASES[1], 8)[0])
    opening = {template: statement.split("{")[0] for template, (statement, _) in (SEEN | HELD_OUT).items()}
    assert opening["code"] in text
    assert all(opening[template] not in text for template in HELD_OUT)


def test_what_counts_in_full_can_be_predicted(tokenizer):
    """In records, every full-weight token is part of a value stated before it."""
    import random

    pieces = rows(tokenizer)._records(random.Random(0), 200)
    stated = tokenizer.decode([token for ids, weight in pieces if weight < 1 for token in ids])
    answers = [tokenizer.decode(ids) for ids, weight in pieces if weight >= 1]
    assert answers
    assert all(answer in stated for answer in answers)


def test_more_bits_never_round_worse():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    errors = [(round_to_grid(weight, bits) - weight).square().mean().item() for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4  # range of about 5 over 255 steps: step² / 12 is 3e-5
    constant = torch.full((4, 64), 0.3)
    assert torch.equal(round_to_grid(constant, 2), constant)


def test_long_blocks_are_kept_once():
    licence, body, other = "licence " * 20, "body " * 100, "other " * 100
    seen: set[bytes] = set()
    assert "licence" in drop_duplicates(f"{licence}\n\n{body}", seen)
    assert "licence" not in drop_duplicates(f"{licence}\n\n{other}", seen)
    assert drop_duplicates(body, seen) is None
