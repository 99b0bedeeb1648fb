"""Packed folders of every family load through plain transformers and compute what their stored tensors say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine.tiny import load_whole, random_ids, save_tiny

import haversack  # noqa: F401  # transformers finds the quantizer
from haversack.cost.calibrated import Packed
from haversack.cost.damage import NONE, Damage
from haversack.cost.dropped import follows_for_free
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.machine import Machine
from haversack.describe.model import Model, describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine.packed_tensor import packed_tensors
from haversack.errors import DoesNotFitError, PlanError
from haversack.formats.packed_folder import PackedFolder
from haversack.formats.tiers import read_resident
from haversack.jobs.pack import pack, retune_plan
from haversack.jobs.run import open_decoder
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Answer, Question
from haversack.recipes.base import all_recipes

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2", "mixtral", "gpt_oss",
)  # fmt: skip
MACHINE = Machine("test", 2, 2**33, 2**33)
EIGHT = WeightOption(grid=IntegerGrid(8, 64, symmetric=True), rounding=NearestRounding())
TWO = WeightOption(grid=IntegerGrid(2, 64, symmetric=False), rounding=NearestRounding())
FOUR = WeightOption(grid=IntegerGrid(4, 64, symmetric=False), rounding=NearestRounding())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answer(
    model: Model,
    options: tuple[WeightOption, ...],
    share: float | None = None,
    kv: tuple[KVOption, ...] = (),
    **changes,
) -> Answer:
    """A plan from given options; `share` of the bytes that everything at 16 bits would take, or no limit."""
    damages = {WeightOption(): NONE} | {o: Damage(1.0 / o.grid.bits**2, "proxied") for o in options if o.grid}  # type: ignore[attr-defined]
    caches = {KVOption(): NONE} | {o: Damage(0.001, "proxied") for o in kv}
    question = Question(
        model=model,
        workload=ServeWorkload(24, 9),
        machine=MACHINE,
        budget_bytes=2**33 if share is None else int(model.num_bytes * share) + 2**15,
        budget_kind="tensor",
        weight_damages={site.id: damages for site in model.weights},
        kv_damages={site.id: caches for site in model.attention},
        **changes,
    )
    return make_plan(question)


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_packing_changes_nothing(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "model")
    model = describe_model(source)
    found = answer(model, ())
    assert found.fits and found.plan.prediction.damage.nats == 0
    pack(model, found.plan, tmp_path / "packed")
    ids = random_ids(2, 20)
    with torch.no_grad():
        packed = load(tmp_path / "packed")(ids, use_cache=False).logits
        whole = load_whole(source, torch.float32, "eager")(ids, use_cache=False).logits
    torch.testing.assert_close(packed, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_compute_with_the_stored_matrices(family: str, tmp_path: Path) -> None:
    """Logits equal those of a dense model whose parameters are the stored tensors read back."""
    source = save_tiny(family, tmp_path / "model")
    model = describe_model(source)
    found = answer(model, (EIGHT, FOUR), share=0.6, placement="resident")
    assert found.fits, found.cheapest_change
    pack(model, found.plan, tmp_path / "packed")
    packed = load(tmp_path / "packed")
    dense = load_whole(source, torch.float32, "eager")
    overwrite_with_stored(dense, packed)
    ids = random_ids(2, 20)
    with torch.no_grad():
        got, want = packed(ids, use_cache=False).logits, dense(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


def overwrite_with_stored(dense: torch.nn.Module, packed: torch.nn.Module) -> None:
    """Write every packed site's matrix into the dense model's parameter, through the site's own description."""
    from haversack.engine.attach import parameter_rows
    from haversack.engine.packed_tensor import PackedStack

    described = packed.haversack.described
    stored = {}
    for parameter in packed.parameters():
        tensors = parameter.experts if isinstance(parameter, PackedStack) else (parameter,)
        for tensor in tensors:
            for block in getattr(tensor, "blocks", ()):
                stored[block.matrix.site_id] = block.matrix
    assert set(stored) == {site.id for site in described.weights}
    with torch.no_grad():
        for site in described.weights:
            matrix = stored[site.id]
            values = matrix.option.dense(matrix.tensors(), site.out_features, site.in_features)
            target = dense.get_submodule(site.module)._parameters[site.parameter]
            if site.module_slice.squeeze:
                target = target[site.module_slice.index[0][0]]
            view = target.T if site.module_slice.transposed else target
            view[parameter_rows(site)] = values.to(target.dtype)


@pytest.mark.parametrize("family", ("llama", "gpt2", "mixtral"))
@pytest.mark.parametrize("placement", ("mapped", "streamed"))
def test_placements_change_no_value(family: str, placement: str, tmp_path: Path) -> None:
    model = describe_model(save_tiny(family, tmp_path / "model"))
    ids = random_ids(1, 12)
    outputs = []
    for where in ("resident", placement):
        found = answer(model, (), placement=where)
        assert found.fits
        pack(model, found.plan, tmp_path / where)
        loaded = load(tmp_path / where)
        with torch.no_grad():
            outputs.append(loaded(ids, use_cache=False).logits)
        if where == "streamed":
            loaded.haversack_window.close()
    assert torch.equal(*outputs)


