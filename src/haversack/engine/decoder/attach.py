"""May a model decode by compiled steps? A small random copy of its config decodes both ways, past its windows.

As with `engine.reach`, nothing here knows an architecture by name: what a trace can't hold is refused by name, and what it
holds wrongly shows up as a difference of logits. The verdict on a config is kept on disk, under what made it: the config,
this package's own code, the versions it stands on and the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from haversack.cache import cache_folder
from haversack.engine.attention import NAME
from haversack.engine.decoder.loop import Decoder
from haversack.engine.generation import install_kv_plan
from haversack.engine.kv_cache import HaversackCache
from haversack.engine.reach import TOLERANCE, neutral_plan, small_copy
from haversack.errors import HaversackError, UnsupportedModelError
from haversack.formats.output import write_whole
from haversack.kernels.llvm import host_target

PROMPT_TOKENS, PADDING_TOKENS, NUM_STEPS = 21, 5, 14


def attach_decoder(model: Any) -> Decoder:
    """A decoder of a model with a planned cache. Raises UnsupportedModelError, naming why steps can't be compiled."""
    check_steps(model.config)
    return Decoder(model)


def check_steps(config: Any) -> None:
    """Raise UnsupportedModelError unless compiled steps of a small copy give the model's own logits."""
    path = cache_folder("decoders") / f"{_key(config)}.json"
    verdict = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        verdict = str(json.loads(path.read_text())["verdict"])
    if verdict is None:
        verdict = _verdict(config)
        with contextlib.suppress(OSError, HaversackError):  # a folder that can't be written only costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"verdict": verdict}))
    if verdict:
        raise UnsupportedModelError(f"{config.model_type}: {verdict}; transformers' own loop decodes it.")


def _verdict(config: Any) -> str:
    """Why steps of this family can't be compiled; empty where they can."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a copy with other sizes draws warnings that mean nothing for the model itself
    try:
        difference = _largest_difference(small_copy(config))
    except HaversackError as error:
        return str(error).rstrip(".")
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        return (
            f"a small copy's compiled step does not run ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        )
    finally:
        logging.set_verbosity(verbosity)
    if difference <= TOLERANCE:
        return ""
    return f"a small copy's logits differ by {difference:.2g} of their largest (at most {TOLERANCE:.0e} is rounding)"


@torch.no_grad()
def _largest_difference(model: Any) -> float:
    """Of logits, over the largest magnitude, between compiled steps and the model's own; two sequences, one padded."""
    generator = torch.Generator().manual_seed(2)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(0, vocab_size, (2, PROMPT_TOKENS + NUM_STEPS), generator=generator)
    real = torch.ones_like(tokens)
    real[1, :PADDING_TOKENS] = 0
    plan = neutral_plan(model, batch_size=2, capacity_tokens=tokens.shape[1])
    install_kv_plan(model, plan)
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    caches = [HaversackCache(plan) for _ in range(2)]
    prompt = {"input_ids": tokens[:, :PROMPT_TOKENS], "attention_mask": real[:, :PROMPT_TOKENS]}
    for filled in caches:
        model(**prompt, position_ids=positions[:, :PROMPT_TOKENS], past_key_values=filled, use_cache=True)
    steps = Decoder(model).steps(caches[1], tokens[:, PROMPT_TOKENS])
    largest = scale = 0.0
    for at in range(PROMPT_TOKENS, tokens.shape[1]):
        found = steps.logits(tokens[:, at])
        expected = model(
            input_ids=tokens[:, at : at + 1],
            attention_mask=real[:, : at + 1],
            position_ids=positions[:, at : at + 1],
            past_key_values=caches[0],
            use_cache=True,
        ).logits[:, -1]
        difference = float((found - expected).abs().max())
        largest = max(largest, difference if difference == difference else float("inf"))
        scale = max(scale, float(expected.abs().max()))
    return largest / scale


def _key(config: Any) -> str:
    facts = [json.dumps(config.to_dict(), sort_keys=True, default=str), _code(), NAME]
    facts += [metadata.version("torch"), metadata.version("transformers"), str(host_target())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


@cache
def _code() -> str:
    """A fingerprint of the code that steps are made by."""
    package = Path(__file__).parents[2]
    files = sorted(f for room in ("kernels", "parts/kv", "engine") for f in (package / room).rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
