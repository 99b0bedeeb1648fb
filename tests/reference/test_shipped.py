"""What is shipped: the models load as any Hugging Face folder does, use their context, and their cards say what was measured."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from haversack.data import reference_model, text
from haversack.probes import encode_probe, make_copy, score_forward, token_counter


@pytest.fixture(scope="module", params=["a", "b"])
def shipped(request):
    folder = reference_model(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder)


def test_architectures_are_the_promised_ones(shipped):
    name, model, tokenizer = shipped
    config = model.config
    assert type(model).__name__ == {"a": "Qwen3ForCausalLM", "b": "LlamaForCausalLM"}[name]
    assert (config.hidden_size, config.num_hidden_layers) == {"a": (512, 4), "b": (256, 4)}[name]
    assert (config.num_attention_heads, config.num_key_value_heads) == {"a": (8, 2), "b": (4, 4)}[name]
    assert config.tie_word_embeddings == (name == "a")
    assert config.vocab_size == len(tokenizer) == 4096
    widths = {size for p in model.model.layers.parameters() if p.ndim == 2 for size in p.shape}
    assert all(
        width % 128 == 0 for width in widths
    )  # of a row 256, but for A's keys and values: two heads of 64 outputs


def test_digits_are_single_and_text_survives(shipped):
    _, _, tokenizer = shipped
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2048", add_special_tokens=False)] == list("2048")
    sample = text("foreign-code")[:2000]
    assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) == sample


def test_lists_are_copied_with_a_full_cache_and_not_beyond_a_window(shipped):
    _, model, tokenizer = shipped

    def forward(ids, mask):
        return model(ids, attention_mask=mask, use_cache=False).logits

    rng = random.Random(11)
    count = token_counter(tokenizer)
    probes = [encode_probe(make_copy(rng, count, num_tokens=64), tokenizer, [tokenizer.bos_token_id]) for _ in range(4)]
    # The cards measure 0.9 and more over 12; half of four is far below that and far above chance.
    assert sum(score_forward(forward, probes)) >= 2
    assert sum(score_forward(forward, probes, window=16, sinks=4)) == 0


def test_cards_hold_the_measured_numbers(shipped):
    name, _, _ = shipped
    folder = reference_model(name)
    results = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    for part in ("foreign-prose", "foreign-code"):
        assert f"{results['bits_per_byte'][part]:.2f}" in card
    assert len(results["recall"]) == 32
    assert results["staircase"][-1]["foreign-prose_rise"] > results["staircase"][1]["foreign-prose_rise"]


@pytest.mark.parametrize("name", ["calibration", "foreign-prose", "foreign-code"])
def test_texts_are_whole_and_ascii(name):
    content = text(name)
    assert content.isascii()
    assert len(content) == (1_000_000 if name == "calibration" else 500_000)
