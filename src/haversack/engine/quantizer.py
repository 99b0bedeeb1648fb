"""How `AutoModelForCausalLM.from_pretrained(DIR)` loads a packed folder: a registered transformers quantizer.

transformers loads the 16-bit rest as it loads any checkpoint; the packed sites' parameters are taken off before and put
on afterwards, from their own files and into the plan's tiers, with the plan's KV cache and chunked prefill installed.
Importing this module registers both classes.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


@register_quantization_config("haversack")
class HaversackConfig(QuantizationConfigMixin):
    """What a packed folder's `config.json` says under `quantization_config`."""

    def __init__(self, version: int = 1, quant_method: str = "haversack", **ignored: Any):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version


@register_quantizer("haversack")
class HaversackQuantizer(HfQuantizer):
    """Puts packed sites on a model that transformers builds."""

    requires_calibration = False

    def update_attn_implementation(self, config: Any) -> Any:
        """Opens the folder too, and begins to read: here transformers has not yet begun to build the model, so that ours can be
        described."""
        from haversack.engine import attention
        from haversack.engine.load import begin_reading, open_packed
        from haversack.formats.packed_folder import BUDGET_KEY

        self.packed = open_packed(config._name_or_path, getattr(config, BUDGET_KEY, None))
        self.reading = begin_reading(self.packed)
        attention.register()
        config._attn_implementation = attention.NAME
        return config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond this package is needed."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from haversack.engine.load import prepare

        prepare(model, self.packed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from haversack.engine.load import finish

        finish(model, self.packed, self.reading)
        del self.reading  # the model holds what was read
        return model

    def is_serializable(self) -> bool:
        """A packed model is saved by copying its folder, not through `save_pretrained`."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False
