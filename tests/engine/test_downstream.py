"""Divergences from cached layer inputs are those of the whole model with the same change."""

import json

import pytest
import torch
from tests.engine.tiny import random_ids, save_tiny

from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import describe_model
from haversack.engine.downstream import CacheChange, Downstream, HeadChange, MatrixChange
from haversack.engine.layers import StreamedModel
from haversack.engine.measure import DamageMeter
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding

OPTION = WeightOption(grid=IntegerGrid(2, 64), rounding=NearestRounding())


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi3", "gemma2", "mixtral"])
def test_weight_changes_diverge_as_in_the_whole_model(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    described, ids = describe_model(folder), random_ids(2, 24)
    checkpoint = Checkpoint.open(folder)
    meter = DamageMeter(described, ids, chunk_tokens=24)
    downstream = Downstream(StreamedModel.open(folder), ids, tmp_path / "scratch")
    checked = 0
    for layer in (None, 0, described.num_layers - 1):
        changes, expected = [], {}
        for site in [s for s in described.weights if s.layer == layer and s.role != "position"][:6]:
            tensors = OPTION.encode(WeightTask(read_site(checkpoint, site).float()))
            dense = OPTION.dense(tensors, site.out_features, site.in_features)
            changes.append(MatrixChange(site.id, site, lambda dense=dense: dense))
            expected[site.id] = float(meter.kl_per_token({site.id: (OPTION, tensors)}).mean())
        found = downstream.measure(changes)
        for key, nats in found.items():
            assert nats == pytest.approx(expected[key], rel=0.02, abs=1e-6), key
            checked += nats > 1e-5
    assert checked >= 8
    downstream.close()
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_that_attend_together_change_as_each_alone(family, tmp_path):
    """Softcaps and sliding windows included; scored places of two kinds, of which one is rare."""
    folder = save_tiny(family, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    described, ids = describe_model(folder), random_ids(2, 160)
    scored = {"rare": torch.zeros(ids.shape, dtype=torch.bool), "text": torch.ones(ids.shape, dtype=torch.bool)}
    scored["rare"][1, [130, 150]] = True
    downstream = Downstream(StreamedModel.open(folder), ids, tmp_path / "scratch", scored)
    options = (KVOption(SinksAndWindow(2, 12)), KVOption(represent=QuantizedKV(2, 2, 32, 0)))
    changed = 0
    for site in described.attention:
        together = [
            HeadChange(f"{i} {head}", site, head, option)
            for i, option in enumerate(options)
            for head in range(site.num_kv_heads)
        ]
        found = downstream.measure_apart([*together, HeadChange("plain", site, 0, KVOption())])
        for change in together:
            heads = [change.option if head == change.head else KVOption() for head in range(site.num_kv_heads)]
            alone = downstream.measure_apart([CacheChange("alone", site, by_head(heads))])["alone"]
            assert found[change.key] == pytest.approx(alone, rel=0.02, abs=1e-7)
            changed += alone["rare"] > 1e-6
        assert max(found["plain"].values()) <= 1e-7
    assert changed >= 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_cache_changes_diverge_as_in_the_whole_model(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    described, ids = describe_model(folder), random_ids(2, 600)
    option = KVOption(represent=QuantizedKV(key_bits=2, value_bits=2))
    meter = DamageMeter(described, ids)
    downstream = Downstream(StreamedModel.open(folder), ids, tmp_path / "scratch")
    measured = 0
    for site in described.attention:
        found = downstream.measure([CacheChange(site.id, site, option), CacheChange("plain", site, KVOption())])
        expected = float(meter.kl_per_token({}, {site.id: option}).mean())
        assert found[site.id] == pytest.approx(expected, rel=0.05, abs=1e-7)
        assert abs(found["plain"]) <= max(1e-7, 0.02 * expected)
        measured += expected > 1e-6  # a short sliding window never packs anything
    assert measured
