"""Weight sites: every matrix of the text decoder, cut from its parameter and found in the checkpoint.

A linear, an embedding, the head and a transposed Conv1D are one matrix each; fused projections are cut into their parts
and stacks of experts into one matrix per expert and part. What can't be cut (numbers that are no rows of a checkpoint
tensor) and what is no matrix stays with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from haversack.describe import names
from haversack.describe.layout import Layout, UnlocatableError
from haversack.describe.site import WeightSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Part:
    """Rows `start:stop:step` of a parameter's matrix, with their role and the label of the part ("" for the whole)."""

    role: str
    label: str
    start: int
    stop: int
    step: int = 1


def weight_sites(
    model: PreTrainedModel,
    decoder: str,
    layouts: Mapping[str, Layout],
    dtypes: Mapping[str, str],
    aliases: Mapping[str, Sequence[str]],
) -> tuple[WeightSite, ...]:
    """All sites in module order; `dtypes` names the distinct parameters, `aliases` the other names of tied ones."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sites: list[WeightSite] = []
    for path, module in model.named_modules():
        if names.is_router(path) or not (path.startswith(decoder) or module is head):
            continue
        matrices: list[tuple[str, bool, list[_Part]]] = []
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            role = "embedding" if module is embedding else "head" if module is head else names.role_of(path)
            transposed = isinstance(module, Conv1D)
            num_rows = module.weight.shape[1 if transposed else 0]
            matrices.append(("weight", transposed, _fused(path, config, num_rows) or [_Part(role, "", 0, num_rows)]))
        else:
            matrices += _stacks(module, config.hidden_size)
        for name, transposed, parts in matrices:
            parameter = f"{path}.{name}"
            if parameter not in dtypes:  # tied to one that came first
                continue
            tied = tuple(alias.rpartition(".")[0] for alias in aliases.get(parameter, ()))
            bias = any(getattr(module, word, None) is not None for word in ("bias", f"{name}_bias"))
            cut = _cut(path, name, layouts[parameter], transposed, parts, dtypes[parameter], bias, tied)
            try:
                sites += list(cut)
            except UnlocatableError:
                continue
    return tuple(sites)


def _fused(path: str, config: Any, num_rows: int) -> list[_Part]:
    """The row blocks of a fused projection: equal halves for gate and up, by heads for query, key and value."""
    roles = names.fused_roles(path)
    if len(roles) == 3:
        num_heads = config.num_attention_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        lengths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    elif roles:
        lengths = [num_rows // len(roles)] * len(roles)
    else:
        return []
    if sum(lengths) != num_rows:
        return []
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        _Part(role, role, start, start + length) for role, start, length in zip(roles, starts, lengths, strict=True)
    ]


def _stacks(module: Any, hidden_size: int) -> Iterator[tuple[str, bool, list[_Part]]]:
    """Stacks (experts, out, in), or (experts, in, out) where transposed; gate and up in blocks, or interleaved row by
    row where the module says that they are not concatenated."""
    stacks = {name: tensor for name, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3}
    transposed = _stacks_transposed(module, stacks, hidden_size)
    if transposed is None:
        return
    for name, tensor in stacks.items():
        num_rows = tensor.shape[2 if transposed else 1]
        roles = names.fused_roles(name)
        if not roles:
            role = names.role_of(f".{name}")
            parts = [_Part(role, role, 0, num_rows)]
        elif getattr(module, "is_concatenated", True):
            half = num_rows // len(roles)
            parts = [_Part(role, role, i * half, (i + 1) * half) for i, role in enumerate(roles)]
        else:
            parts = [_Part(role, role, i, num_rows, len(roles)) for i, role in enumerate(roles)]
        yield name, transposed, parts


def _stacks_transposed(module: Any, stacks: Mapping[str, Any], hidden_size: int) -> bool | None:
    """What the module says, or what its shapes leave possible; None where these are no experts."""
    if hasattr(module, "is_transposed"):
        return module.is_transposed
    if not {"gate_up_proj", "down_proj"} <= stacks.keys():
        return None
    (_, *both), (_, *down) = stacks["gate_up_proj"].shape, stacks["down_proj"].shape
    for transposed in (False, True):
        (double_width, hidden), (out_features, width) = (both, down) if not transposed else (both[::-1], down[::-1])
        if hidden == out_features == hidden_size and double_width == 2 * width:
            return transposed
    return None


def _cut(
    path: str,
    name: str,
    source: Layout,
    transposed: bool,
    parts: Sequence[_Part],
    dtype: str,
    bias: bool,
    tied_modules: tuple[str, ...],
) -> Iterator[WeightSite]:
    """The sites of one parameter: `source` is where it lies in the checkpoint, stacked where it has three axes."""
    stacked = source.ndim == 3
    used = Layout.whole(f"{path}.{name}", source.shape)
    in_module = _matrix(used.unbind()[0] if stacked else used, transposed)
    module_slices = [in_module.narrow(0, part.start, part.stop, part.step).as_matrix_pieces()[0] for part in parts]
    for index, matrix in enumerate(source.unbind() if stacked else [source]):
        matrix = _matrix(matrix, transposed)
        for part, module_slice in zip(parts, module_slices, strict=True):
            rows = matrix.narrow(0, part.start, part.stop, part.step)
            if stacked:
                module_slice = replace(module_slice, index=((index, index + 1), *module_slice.index[1:]))
            label = f"{index}.{part.label}" if stacked else part.label
            yield WeightSite(
                id=f"{path}#{label}" if label else path,
                role=part.role,
                layer=layer_of(path),
                out_features=rows.shape[0],
                in_features=rows.shape[1],
                dtype=dtype,
                module=path,
                parameter=name,
                pieces=rows.as_matrix_pieces(),
                module_slice=module_slice,
                bias=bias,
                tied_modules=tied_modules,
                expert=index if stacked else None,
            )


def _matrix(layout: Layout, transposed: bool) -> Layout:
    return layout.transpose(0, 1) if transposed else layout


def layer_of(path: str) -> int | None:
    """The first number in a module path: decoder layers are the outermost numbered list."""
    return next((int(word) for word in path.split(".") if word.isdigit()), None)
