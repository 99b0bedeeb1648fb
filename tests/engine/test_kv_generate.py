"""Planned caches under plain transformers: forward passes, generate, beams, samples, padding, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from haversack.describe.model import describe_model
from haversack.engine.attention import NAME, register
from haversack.engine.generation import install_kv_plan, uninstall_kv_plan
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.reach import check_reach, neutral_plan, observe_sites, small_copy
from haversack.errors import DoesNotFitError, PlanError, UnsupportedModelError, UsageError
from haversack.ledger import total_bytes
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.sinks import SinksAndWindow

FAMILIES = {
    "llama": LlamaConfig(num_key_value_heads=8, head_dim=16),
    "qwen2": Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=2, num_hidden_layers=4),
    "qwen3": Qwen3Config(head_dim=16, num_key_value_heads=8),
    "mistral": MistralConfig(sliding_window=64, head_dim=16),
    "gemma2": Gemma2Config(head_dim=16, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(head_dim=16, query_pre_attn_scalar=16),
    "phi3": Phi3Config(hidden_size=512, sliding_window=64),
    "gpt2": GPT2Config(n_embd=192, n_layer=2),
    "olmo2": Olmo2Config(hidden_size=512),
    "mixtral": MixtralConfig(sliding_window=64, head_dim=16),
    "gpt_oss": GptOssConfig(head_dim=16),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "gemma2", "gpt_oss"])
def model(request):
    return small_copy(FAMILIES[request.param])


@pytest.fixture
def llama():
    return small_copy(FAMILIES["llama"])


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def plan_for(model, option, *, batch_size=1, capacity_tokens=64, chunk=None) -> KVPlan:
    sites = observe_sites(model)
    return KVPlan(sites, (option,) * len(sites), batch_size, capacity_tokens, "F32", chunk)


def logits_in_chunks(model, tokens, cache, steps, mask=None):
    pieces, done = [], 0
    for step in steps:
        chunk = slice(done, done + step)
        done += step
        seen = None if mask is None else mask[:, :done]
        with torch.no_grad():
            output = model(tokens[:, chunk], attention_mask=seen, past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_reached(name):
    check_reach(FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_equals_transformers_cache_to_the_bit(name):
    """The same chunks and the same attention function: an endless DynamicCache and the preallocated one agree exactly."""
    model = small_copy(FAMILIES[name])
    tokens, steps = prompt(2, 40), (17, 11, 1, 1, 9, 1)
    plan = neutral_plan(model, batch_size=2, capacity_tokens=40)
    model.set_attn_implementation(NAME)
    expected = logits_in_chunks(model, tokens, DynamicCache(config=model.config), steps)
    assert torch.equal(logits_in_chunks(model, tokens, HaversackCache(plan), steps), expected)


@pytest.mark.parametrize("config", [Gemma3nTextConfig(), Llama4TextConfig()], ids=lambda c: c.model_type)
def test_families_out_of_reach_are_refused_by_name(config):
    with pytest.raises(UnsupportedModelError, match=f"{config.model_type}: .*choose a family"):
        check_reach(config)


def test_shared_keys_and_values_are_noticed():
    """Layers that reuse another layer's keys see only the new tokens: the probe must find that their logits differ."""
    config = Gemma3nTextConfig(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        activation_sparsity_pattern=[0.0] * 4,
        vocab_size_per_layer_input=64,
    )
    with pytest.raises(UnsupportedModelError, match="gemma3n_text"):
        check_reach(config)


def test_generate_obeys_the_plan(model):
    """Greedy tokens as with transformers' own cache and whole prefill; the cache is the plan's; prefill is chunked."""
    tokens = prompt(1, 30)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **settings)
    plan = plan_for(model, KVOption(), capacity_tokens=38, chunk=7)
    install_kv_plan(model, plan)
    widths = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: widths.append(output.shape[1])
    )
    result = model.generate(tokens, **settings, return_dict_in_generate=True)
    hook.remove()
    assert torch.equal(result.sequences, expected)
    assert isinstance(result.past_key_values, HaversackCache)
    assert widths[:5] == [7, 7, 7, 7, 2]
    assert result.past_key_values.num_bytes() <= plan.max_bytes()
    uninstall_kv_plan(model, "eager")
    again = model.generate(tokens, **settings, return_dict_in_generate=True)
    assert isinstance(again.past_key_values, DynamicCache)


def test_left_padded_rows_generate_as_alone(model):
    long, short = prompt(1, 30), prompt(1, 19, seed=1)
    tokens = torch.cat([long, torch.cat([torch.zeros(1, 11, dtype=torch.long), short], 1)])
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    window, chosen = KVOption(SinksAndWindow(2, 12)), KVOption(HeavyHitters(2, 6, 8, 4))
    for option in (KVOption(), window, chosen, by_head([chosen, window])):
        install_kv_plan(model, plan_for(model, option, batch_size=2, capacity_tokens=38, chunk=9))
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        together = model.generate(tokens, attention_mask=mask, **settings)
        assert torch.equal(together[:1], model.generate(long, **settings))
        assert torch.equal(together[1:, 11:], model.generate(short, **settings))


