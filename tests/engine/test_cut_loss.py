"""The cut loss in real models: equal to transformers' own, for every family that it takes; the others are refused by name."""

from __future__ import annotations

import pytest
import torch
from tests.describe.families import FAMILIES
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload
from haversack.engine.cut_loss import CutLoss, _head_output, cuts
from haversack.engine.trace import LiveBytes
from haversack.engine.training_step import TrainingStep
from haversack.engine.true_values import TrueValues
from haversack.errors import UnsupportedModelError
from haversack.jobs.training_run import open_model
from haversack.kernels import pieces
from haversack.kernels.cut_cross_entropy import cut_cross_entropy
from haversack.parts.loss.base import HeadOutput


def config_of(family: str, **changes: object) -> PretrainedConfig:
    data = {**FAMILIES[family], **changes}
    return CONFIG_MAPPING[data["model_type"]].from_dict(data)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_models_own_loss(family: str) -> None:
    """Loss and every gradient, with some labels masked; tied heads, biases and softcaps among the families."""
    config = config_of(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # nothing is dropped at random
    ids = torch.randint(3, 72, (2, 17))
    labels = ids.masked_fill(torch.rand(2, 17) < 0.3, -100)
    found = []
    for loss in (CutLoss(config)(model, labels, input_ids=ids), model(input_ids=ids, labels=labels).loss):
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert torch.allclose(grad, found[1][1][name], atol=1e-6), name


def test_softcaps_and_scales_are_found() -> None:
    capped = config_of("gemma2", final_logit_softcapping=30.0)
    assert CutLoss(capped).output == HeadOutput(1.0, 30.0)
    granite = CONFIG_MAPPING["granite"].from_dict({**FAMILIES["llama"], "model_type": "granite", "logits_scaling": 8.0})
    assert CutLoss(granite).output == HeadOutput(0.125, None)


def test_other_heads_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    def forward(self: object, *args: object, **kwargs: object) -> object:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits.abs()
        return out

    plain = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    _head_output.cache_clear()
    with pytest.raises(UnsupportedModelError, match="llama: its loss can't be cut"):
        CutLoss(config_of("llama"))
    assert not cuts(describe_model(FAMILIES["llama"]))
    _head_output.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_training_step_with_either_loss(precision: str) -> None:
    described = describe_model(FAMILIES["qwen2"])
    ids = torch.randint(0, 72, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for loss in ("fp32", "cut"):
        workload = TrainWorkload(2, 16, precision=precision, loss=loss)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        step = TrainingStep(open_model(described, dtype, "sdpa"), described, workload).begin(described)
        losses.append([step.run([{"ids": ids}]) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precision == "fp32" else 5e-3)


def test_blocks_in_the_middle_hold_what_the_second_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors without values few blocks are walked: as many bytes, in the time of nine blocks where a long text has thousands."""

    def held() -> int:
        with FakeTensorMode(), TrueValues(), LiveBytes() as live:
            hidden = torch.empty(1100, 8, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(700, 8, dtype=torch.bfloat16, requires_grad=True)
            labels = torch.zeros(1100, dtype=torch.int64)
            cut_cross_entropy(hidden, weight, None, labels, (256, 128)).sum().backward()
        return live.peak_bytes

    few = held()
    monkeypatch.setattr(pieces, "SHOWN_PIECES", 10**9)
    assert few == held()
