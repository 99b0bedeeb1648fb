"""Adapters in peft's format, both ways: what we write peft computes with alike, and what peft writes we do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.peft_format import adapters_of, load_adapter, save_adapter
from haversack.engine.training_step import TrainingStep
from haversack.errors import CheckpointError
from haversack.jobs.training_run import open_model

IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23]])
FAMILY_NAMES = ("llama", "qwen3", "gpt2", "phi3")


def _adapted(family: str, targets: str, rank: int = 4) -> TrainingStep:
    """A float32 model with adapters whose second factor is not zero."""
    described = describe_model({**FAMILIES[family], "dtype": "float32"})
    workload = TuneWorkload(1, 8, precision="fp32", method="lora", lora_rank=rank, lora_targets=targets)
    step = TrainingStep(open_model(described, torch.float32, "sdpa"), described, workload)
    step.model.eval()
    for number, adapter in enumerate(adapters_of(step.model).values()):
        with torch.no_grad():
            adapter.up.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return step


def _base(family: str) -> Any:
    described = describe_model({**FAMILIES[family], "dtype": "float32"})
    return open_model(described, torch.float32, "sdpa").eval()


@pytest.mark.parametrize("targets", ["query-value", "linear"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_peft_reads_what_we_write(tmp_path: Path, family: str, targets: str) -> None:
    step = _adapted(family, targets)
    save_adapter(step.model, tmp_path, "the base")
    theirs = peft.PeftModel.from_pretrained(_base(family), tmp_path).eval()
    with torch.no_grad():
        plain = _base(family)(IDS).logits
        ours, found = step.model(IDS).logits, theirs(IDS).logits
    assert not torch.allclose(ours, plain, atol=1e-3)
    torch.testing.assert_close(found, ours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_read_what_peft_writes(tmp_path: Path, use_rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_rslora=use_rslora
    )
    theirs = peft.get_peft_model(_base("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    step = _adapted("llama", "query-value")
    load_adapter(step.model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(step.model(IDS).logits, theirs(IDS).logits, atol=2e-5, rtol=1e-4)


def test_an_adapter_of_another_kind_place_or_rank_is_refused(tmp_path: Path) -> None:
    save_adapter(_adapted("llama", "query-value").model, tmp_path, "the base")
    with pytest.raises(CheckpointError, match="adapts other places"):
        load_adapter(_adapted("llama", "linear").model, tmp_path)
    with pytest.raises(CheckpointError, match=r"lora_rank=4"):
        load_adapter(_adapted("llama", "query-value", rank=2).model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora=True"):
        load_adapter(_adapted("llama", "query-value").model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no readable adapter_config"):
        load_adapter(_adapted("llama", "query-value").model, tmp_path)
