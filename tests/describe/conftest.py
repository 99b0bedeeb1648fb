from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.describe.families import FAMILIES


@pytest.fixture(scope="session")
def saved_families(tmp_path_factory: pytest.TempPathFactory):
    """Folders as `save_pretrained` writes them, of random models; made once each, on demand."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save_random(FAMILIES[family], folder)
            made[family] = folder
        return made[family]

    return get


def save_random(config: dict, folder: Path) -> None:
    """A model of this config with every parameter random (norms and biases too), saved in transformers' own naming."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder)