def test_beams_and_samples_reorder_the_cache(model):
    tokens = prompt(2, 20)
    beams = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    samples = {"max_new_tokens": 8, "num_return_sequences": 3, "do_sample": True, "pad_token_id": 0}
    expected_beams = model.generate(tokens, **beams)
    torch.manual_seed(0)
    expected_samples = model.generate(tokens, **samples)
    all_that_comes = KVOption(SinksAndWindow(2, 25))  # 27 tokens are stored; in a layer of its own
    for option in (KVOption(), by_head([all_that_comes, KVOption()])):
        install_kv_plan(model, plan_for(model, option, batch_size=6, capacity_tokens=28, chunk=8))
        assert torch.equal(model.generate(tokens, **beams), expected_beams)
        torch.manual_seed(0)
        assert torch.equal(model.generate(tokens, **samples), expected_samples)


def test_conversations_go_on_in_one_cache(model):
    """Two turns through a cache passed by hand, the second prompt chunked too, equal one long prompt."""
    first, second = prompt(1, 20), prompt(1, 15, seed=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plan = plan_for(model, KVOption(), capacity_tokens=64, chunk=6)
    install_kv_plan(model, plan)
    cache = HaversackCache(plan)
    so_far = model.generate(first, past_key_values=cache, **settings)
    history = torch.cat([so_far, second], dim=1)
    widths = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    found = model.generate(history, past_key_values=cache, **settings)
    hook.remove()
    assert widths[:3] == [6, 6, 4]
    assert torch.equal(found, model.generate(history, **settings))


def test_speculation_takes_tokens_back(llama):
    """Prompt lookup guesses tokens and forgets the wrong ones: a neutral cache gives them back, a dropping one refuses."""
    tokens = prompt(1, 6).repeat(1, 4)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = llama.generate(tokens, **settings)
    install_kv_plan(llama, plan_for(llama, KVOption()))
    assert torch.equal(llama.generate(tokens, prompt_lookup_num_tokens=3, **settings), expected)
    install_kv_plan(llama, plan_for(llama, KVOption(SinksAndWindow(2, 10))))
    with pytest.raises(UsageError, match="can't be forgotten"):
        llama.generate(tokens, prompt_lookup_num_tokens=3, **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_described_sites_are_those_that_run(name):
    model = small_copy(FAMILIES[name])
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    described = [replace(site, rope_theta=None) for site in describe_model(config).attention]  # which no run shows
    assert described == list(observe_sites(model))


def test_what_needs_more_bytes_than_planned_is_refused_first(llama):
    install_kv_plan(llama, plan_for(llama, KVOption(), batch_size=2, capacity_tokens=32))
    with pytest.raises(DoesNotFitError, match="2 sequences of 33 tokens need") as refusal:
        llama.generate(prompt(2, 30), max_new_tokens=4, do_sample=False)
    assert refusal.value.shortfall_bytes == refusal.value.owners["kv"] - refusal.value.budget_bytes > 0
    with pytest.raises(DoesNotFitError):
        llama.generate(prompt(1, 16), max_new_tokens=4, num_beams=4, do_sample=False)
    assert llama.generate(prompt(1, 50), max_new_tokens=4, do_sample=False).shape == (1, 54)  # fewer, longer: fits
    with pytest.raises(UsageError, match="cache_implementation='static'"):
        llama.generate(prompt(1, 8), max_new_tokens=4, cache_implementation="static")


def test_dropping_and_packing_plans_hold_their_bytes_while_generating(llama):
    window, packed = KVOption(SinksAndWindow(4, 20)), KVOption(None, QuantizedKV(2, 2, 32, 8))
    for option in (window, packed, by_head([window, packed])):
        plan = plan_for(llama, option, capacity_tokens=150, chunk=16)
        install_kv_plan(llama, plan)
        result = llama.generate(prompt(1, 120), max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        cache = result.past_key_values
        assert cache.get_seq_length() == 149
        assert cache.num_bytes() == total_bytes(plan.stored(1, 149)) <= plan.max_bytes()
        assert plan.max_bytes() < plan_for(llama, KVOption(), capacity_tokens=150).max_bytes() / 2.5


def test_dropped_tokens_leave_positions_and_masks_right(llama):
    """A window over all tokens is the neutral plan; a short one depends on no token outside of it and the sinks."""
    tokens, steps = prompt(1, 60), (20, 20, 10, 1, 9)
    llama.set_attn_implementation(NAME)
    plan = plan_for(llama, KVOption(SinksAndWindow(1, 60)))
    whole = logits_in_chunks(llama, tokens, HaversackCache(plan), steps)
    neutral = logits_in_chunks(llama, tokens, HaversackCache(plan_for(llama, KVOption())), steps)
    assert torch.equal(whole, neutral)
    short = plan_for(llama, KVOption(SinksAndWindow(2, 10)))
    one = logits_in_chunks(llama, tokens, HaversackCache(short), steps)
    other = logits_in_chunks(llama, tokens, HaversackCache(short), (7, 33, 1, 1, 18))
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64  # two layers see 20 tokens back, so the last row sees nothing of token 5
    last = logits_in_chunks(llama, changed, HaversackCache(short), steps)
    assert torch.equal(last[:, -1], one[:, -1])
    assert not torch.equal(last[:, 12], one[:, 12])


def test_half_precision_stays_near_transformers(llama):
    llama = llama.to(torch.bfloat16)
    tokens = prompt(2, 40)
    with torch.no_grad():
        expected = llama(tokens).logits.float()
    exact = small_copy(FAMILIES["llama"])
    with torch.no_grad():
        truth = exact(tokens).logits
    llama.set_attn_implementation(NAME)
    plan = neutral_plan(llama, batch_size=2, capacity_tokens=40)
    found = logits_in_chunks(llama, tokens, HaversackCache(plan), (30, 9, 1)).float()
    # attention is summed in float32 here, so rounding must not be worse than transformers' own in bfloat16
    assert (found - truth).norm() <= 1.2 * (expected - truth).norm()


def test_saved_caches_go_on_only_with_their_plan_and_model(llama, tmp_path):
    tokens = prompt(1, 40)
    llama.set_attn_implementation(NAME)
    packed, chosen = KVOption(SinksAndWindow(2, 33), QuantizedKV(4, 4, 32, 0)), KVOption(HeavyHitters(2, 6, 8, 4))
    plan = plan_for(llama, by_head([packed, chosen]))
    cache = HaversackCache(plan)
    logits_in_chunks(llama, tokens[:, :36], cache, (36,))
    cache.save(tmp_path / "cache.safetensors", model_fingerprint="abc")
    expected = logits_in_chunks(llama, tokens[:, 36:], cache, (3, 1))
    loaded = HaversackCache.load(tmp_path / "cache.safetensors", plan, model_fingerprint="abc")
    assert torch.equal(logits_in_chunks(llama, tokens[:, 36:], loaded, (3, 1)), expected)
    with pytest.raises(PlanError, match="another model"):
        HaversackCache.load(tmp_path / "cache.safetensors", plan, model_fingerprint="abd")
    with pytest.raises(PlanError, match="another plan"):
        HaversackCache.load(tmp_path / "cache.safetensors", plan_for(llama, KVOption()), model_fingerprint="abc")


def test_plans_survive_json(llama):
    plan = plan_for(llama, KVOption(SinksAndWindow(2, 30), QuantizedKV(4, 2, 32, 8)), chunk=16)
    assert KVPlan.from_dict(plan.to_dict()) == plan
    with pytest.raises(PlanError, match="malformed"):
        KVPlan.from_dict({"sites": []})


def test_caches_copy_and_outlive_inference_mode(llama):
    """A prompt's cache, filled in inference mode, is copied for two continuations that don't disturb each other."""
    tokens = prompt(1, 30)
    llama.set_attn_implementation(NAME)
    cache = HaversackCache(plan_for(llama, KVOption(SinksAndWindow(2, 35), QuantizedKV(8, 8, 32, 0))))
    with torch.inference_mode():
        llama(tokens, past_key_values=cache, use_cache=True)
    others = copy.deepcopy(cache), cache.copy()
    expected = logits_in_chunks(llama, tokens[:, :8], cache, (4, 4))
    for other in others:
        assert torch.equal(logits_in_chunks(llama, tokens[:, :8], other, (4, 4)), expected)
        assert cache.num_bytes() == other.num_bytes()
    llama(tokens[:, :1], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert not any(tensor.requires_grad for layer in cache.planned for tensor in layer.store.tensors.values())


@pytest.mark.parametrize("cached", [True, False])
def test_padding_and_windows_hold_without_a_planned_cache(model, cached):
    """The attention function under transformers' own cache, and under none, against eager."""
    tokens = prompt(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(NAME)
    if cached:
        found = logits_in_chunks(model, tokens, DynamicCache(config=model.config), (13, 10, 1, 6), mask)
    else:
        with torch.no_grad():
            found = model(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=1e-4)


def test_attention_that_never_arrives_is_noticed(llama):
    cache = HaversackCache(plan_for(llama, KVOption()))
    llama.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="never reached the cache"):
        logits_in_chunks(llama, prompt(1, 8), cache, (4, 4))


def test_registering_twice_is_harmless_and_gradients_flow(llama):
    register()
    register()
    tokens = prompt(2, 24)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    gradients = []
    for implementation in ("eager", NAME):
        llama.set_attn_implementation(implementation)
        llama.zero_grad()
        logits = llama(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.logsumexp(-1).sum().backward()
        gradients.append(llama.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)
