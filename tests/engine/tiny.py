"""Small random models whose predictions are neither flat nor certain, saved as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.describe.families import FAMILIES


def save_tiny(family: str, folder: Path, dtype: str = "float32", num_layers: int | None = 2) -> Path:
    """`num_layers` None leaves the family's config as it is."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {**FAMILIES[family], "dtype": dtype}
    if num_layers is None:
        pass
    elif family == "gpt2":
        config |= {"n_embd": 64, "n_layer": num_layers}
    else:
        config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers, "head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape) / 8)
        model.get_output_embeddings().weight.mul_(2.5)
    model.save_pretrained(folder)
    return folder


def tiny_config(family: str):
    """A family's small config, with heads of 32 channels, which compiled attention takes at 4 and 8 bits."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {**FAMILIES[family], "dtype": "float32"}
    if family == "gpt2":
        config |= {"n_positions": 128}  # it has a table of them
    else:
        config |= {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def load_whole(folder: Path, dtype: torch.dtype, attention: str = "sdpa"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, experts_implementation="eager"
    ).eval()


def random_ids(num_sequences: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 72, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(seed))
