"""Optimizers and recomputation as ordinary pieces: in transformers' Trainer and in TRL's SFTTrainer, as they come."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from haversack.data import reference_model
from haversack.describe.model import describe_model
from haversack.engine.composed_optimizer import ComposedOptimizer
from haversack.engine.recompute import RecomputeLayers
from haversack.engine.training_step import inner_matrices
from haversack.jobs.training_run import open_model
from haversack.recipes.base import optimizer_names, optimizer_option

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_steps": 6,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.01,
}  # fmt: skip


class Counting(Dataset):
    """Rows that count on from different numbers."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 12)
        return {"input_ids": ids, "labels": ids}


def made(name: str, model: PreTrainedModel) -> tuple[type[ComposedOptimizer], dict[str, Any]]:
    """What Trainer's `optimizer_cls_and_kwargs` takes."""
    matrices = inner_matrices(model, describe_model(model.config.to_dict()))
    return ComposedOptimizer, {"option": optimizer_option(name), "matrices": matrices, "lr": 1e-2}


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train(folder: Path, optimizer: Callable[[Any], Any] | None = None, recompute: tuple[int, ...] = ()) -> Trainer:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa")
    arguments = TrainingArguments(output_dir=str(folder), optim="adamw_torch", **ARGUMENTS)
    how = {} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer(model)}
    trainer = Trainer(model, arguments, train_dataset=Counting(), **how)
    with RecomputeLayers(model, recompute):
        trainer.train()
    return trainer


def test_adamw_in_trainer_is_torchs_with_layers_that_recompute(tmp_path: Path) -> None:
    theirs, ours = train(tmp_path), train(tmp_path, lambda model: made("adamw", model), (1,))
    assert isinstance(ours.optimizer.optimizer, ComposedOptimizer)
    for one, other in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_learns_in_trainer(tmp_path: Path, name: str) -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa")
    kind, settings = made(name, model)
    optimizer = kind(model.parameters(), **settings)
    arguments = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    found = losses(Trainer(model, arguments, train_dataset=Counting(), optimizers=(optimizer, scheduler)))
    assert len(found) == 6 and found[-1] < found[0] - 0.01, found


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install trl")
@pytest.mark.parametrize("name", ["adamw8bit", "galore"])
def test_an_optimizer_learns_in_trls_sft_trainer(tmp_path: Path, name: str) -> None:
    from datasets import Dataset as Rows
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = open_model(describe_model({**CONFIG, "vocab_size": 4096}), torch.float32, "sdpa")
    rows = Rows.from_list([{"prompt": f"{n} {n + 1}", "completion": f" {n + 2}"} for n in range(16)])
    tokenizer = AutoTokenizer.from_pretrained(reference_model("a"))
    tokenizer.pad_token = tokenizer.eos_token
    arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=32, **ARGUMENTS)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, optimizer_cls_and_kwargs=made(name, model))  # fmt: skip
    with RecomputeLayers(model, [0]):
        found = losses(trainer)
    assert len(found) == 6 and found[-1] < found[0] - 0.01, found
