"""Reading with a guide or with the model's surprise, topics of a text, and one cache for each of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.engine.test_kv_generate import FAMILIES, plan_for, prompt

from haversack.engine.attention import NAME, register
from haversack.engine.episodes import EpisodeCaches, find_topics, guide_for
from haversack.engine.generation import install_kv_plan, uninstall_kv_plan
from haversack.engine.kv_cache import HaversackCache
from haversack.engine.reach import small_copy
from haversack.engine.reading import Reader
from haversack.engine.sequence import PlannedSequence
from haversack.errors import PlanError, UsageError
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.episode_attention import EpisodeAttention
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.parts.kv.surprise import Surprise

EPISODES = KVOption(EpisodeAttention(4, 20, 8, 16, num_episodes=3, segment_tokens=16))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(family: str):
    register()
    model = small_copy(FAMILIES[family])
    model.set_attn_implementation(NAME)
    return model


@pytest.fixture(params=["llama", "gemma2", "gpt_oss"])
def model(request):
    return small(request.param)


@pytest.fixture(scope="module")
def llama():
    return small("llama")


def ids_of(num_tokens: int, seed: int = 0) -> list[int]:
    return prompt(1, num_tokens, seed)[0].tolist()


def test_segments_are_sorted_by_topic_and_questions_find_theirs():
    """Three topics, each with words of its own among words that all share, in turns: every segment lies with its like, and so does a question of few words."""
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Embedding(100, 48)
    table.weight.data.normal_(generator=generator)
    speaker = SimpleNamespace(get_input_embeddings=lambda: table)
    order = [0, 1, 2, 2, 0, 1, 1, 2, 0, 0, 2, 1]
    pieces = []
    for topic in order:
        words = torch.randint(10 + 30 * topic, 25 + 30 * topic, (10,), generator=generator)
        shared = torch.randint(0, 10, (14,), generator=generator)
        pieces.append(torch.cat([words, shared])[torch.randperm(24, generator=generator)].tolist())
    ids = [token for piece in pieces for token in piece]
    sizes = {"num_episodes": 3, "segment_tokens": 24, "guide_tokens": 8}
    topics = find_topics(speaker, ids, **sizes)
    episode = {topic: topics.segments[order.index(topic)] for topic in range(3)}
    assert sorted(episode.values()) == [0, 1, 2]
    assert list(topics.segments) == [episode[topic] for topic in order]
    for topic in range(3):
        assert topics.nearest([1, 2, 3, 15 + 30 * topic, 20 + 30 * topic]) == episode[topic]
        typical = [i for i, piece in enumerate(pieces) if tuple(piece[:8]) == topics.guides[episode[topic]]]
        assert [order[i] for i in typical] == [topic]
    assert find_topics(speaker, ids, **sizes).guides == topics.guides  # the same again
    assert len(find_topics(speaker, ids[:30], **sizes).guides) == 2  # no more topics than segments
    with pytest.raises(UsageError, match="a text without a token has no episodes"):
        find_topics(speaker, [], **sizes)


def test_a_guide_leaves_no_trace_in_a_cache_that_holds_everything(model):
    """Whatever a family's windows, caps and sinks, bit for bit."""
    plan, ids = plan_for(model, KVOption(), capacity_tokens=120), ids_of(120)
    plan_with = plan_for(model, EPISODES, capacity_tokens=48)  # room for everything: the score never frees
    logits = []
    for some, guide in ((plan, ()), (plan_with, ids_of(16, 1))):
        cache = HaversackCache(some)
        reader = Reader(model, cache, chunk_tokens=16, guide=guide)
        reader.read_all(ids[:47])
        logits.append(reader.read(ids[47:48]))
        assert cache.get_seq_length() == 48
    assert torch.equal(*logits)


def test_what_a_guide_is_decides_what_is_kept(model):
    plan, ids, held = plan_for(model, EPISODES, capacity_tokens=200), ids_of(150), []
    for guide in ((), ids_of(16, 1), ids_of(16, 2), ids_of(16, 1)):
        cache = HaversackCache(plan)
        Reader(model, cache, chunk_tokens=64, guide=guide).read_all(ids)
        held.append([layer.store.state()["positions"] for layer in cache.planned if layer.site.window_tokens is None])
    assert held[0]
    for a, b, same in ((0, 1, False), (1, 2, False), (1, 3, True)):
        assert all(torch.equal(x, y) for x, y in zip(held[a], held[b])) == same


