"""How the next token is chosen and when an answer ends: the model's generation config, with what the user asks on top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as process

from haversack.engine.choice import Choice
from haversack.errors import PlanError, UsageError

DEFAULT_TOP_K = 50
"""What transformers' `generate` takes where a model that samples names no top_k."""

FOLLOWED = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
}
"""Settings of a generation config that shape the choice, and are followed."""

_TYPES: dict[str, Any] = {
    "do_sample": bool, "temperature": int | float, "top_k": int, "top_p": int | float, "min_p": int | float,
    "typical_p": int | float, "repetition_penalty": int | float, "no_repeat_ngram_size": int,
}  # fmt: skip

HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "stop_strings", "transformers_version", "max_length", "max_new_tokens",
    "use_cache", "cache_implementation", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "num_return_sequences", "early_stopping", "length_penalty", "prefill_chunk_size",
}  # fmt: skip
"""Settings that are followed elsewhere, or change no token of one answer."""


class Sampler:
    """Chooses tokens as transformers' `generate` does under the same settings and seed.

    `settings` says what is in force; `notes` names settings of the generation config that are not followed.
    """

    def __init__(self, config: GenerationConfig | None, asked: Choice | None = None):
        asked = asked or Choice()
        config = config or GenerationConfig()
        given = {k: v for k, v in config.to_diff_dict().items() if v is not None}
        wants = {name: value for name in FOLLOWED if (value := getattr(config, name, None)) is not None}
        for name in ("temperature", "top_p", "top_k"):
            if getattr(asked, name) is not None:
                wants |= {name: getattr(asked, name), "do_sample": True}
        if asked.temperature == 0:
            wants["do_sample"] = False
        self.is_greedy = not wants.get("do_sample", False)
        self.notes = tuple(
            f"generation_config.json asks for {name}={given[name]!r}, which is not followed"
            for name in sorted(set(given) - FOLLOWED - HARMLESS)
            if not name.startswith("_") and given[name] not in (False, 0, 1, 1.0)
        )
        self._processors = process.LogitsProcessorList()
        self.settings: dict[str, Any] = {"do_sample": not self.is_greedy}
        self._add("repetition_penalty", wants, 1.0, process.RepetitionPenaltyLogitsProcessor)
        self._add("no_repeat_ngram_size", wants, 0, process.NoRepeatNGramLogitsProcessor)
        if self.is_greedy:
            return
        wants.setdefault("top_k", DEFAULT_TOP_K)
        self._add("temperature", wants, 1.0, process.TemperatureLogitsWarper)
        self._add("top_k", wants, 0, process.TopKLogitsWarper)
        self._add("top_p", wants, 1.0, process.TopPLogitsWarper)
        self._add("min_p", wants, 0.0, process.MinPLogitsWarper)
        self._add("typical_p", wants, 1.0, process.TypicalLogitsWarper)
        self._generator = torch.Generator()
        seed = self._generator.seed() % 2**63 if asked.seed is None else asked.seed
        self._generator.manual_seed(seed)
        self.settings["seed"] = seed

    def _add(self, name: str, wants: dict[str, Any], neutral: float, build: Any) -> None:
        value = wants.get(name, neutral)
        if value == neutral:
            return
        try:
            self._processors.append(build(value))
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"generation_config.json asks for {name}={value!r}: {reason}; mend it there.") from None
        self.settings[name] = value

    def choose(self, logits: torch.Tensor, tokens: Sequence[int]) -> int:
        """The next token from the last one's logits `(vocab,)` and every token so far."""
        scores = logits[None].float()
        if self._processors:
            scores = self._processors(torch.tensor([list(tokens)]), scores)  # type: ignore[arg-type]
        if self.is_greedy:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def read_generation_config(folder: str | Path) -> GenerationConfig | None:
    """A folder's generation config, or None where it brought none. Raises PlanError for one that can't be used."""
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}, not an object")
        for name, allowed in _TYPES.items():
            value = settings.get(name)
            if value is not None and (not isinstance(value, allowed) or isinstance(value, bool) != (allowed is bool)):
                raise ValueError(f"{name} is {value!r}")
        for name, item in (("eos_token_id", int), ("stop_strings", str)):
            value = settings.get(name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if any(not isinstance(entry, item) or isinstance(entry, bool) for entry in values):
                raise ValueError(f"{name} is {value!r}")
        return GenerationConfig.from_dict(settings)
    except Exception as error:
        raise PlanError(
            f"{file} can't be used ({' '.join(str(error).split())[:200].rstrip('.')}); mend it there."
        ) from None


def end_tokens(config: GenerationConfig | None, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's list, or the tokenizer's own where it names none."""
    named = None if config is None else config.eos_token_id
    if named is None:
        named = tokenizer.eos_token_id
    return frozenset([] if named is None else named if isinstance(named, list | tuple) else [named])


def end_strings(config: GenerationConfig | None) -> tuple[str, ...]:
    """Words that end an answer, by the generation config."""
    named = None if config is None else config.stop_strings
    return () if not named else (named,) if isinstance(named, str) else tuple(named)
