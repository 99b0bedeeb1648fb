"""Compiled steps against the model's own: the same greedy tokens, whatever the family, the cache, the weights, the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.engine.tiny import load_whole, save_tiny, tiny_config

from haversack import data
from haversack.cost.damage import NONE, Damage
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine import attention
from haversack.engine.attach import PackedSite, attach
from haversack.engine.decoder import attach as attaching
from haversack.engine.decoder.loop import LOOP, Decoder, make_tables, step_bytes
from haversack.engine.decoder.trace import trace_step
from haversack.engine.generation import install_kv_plan
from haversack.engine.kv_cache import KVPlan
from haversack.engine.measure import packed_matrix
from haversack.engine.reach import neutral_plan, small_copy
from haversack.engine.trace import LiveBytes
from haversack.errors import UnsupportedModelError
from haversack.jobs.pack import pack
from haversack.jobs.run import load, loop_name, open_decoder
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.fewer_channels import FewerKeyChannels
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.low_rank import LowRankKV
from haversack.parts.kv.pages import PagedKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question

CACHES = {
    "plain": KVOption(),
    "window": KVOption(SinksAndWindow(2, 9)),
    "packed": KVOption(None, QuantizedKV(8, 4, 32, 4)),
    "window-packed": KVOption(SinksAndWindow(2, 40), QuantizedKV(8, 8, 32, 0)),
}
WINDOW_AND_CODES = [KVOption(SinksAndWindow(2, 9)), KVOption(None, QuantizedKV(8, 4, 32, 4))]
CACHES |= {
    "by-head": by_head(WINDOW_AND_CODES),
    "chosen": KVOption(HeavyHitters(4, 20, 8, 16)),
    "chosen-by-head": by_head([KVOption(HeavyHitters(4, 20, 8, 16)), KVOption()]),
    "thin": KVOption(None, FewerKeyChannels(0.4, 32, 4)),
    "block-float": KVOption(None, BlockFloatKV(8, 16, 4)),
    "low-rank": KVOption(project=LowRankKV(8, 8)),
    "pages": KVOption(None, PagedKV(8, 5)),
}
FAMILIES = {  # every family with one kind of cache; llama and gemma2 (windows, softcaps) with all
    "qwen2": ["plain"], "qwen3": ["window"], "mistral": ["packed"], "phi3": ["window-packed"], "olmo2": ["packed"],
    "gemma3_text": ["window-packed"], "gpt2": ["window"], "mixtral": ["plain"], "gpt_oss": ["window-packed", "by-head"],
    "llama": list(CACHES),
    "gemma2": ["plain", "window", "packed", "window-packed", "by-head"],
}  # fmt: skip


TIE = 2.0**-12
"""Logits this close, as a part of the largest: two orders of summing float32 products of 64 to 128 columns, four layers deep."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planned(model, option: KVOption, batch_size: int, capacity_tokens: int = 120):
    sites = neutral_plan(model, batch_size=batch_size, capacity_tokens=capacity_tokens).sites
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[model.dtype]
    install_kv_plan(model, KVPlan(sites, (option,) * len(sites), batch_size, capacity_tokens, dtype, 16))
    model.generation_config.eos_token_id = None
    return model


