"""Tokens are chosen as transformers' `generate` chooses them, under the same settings and the same seed."""

from __future__ import annotations

import pytest
import torch
from tests.engine.tiny import load_whole, random_ids, save_tiny
from transformers import GenerationConfig

from haversack.engine.choice import Choice
from haversack.engine.sampling import Sampler, end_strings, end_tokens
from haversack.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_whole(save_tiny("llama", tmp_path_factory.mktemp("m") / "m"), torch.float32)


SETTINGS = [
    {},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
    {"do_sample": True, "min_p": 0.1, "top_k": 0},
    {"do_sample": True, "typical_p": 0.5, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "greedy")
def test_as_generate_does(model, settings):
    prompt = random_ids(1, 7)
    torch.manual_seed(3)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, **settings)
    theirs = model.generate(prompt, max_new_tokens=12, attention_mask=torch.ones_like(prompt))[0, 7:].tolist()
    sampler = Sampler(model.generation_config, Choice(seed=3))
    tokens = prompt[0].tolist()
    for _ in range(12):
        with torch.inference_mode():
            tokens.append(sampler.choose(model(torch.tensor([tokens])).logits[0, -1], tokens))
    assert tokens[7:] == theirs
    assert sampler.settings["do_sample"] is settings.get("do_sample", False) and sampler.notes == ()


def test_what_the_user_asks_goes_before_the_models_settings():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    assert Sampler(config, Choice(temperature=0)).settings == {"do_sample": False}
    mixed = Sampler(config, Choice(temperature=0.2, seed=5)).settings
    assert mixed == {"do_sample": True, "temperature": 0.2, "top_k": 50, "top_p": 0.9, "seed": 5}
    assert Sampler(GenerationConfig(), Choice(top_p=0.5)).settings["do_sample"] is True
    assert Sampler(None).settings == {"do_sample": False}


def test_what_is_not_followed_is_told():
    notes = Sampler(GenerationConfig(num_beams=4, suppress_tokens=[3])).notes
    assert len(notes) == 2 and "num_beams=4" in notes[0] and "suppress_tokens=[3]" in notes[1]


def test_nonsense_in_a_generation_config_is_refused():
    with pytest.raises(UsageError, match=r"temperature=-1.*mend it there"):
        Sampler(GenerationConfig(do_sample=True, temperature=-1.0))


def test_ends():
    class Tokenizer:
        eos_token_id = 9

    assert end_tokens(GenerationConfig(eos_token_id=[1, 2]), Tokenizer()) == {1, 2}
    assert end_tokens(GenerationConfig(eos_token_id=4), Tokenizer()) == {4}
    assert end_tokens(GenerationConfig(), Tokenizer()) == {9}
    assert end_strings(GenerationConfig(stop_strings="a")) == ("a",)
    assert end_strings(GenerationConfig(stop_strings=["a", "b"])) == ("a", "b") and end_strings(None) == ()
