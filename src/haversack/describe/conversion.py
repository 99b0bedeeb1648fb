"""From checkpoint names to module parameters and back, by transformers' own conversion mapping.

Loading renames each checkpoint tensor, groups those that one converter merges, and runs the converter's operations
(transformers 5: `core_model_loading.convert_and_load_state_dict_in_model`). The same is done here on layouts instead of
tensors, so that for every parameter we know which bytes of the checkpoint it is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

from haversack.describe.layout import Layout, UnlocatableError
from haversack.errors import UnsupportedModelError
from haversack.ledger import StoredTensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def checkpoint_tensors(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """The tensors `save_pretrained` would write for these parameters, by their checkpoint names; none is computed.

    Raises UnsupportedModelError where transformers' own conversions can't be run on parameters of these shapes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from haversack.describe.checkpoint import dtype_name

    try:
        saved = revert_weight_conversion(model, dict(state))
    except Exception as error:  # the operations check nothing: no experts, say, and a chunk of none is asked for
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UnsupportedModelError(
            f"this {model.config.model_type} config makes parameters that transformers can't write as a checkpoint "
            f"({type(error).__name__}: {reason}); check the config's counts."
        ) from None
    return {name: StoredTensor(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in saved.items()}


def locate_parameters(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor], parameter_names: set[str], name: str
) -> tuple[dict[str, Layout], tuple[str, ...]]:
    """Where each parameter lies in a checkpoint of these tensors, and the tensors that no parameter reads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = dict.fromkeys(parameter_names, True)
    prefix = model.base_model_prefix

    layouts: dict[str, Layout] = {}
    groups: dict[str, WeightConverter] = {}
    unused: list[str] = []
    for source in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if target not in known and source in known:
            target, pattern = rename_source_key(source, [], [], prefix, known)
        if target not in known:
            unused.append(source)
            continue
        layout = Layout.whole(source, tensors[source].shape)
        if pattern is None:
            layouts[target] = layout
            continue
        if target not in groups:
            groups[target] = deepcopy(by_pattern[pattern])
        groups[target].add_tensor(target, source, pattern, layout)  # type: ignore[arg-type]
    for target, converter in groups.items():
        try:
            converted = converter.convert(target, model=model, config=model.config)
        except UnlocatableError as error:
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            raise UnsupportedModelError(
                f"{name!r} ({model.config.model_type}) stores {target!r} in a form that can't be sliced ({operations}: "
                f"{error}); this architecture is not supported."
            ) from None
        for parameter, value in converted.items():
            layouts[parameter] = value[0] if isinstance(value, list) else value
    return layouts, tuple(unused)