def padded_prompt(batch_size: int, length: int = 37, vocab_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    ids = torch.randint(1, vocab_size, (batch_size, length), generator=generator)
    real = torch.ones_like(ids)
    for row in range(1, batch_size):
        real[row, : 7 * row] = 0
    return ids * real, real


def both(model, decoder: Decoder, ids, real, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    expected = model.generate(ids, attention_mask=real, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return decoder.generate(ids, real, new_tokens)[0], expected


@pytest.mark.parametrize(("family", "cache"), [(f, c) for f, caches in FAMILIES.items() for c in caches])
def test_greedy_tokens_are_those_of_generate(family, cache):
    """Two sequences of different length, past windows, until groups of tokens were packed and dropped."""
    model = planned(small_copy(tiny_config(family)), CACHES[cache], 2)
    found, expected = both(model, Decoder(model), *padded_prompt(2), 75)
    assert torch.equal(found, expected)


def test_heads_of_a_band_need_not_lie_side_by_side():
    """Four KV heads, every other one alike, in batches of two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=96, num_hidden_layers=2, vocab_size=64)).eval()
    planned(model, by_head(WINDOW_AND_CODES * 2), 2)
    decoder = Decoder(model)
    ids, real = padded_prompt(2)
    found, expected = both(model, decoder, ids, real, 60)
    assert torch.equal(found, expected)
    program = decoder.steps(decoder.generate(ids, real, 1)[1], ids[:, 0]).program
    assert all(layer.is_compiled and len(layer.rings) == 2 for layer in program._layers.values())


def with_packed(family: str, option: WeightOption):
    """A small model in float32 with every matrix packed alike."""
    model = small_copy(tiny_config(family))
    packed = []
    for site in describe_model(model.config.to_dict()).weights:
        weight = model.get_submodule(site.module)._parameters[site.parameter].detach().float()
        weight = weight[tuple(slice(*span) for span in site.module_slice.index)]
        packed.append(PackedSite(site, packed_matrix(site, option, option.encode(WeightTask(weight)))))
    attach(model, packed, torch.float32)
    return model


def check_packed_steps(model, batch_size: int) -> None:
    """In float32: a random model's logits in bfloat16 have ties, which the last bit of a sum decides."""
    planned(model, KVOption(), batch_size)
    ids, real = padded_prompt(batch_size)
    told = model.generate(
        ids, attention_mask=real, max_new_tokens=20, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    found, _ = Decoder(model).generate(ids, real, 20)
    for row in range(batch_size):
        differs = (found[row] != told.sequences[row]).nonzero()
        if len(differs):  # only where the two tokens were as good as equal, and then the texts go their own ways
            place = int(differs[0])
            logits = told.logits[place - ids.shape[1]][row]
            gap = logits[told.sequences[row, place]] - logits[found[row, place]]
            assert 0 <= gap <= TIE * logits.abs().max()


@pytest.mark.parametrize(
    ("family", "bits", "batch_size"),
    [*itertools.product(["qwen3"], [2, 3, 4, 8], [1, 5, 8]), ("gemma2", 4, 1), ("olmo2", 3, 2)],
)
def test_with_packed_weights(family, bits, batch_size):
    grid = IntegerGrid(bits, 64, symmetric=bits % 2 == 0, search=False)
    check_packed_steps(with_packed(family, WeightOption(grid, NearestRounding())), batch_size)


@pytest.mark.parametrize(
    ("family", "values", "group_size", "scales", "batch_size", "tile_bytes"),
    [
        ("llama", "max4", 32, "u4", 1, 4 << 20),
        ("llama", "max2", 16, "u4", 3, 4 << 20),
        ("phi3", "max3", 32, "s6", 2, 1 << 10),  # fused parameters, and scales written out for some rows at a time
        ("qwen3", "max4", 16, "u6", 1, 1 << 10),
    ],
)
def test_second_level_scales_are_written_out_within_the_step(
    family, values, group_size, scales, batch_size, tile_bytes, monkeypatch
):
    """Compiled throughout, but for the packed embedding; and in no more workspace than the options declare."""
    from haversack.parts.weights import codebook

    monkeypatch.setattr(codebook, "SCALE_TILE_BYTES", tile_bytes)
    option = WeightOption(CodebookGrid(values, group_size, scales, search=False), NearestRounding())
    model = with_packed(family, option)
    check_packed_steps(model, batch_size)
    ids, real = padded_prompt(batch_size)
    decoder = Decoder(model)
    program = decoder.steps(decoder.generate(ids, real, 1)[1], ids[:, 0]).program
    assert len(program._stretches) <= 3
    sites = describe_model(model.config.to_dict()).weights
    declared = [option.workspace_bytes(batch_size, s.out_features, s.in_features, "F32") for s in sites]
    attention = max(layer.store.decoder(None).form.workspace_bytes(batch_size) for layer in program._layers.values())
    assert program._workspace.nbytes <= max(*declared, attention)


@pytest.mark.parametrize("name", ["a", "b"])
def test_shipped_models(name, tmp_path):
    """Packed at 4 bits, through the folder, as `haversack run` decodes it."""
    model = describe_model(data.reference_model(name))
    option = WeightOption(IntegerGrid(4, 64, symmetric=False, search=False), NearestRounding())
    answer = make_plan(
        Question(
            model=model,
            workload=ServeWorkload(24, 40),
            machine=Machine("test", 2, 2**33, 2**33),
            budget_bytes=2**33,
            budget_kind="tensor",
            weight_damages={site.id: {option: NONE} for site in model.weights},
            kv_damages={
                site.id: {KVOption(None, QuantizedKV(4, 4, 32, 32)): NONE, KVOption(): Damage(1.0, "measured")}
                for site in model.attention
            },
            placement="resident",
        )
    )
    pack(model, answer.plan, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    ids = torch.randint(5, 4000, (1, 24), generator=torch.Generator().manual_seed(0))
    decoder, refusal = open_decoder(loaded)
    assert refusal is None and loop_name(decoder) == LOOP
    found, expected = both(loaded, decoder, ids, torch.ones_like(ids), 40)
    assert torch.equal(found, expected)


def test_finished_sequences_are_padded_and_end_the_loop():
    model = planned(small_copy(tiny_config("llama")), KVOption(), 3)
    ids, real = padded_prompt(3)
    free, _ = Decoder(model).generate(ids, real, 30)
    ends = [int(free[0, 40]), int(free[1, 45])]
    model.generation_config.eos_token_id = ends
    expected = model.generate(ids, attention_mask=real, max_new_tokens=30, do_sample=False, pad_token_id=0)
    found, _ = Decoder(model).generate(ids, real, 30, eos_token_ids=ends)
    assert torch.equal(found, expected)


def test_a_step_allocates_nothing_that_stays():
    """All buffers exist before the first step, and their bytes are those the program states."""
    model = planned(small_copy(tiny_config("llama")), KVOption(), 1)
    decoder = Decoder(model)
    ids, real = padded_prompt(1)
    _, cache = decoder.generate(ids, real, 2)
    steps = decoder.steps(cache, ids[:, 0])
    addresses = [t.data_ptr() for t in (steps.program.arena, steps.program._workspace, steps.program.logits)]
    held = steps.program.num_bytes
    for _ in range(3):
        steps.next_tokens(ids[:, 0])
    assert [t.data_ptr() for t in (steps.program.arena, steps.program._workspace, steps.program.logits)] == addresses
    assert steps.program.num_bytes == held


def test_what_cannot_be_compiled_is_refused_by_name(tmp_path, monkeypatch):
    from transformers import BloomConfig

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="bloom: BloomForCausalLM never calls"):
        attaching.check_steps(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=72))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_half_precision(family):
    """The model's own float16 logits, within a few of float16's roundings of the largest."""
    assert attaching._largest_difference(small_copy(tiny_config(family)).to(torch.float16)) <= 2.0**-8


def test_interleaved_rotations_and_calls_of_torch():
    """GLM turns every second channel with its neighbour; OPT looks positions up two places further on."""
    from transformers import GlmConfig, OPTConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 72}
    glm = GlmConfig(**sizes, intermediate_size=96, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    opt = OPTConfig(**sizes, ffn_dim=96, max_position_embeddings=256, word_embed_proj_dim=64)
    for config in (glm, opt):
        assert attaching._largest_difference(small_copy(config)) <= 1e-5


def test_a_wrong_graph_is_found_by_its_logits(tmp_path, monkeypatch):
    """A trace that takes the wrong scaling gives other logits than the model, and is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from haversack.engine.decoder import loop, trace

    def wrong(*args):
        graph = trace.trace_step(*args)
        for node in graph.nodes:
            if node.kind == "attention":
                node.facts["scaling"] *= 1.01
        return graph

    monkeypatch.setattr(loop, "trace_step", wrong)
    with pytest.raises(UnsupportedModelError, match="differ by"):
        attaching.check_steps(tiny_config("llama"))


def test_a_sequence_reads_steps_and_rewinds():
    """Prompts through the model, single tokens by steps, and back again: the logits of transformers' forward throughout."""
    from haversack.engine.sequence import PlannedSequence

    model = planned(small_copy(tiny_config("llama")), KVOption(), 1)
    decoder, plan = Decoder(model), model.haversack_kv_plan
    fast, slow = PlannedSequence(model, plan, decoder=decoder), PlannedSequence(model, plan)
    for ids, keep in (
        ([3, 4, 5], 3),
        ([6], 4),
        ([7], 4),
        ([8], 5),
        ([9, 10], 6),
        ([11], 7),
        ([12], 0),
        ([1, 2], 2),
        ([3], 3),
    ):
        found, expected = fast.read(ids), slow.read(ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert fast.rewind(keep) == slow.rewind(keep) == keep and fast.tokens == slow.tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_step_is_forecast_from_the_config_as_from_the_model(family, tmp_path):
    """Whatever buffers a family has, and however its weights lie."""
    from haversack.engine.decoder.forecast import forecast_step

    folder = save_tiny(family, tmp_path / family, "float16")
    forecast = forecast_step(describe_model(folder), 1)
    model = load_whole(folder, torch.float16, "eager")
    attention.register()
    weights = [*model.parameters(), *model.buffers()]
    with LiveBytes() as live:
        live.leave_out(weights)
        graph = trace_step(model, 2, attention.NAME)
    with LiveBytes() as made:
        made.leave_out(weights)
        make_tables(model, 2, graph, torch.arange(64)[None])
    assert made.peak_bytes <= forecast.step_bytes - step_bytes(graph, 1, 0) <= made.peak_bytes + 256
    assert (
        live.peak_bytes <= forecast.tracing_bytes <= live.peak_bytes + 256
    )  # rotary frequencies are copied on meta alone


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_two_shallow_steps_forecast_a_deep_one(family):
    from haversack.engine.decoder.forecast import _trace, forecast_step

    config = {**tiny_config(family).to_dict(), "num_hidden_layers": 40, "layer_types": None}
    model = describe_model(config)
    for batch_size in (1, 3):
        forecast = forecast_step(model, batch_size)
        assert forecast == _trace(model, model.config, 40, batch_size)
        assert forecast.step_bytes > 0 and forecast.tracing_bytes > 0
