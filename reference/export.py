"""Write a trained model as an ordinary Hugging Face folder, and prove that transformers computes the same logits.

python -m reference.export a FOLDER     # from the stable checkpoint, undecayed
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reference.model import MODELS, ModelConfig, ReferenceModel
from reference.paths import SHIPPED, scratch

# Largest difference of float32 logits between the two implementations; they sum in other orders.
LOGIT_TOLERANCE = 1e-3


def hugging_face_config(config: ModelConfig) -> Qwen3Config | LlamaConfig:
    """The transformers configuration of the same model."""
    family = Qwen3Config if config.is_qwen3 else LlamaConfig
    return family(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        max_position_embeddings=config.max_position, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.is_qwen3,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attention_bias=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip


def export(model: ReferenceModel, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights in bf16, configuration, generation settings and tokenizer into `folder`. Raises AssertionError where the reloaded model's logits differ."""
    config = hugging_face_config(model.config)
    with torch.device("meta"):
        shell = (Qwen3ForCausalLM if model.config.is_qwen3 else LlamaForCausalLM)(config)
    weights = {name: tensor.detach().cpu().to(torch.bfloat16).clone() for name, tensor in model.state_dict().items()}
    if model.config.is_qwen3:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    shell.load_state_dict(weights, strict=True, assign=True)
    shell.tie_weights()
    shell.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False)
    folder.mkdir(parents=True, exist_ok=True)
    shell.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone; a package is read by others
    tokenizer.save_pretrained(folder)
    check_logits(model, folder)


@torch.inference_mode()
def check_logits(model: ReferenceModel, folder: Path) -> None:
    """Compare, in float32 and from the same bf16 weights, the lean model with what `AutoModelForCausalLM` loads."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = ReferenceModel(model.config)
    rounded.load_state_dict({k: t.detach().cpu().to(torch.bfloat16).float() for k, t in model.state_dict().items()})
    ids = torch.randint(0, model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    difference = (loaded(ids).logits - rounded(ids)).abs().max().item()
    assert difference < LOGIT_TOLERANCE, f"logits of {folder} differ by {difference}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    model = ReferenceModel(MODELS[arguments.name])
    with safe_open(scratch() / arguments.name / "stable.safetensors", "pt") as file, torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{key}"))
    export(model, arguments.folder, PreTrainedTokenizerFast.from_pretrained(SHIPPED / "reference-a"))


if __name__ == "__main__":
    main()
