"""Tables of a cache's codes from a model's own keys, values and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from tests.engine.tiny import random_ids, save_tiny

from haversack.codecs.codebooks import codebook
from haversack.describe.model import describe_model
from haversack.engine.attention_statistics import AttentionStatistics, _weighted_means
from haversack.engine.measure import DamageMeter
from haversack.parts.kv.non_uniform import NonUniformKV
from haversack.probes.suite import Task, Turn


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_table_goes_where_errors_weigh():
    """Numbers near -1 weigh nothing, those near 2 and 3 do: a value each, and the two that nothing needs stay where they were."""
    x = torch.cat([torch.full((100,), -1.0), torch.full((10,), 2.0), torch.full((10,), 3.0)])
    weight = torch.cat([torch.zeros(100), torch.ones(20)])
    found = _weighted_means(x, weight, torch.tensor([-2.0, -0.5, 1.5, 4.0]))
    assert found == pytest.approx((-2.0, -0.5, 2.0, 3.0))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_layer_gets_tables_that_a_part_takes(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    model, ids = describe_model(folder), random_ids(1, 100, 3)[0].tolist()
    task = Task("needle", tuple(ids[:90]), (Turn(tuple(ids[90:94]), tuple(ids[94:])),))
    module = DamageMeter(model, torch.zeros(1, 1, dtype=torch.int64)).model
    statistics = AttentionStatistics(module, model.attention, model.dtype, [task])
    part, usual = NonUniformKV(2, 32, 0, 1), tuple(codebook("max2").ordered.tolist())
    damages = statistics.eviction_damage  # by layer; nothing where everything fits
    assert damages == [0.0] * len(model.attention)
    tables = statistics.tables(part)
    assert len(tables) == len(model.attention)
    for of_keys, of_values in tables:
        fitted = NonUniformKV(2, 32, 0, 1, key_table=of_keys, value_table=of_values)
        assert fitted.key_table != usual != fitted.value_table
        assert max(map(abs, (*of_keys, *of_values))) < 6  # deviations


def test_a_layer_that_evicts_alone_costs_something(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, ids = describe_model(folder), random_ids(1, 300, 3)[0].tolist()
    task = Task("needle", tuple(ids[:290]), (Turn(tuple(ids[290:294]), tuple(ids[294:])),))
    module = DamageMeter(model, torch.zeros(1, 1, dtype=torch.int64)).model
    damages = AttentionStatistics(module, model.attention, model.dtype, [task]).eviction_damage
    assert len(damages) == len(model.attention) and all(damage > 0 for damage in damages)