def test_one_cache_at_a_time_and_never_more_than_a_block_beyond_what_is_held(llama, tmp_path):
    """At every forward pass, guides included; the others' bytes lie in files, which bear the plan's and the model's names."""
    plan, ids, seen = plan_for(llama, EPISODES, capacity_tokens=300), ids_of(300), []

    def look(module, args, kwargs, output):
        cache = kwargs["past_key_values"]
        held = max(len(head) for layer in cache.planned for head in layer.store.held_by_head(0))
        seen.append((cache.num_bytes(), held, kwargs["input_ids"].shape[1]))

    hook = llama.register_forward_hook(look, with_kwargs=True)
    caches = EpisodeCaches(llama, plan, tmp_path, model_fingerprint="a model")
    with pytest.raises(UsageError, match="read a text first"):
        caches.answering(ids[:4])
    caches.read(ids)
    hook.remove()
    assert {num_bytes for num_bytes, _, _ in seen} == {plan.max_bytes()}
    assert max(held for _, held, _ in seen) == 32 + 16 and max(new for _, _, new in seen) == 16
    count = len(caches.topics.guides)
    assert 2 <= count <= 3
    # a file's header says shapes and names, a few bytes for each of the tensors
    assert count * plan.max_bytes() < caches.num_bytes() < count * (plan.max_bytes() + 8192)
    question = ids[20:26]
    used = [caches.answering(question) for _ in range(2)]
    expected = HaversackCache(plan)
    guide = caches.topics.guides[caches.topics.nearest(question)]
    Reader(llama, expected, chunk_tokens=16, guide=guide).read_all(ids)
    answers = [Reader(llama, cache, chunk_tokens=16).read(question) for cache in (*used, expected)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    path = tmp_path / "episode-0.safetensors"
    with pytest.raises(PlanError, match="saved under another model"):
        HaversackCache.load(path, plan, model_fingerprint="another")
    other = plan_for(llama, KVOption(EpisodeAttention(4, 20, 8, 16, num_episodes=2)), capacity_tokens=300)
    with pytest.raises(PlanError, match="saved under another plan"):
        HaversackCache.load(path, other, model_fingerprint="a model")


def test_plans_without_episodes_or_with_several_kinds_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="no layer of this plan's cache sorts texts into episodes"):
        EpisodeCaches(llama, plan_for(llama, KVOption()), tmp_path, model_fingerprint="a model")
    options = [KVOption(EpisodeAttention(num_episodes=n)) for n in (2, 3)]
    heads = plan_for(llama, KVOption()).sites[0].num_kv_heads
    mixed = plan_for(llama, by_head([*options, *[KVOption()] * (heads - 2)]))
    with pytest.raises(PlanError, match="layers sort texts into different episodes"):
        EpisodeCaches(llama, mixed, tmp_path, model_fingerprint="a model")


def test_a_long_prompt_is_read_with_the_guide_of_what_it_ends_with(llama):
    plan = plan_for(llama, EPISODES, capacity_tokens=300, chunk=64)
    ids = ids_of(200)
    guide = guide_for(llama, plan, ids)
    assert len(guide) == 16 and guide_for(llama, plan, ids[:48]) == ()  # all of it fits
    expected = HaversackCache(plan)
    reader = Reader(llama, expected, chunk_tokens=64, guide=guide)
    *_, last = [reader.read(chunk) for chunk in reader.chunks(ids)]
    sequence = PlannedSequence(llama, plan)
    assert torch.equal(sequence.read(ids), last[-1])
    assert sequence.tokens == ids
    plain = plan_for(llama, KVOption(SinksAndWindow(4, 60)), capacity_tokens=300, chunk=64)
    assert guide_for(llama, plain, ids) == ()


def test_surprise_is_what_the_model_says_and_stays_in_constant_bytes(model):
    """-log p of every token, whatever the chunks; a stream of any length takes the same bytes."""
    option, ids = KVOption(Surprise(4, 20, 8, 16, decay=1.0)), ids_of(400)
    plan = plan_for(model, option, capacity_tokens=100)
    cache = HaversackCache(plan)
    reader = Reader(model, cache, chunk_tokens=11)
    reader.read_all(ids[:40])
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids[:40]]), use_cache=False).logits[0].float().log_softmax(-1)
    expected = torch.tensor([0.0, *(-float(whole[i, token]) for i, token in enumerate(ids[1:40]))])
    layer = next(layer.store for layer in cache.planned if layer.site.window_tokens is None)
    torch.testing.assert_close(layer.tensors["importance"][0, 0, :40], expected, atol=1e-4, rtol=0)
    planned = cache.num_bytes()
    reader.read_all(ids[40:])
    assert cache.num_bytes() == planned == plan.max_bytes()
    assert len(layer.held_positions(0)) == 32 + 16 and cache.get_seq_length() == 400


def test_generate_refuses_a_cache_that_it_would_not_tell_anything(llama):
    install_kv_plan(llama, plan_for(llama, KVOption(Surprise(4, 20, 8, 16)), capacity_tokens=100))
    try:
        with pytest.raises(UsageError, match="which `generate` does not tell it; read through"):
            llama.generate(prompt(1, 8), max_new_tokens=4)
    finally:
        uninstall_kv_plan(llama, NAME)