def test_streaming_holds_only_its_window(tmp_path: Path) -> None:
    model = describe_model(save_tiny("llama", tmp_path / "model", num_layers=4))
    found = answer(model, (), placement="streamed")
    rows = found.plan.prediction.timeline["decode"]
    layer = sum(site.num_bytes for site in model.weights if site.layer == 0)
    assert 2 * layer <= rows["weights (stream window)"]["device"] < 2 * layer + 2 * 64 * 4096
    pack(model, found.plan, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert loaded.haversack_window.window_bytes <= rows["weights (stream window)"]["device"]
    loaded.haversack_window.close()


def test_generate_keeps_the_planned_cache(tmp_path: Path) -> None:
    model = describe_model(save_tiny("llama", tmp_path / "model"))
    option = KVOption(represent=QuantizedKV(8, 8, group_size=32, recent_tokens=8))
    found = answer(model, (), kv=(option,), share=None)
    plan = found.plan.model_copy(
        update={"kv": tuple(k.model_copy(update={"option": option.to_dict()}) for k in found.plan.kv)}
    )
    pack(model, plan.sealed(), tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    out = loaded.generate(
        random_ids(1, 24), max_new_tokens=9, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    assert out.past_key_values.num_bytes() == loaded.haversack.kv_plan.max_bytes()
    with pytest.raises(DoesNotFitError, match="plan"):
        loaded.generate(random_ids(3, 24), max_new_tokens=20, do_sample=False, pad_token_id=0)


def test_declared_bytes_are_the_bytes_on_disk_and_in_memory(tmp_path: Path) -> None:
    model = describe_model(save_tiny("qwen3", tmp_path / "model"))
    found = answer(model, (EIGHT, FOUR), share=0.6, placement="resident")
    folder, _ = pack(model, found.plan, tmp_path / "packed")
    declared = sum(row.stored_bytes for row in found.plan.weights)
    on_disk = sum(t.num_bytes for site in folder.manifest.sites for t in folder.site_tensors(site).values())
    assert declared == on_disk == found.plan.prediction.timeline["decode"]["weights"]["device"]


def test_retuned_scales_and_norms_are_what_is_packed(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    model, ids = describe_model(source), random_ids(3, 20)
    found = answer(model, (TWO,), 0.5)
    windows = SimpleNamespace(calibration=ids, search=ids)
    calibration: Any = SimpleNamespace(statistics={}, windows=windows, packed={})
    retuned = retune_plan(model, found.plan, calibration, 8)
    assert retuned.after < retuned.before
    pack(model, found.plan, tmp_path / "plain")
    pack(model, found.plan, tmp_path / "tuned", retuned=retuned)
    sizes = [
        sum(f.num_bytes for f in PackedFolder.open(tmp_path / n).manifest.files.values()) for n in ("plain", "tuned")
    ]
    assert sizes[0] == sizes[1]
    with torch.no_grad():
        wanted = torch.log_softmax(load_whole(source, torch.float32)(ids).logits, -1)
        for name, nats in (("plain", retuned.before), ("tuned", retuned.after)):
            got = torch.log_softmax(load(tmp_path / name)(ids, use_cache=False).logits, -1)
            assert float((wanted.exp() * (wanted - got)).sum(-1).mean()) == pytest.approx(nats, rel=0.02)


def test_what_was_packed_to_measure_is_not_packed_again(tmp_path: Path) -> None:
    """The same files as packing afresh, with the same notes."""
    model = describe_model(save_tiny("llama", tmp_path / "model"))
    plan, checkpoint = answer(model, (TWO,), 0.5).plan, Checkpoint.open(tmp_path / "model")
    packed = {}
    for site in model.weights:
        option = WeightOption.from_dict(next(row.option for row in plan.weights if row.site == site.id))
        if not option.is_neutral:
            task = WeightTask(read_site(checkpoint, site).float())
            packed[site.id, option] = Packed(option.encode(task), tuple(task.notes))
    _, fresh = pack(model, plan, tmp_path / "fresh")
    _, again = pack(model, plan, tmp_path / "again", packed=packed)
    assert packed and fresh and fresh == again
    files = [sorted((tmp_path / name).glob("packed-*")) for name in ("fresh", "again")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    for site_id, option in packed:
        packed[site_id, option] = Packed({n: t.clone().zero_() for n, t in packed[site_id, option].tensors.items()}, ())
    folder, _ = pack(model, plan, tmp_path / "zeros", packed=packed)  # it is what was given that is written
    assert not any(
        tensor.any() for tensor in read_resident(folder.site_tensors(next(iter(packed))[0]).values()).values()
    )


def test_a_block_is_dropped_whole_or_not_at_all(tmp_path: Path) -> None:
    """What stands before the end of a block is free to drop, but only with the end; and the packed model goes without."""
    source = save_tiny("llama", tmp_path / "model")
    model = describe_model(source)
    dropped = WeightOption(DroppedGrid(), NearestRounding())
    damages = {}
    for site in model.weights:
        of_block = 0.01 if site.id == "model.layers.1.self_attn.o_proj" else 5.0
        lost = follows_for_free(site, dropped) or Damage(of_block, "measured")
        damages[site.id] = {WeightOption(): NONE, dropped: lost}
    whole_peak = answer(model, ()).plan.prediction.peak_bytes
    attention = sum(site.num_bytes for site in model.weights if ".1.self_attn." in site.id)
    question = Question(
        model=model,
        workload=ServeWorkload(24, 9),
        machine=MACHINE,
        budget_bytes=whole_peak - attention + 64,
        budget_kind="tensor",
        weight_damages=damages,
        kv_damages={site.id: {KVOption(): NONE} for site in model.attention},
    )
    found = make_plan(question)
    assert found.fits and found.plan.prediction.damage.nats == pytest.approx(0.01)
    assert [row.stored_bytes > 0 for row in found.plan.kv] == [
        True,
        False,
    ]  # the dropped attention's cache goes with it
    held = found.plan.kv[0].stored_bytes
    assert {found.plan.prediction.timeline[p]["kv"]["device"] for p in ("prefill", "decode")} == {held}
    gone = {row.site for row in found.plan.weights if row.option}
    assert gone == {site.id for site in model.weights if ".1.self_attn." in site.id}
    pack(model, found.plan, tmp_path / "packed")
    whole = load_whole(source, torch.float32)
    whole.model.layers[1].self_attn.o_proj.weight.data.zero_()
    ids = random_ids(2, 20)
    with torch.no_grad():
        packed, wanted = load(tmp_path / "packed")(ids, use_cache=False).logits, whole(ids, use_cache=False).logits
    assert torch.allclose(packed, wanted, atol=1e-4 * float(wanted.abs().max()))
    loaded = load(tmp_path / "packed")
    out = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert out.past_key_values.num_bytes() <= held
    again = whole.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out.sequences, again)
    decoder, refusal = open_decoder(loaded)
    assert decoder is not None, refusal
    assert torch.equal(decoder.generate(ids[:1], torch.ones_like(ids[:1]), 4, capacity_tokens=23)[0], again)


def test_skipped_layers_are_never_held(tmp_path: Path) -> None:
    """As many layers as must go, evenly spread: their matrices and caches take no byte, and the others are as they were."""
    source = save_tiny("llama", tmp_path / "model", num_layers=5)
    model = describe_model(source)
    (dropped,) = all_recipes()["unified-layer-skipping"].options()
    damages = {
        site.id: {WeightOption(): NONE, dropped: follows_for_free(site, dropped) or Damage(1.0, "proxied")}
        if site.layer is not None
        else {WeightOption(): NONE}
        for site in model.weights
    }
    layer = sum(site.num_bytes for site in model.weights if site.layer == 0)
    question = Question(
        model=model,
        workload=ServeWorkload(24, 9),
        machine=MACHINE,
        budget_bytes=answer(model, ()).plan.prediction.peak_bytes - 2 * layer,
        budget_kind="tensor",
        weight_damages=damages,
        kv_damages={site.id: {KVOption(): NONE} for site in model.attention},
        recipes=("unified-layer-skipping",),
    )
    meter: Any = SimpleNamespace(judge=lambda built, chosen: Damage(1.0, "measured"))
    found = make_plan(question, meter=meter)
    assert found.fits
    skipped = {row.layer for row in found.plan.weights if row.layer is not None and not row.stored_bytes}
    assert skipped == {1, 3} and {row.layer for row in found.plan.kv if not row.stored_bytes} == skipped
    assert all(row.stored_bytes == row.neutral_bytes for row in found.plan.weights if row.layer not in skipped)
    pack(model, found.plan, tmp_path / "packed")
    loaded, ids = load(tmp_path / "packed"), random_ids(1, 24)
    held = sum(tensor.untyped_storage().nbytes() for tensor in packed_tensors(loaded))
    assert (
        held
        == found.plan.prediction.timeline["decode"]["weights"]["device"]
        == 3 * layer + sum(site.num_bytes for site in model.weights if site.layer is None)
    )
    out = loaded.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert out.past_key_values.num_bytes() == found.plan.prediction.timeline["decode"]["kv"]["device"]
    whole = load_whole(source, torch.float32)
    del whole.model.layers[3], whole.model.layers[1]
    with torch.no_grad():
        wanted = whole(ids, use_cache=False).logits
        assert torch.allclose(loaded(ids, use_cache=False).logits, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    first = describe_model(save_tiny("llama", tmp_path / "a"))
    second = describe_model(save_tiny("qwen3", tmp_path / "b"))
    with pytest.raises(PlanError, match="another model"):
        pack(second, answer(first, ()).plan, tmp_path / "packed")
    assert not (tmp_path / "packed").exists() and not (tmp_path / "packed.partial").exists()
