"""Checkpoints that are quantized already: which tensors stand for which, by the layout that their config names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe import awq, compressed_tensors, gptq, mxfp4
from haversack.describe.stored_form import Read, StoredForm
from haversack.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from haversack.describe.checkpoint import CheckpointTensor

METHODS = (mxfp4.METHOD, gptq.METHOD, awq.METHOD, compressed_tensors.METHOD)
"""What `quantization_config.quant_method` may say of a checkpoint that is read."""

_HALVES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def check_quantization(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModelError where a model's config names a quantization whose tensors are not read."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, Mapping) else "?"
    if method not in METHODS:
        raise UnsupportedModelError(
            f"{name!r} is quantized already ({method}); packing starts from 16 or 32-bit weights, or from what "
            f"{', '.join(METHODS)} and GGUF store, so name another checkpoint (or save a dequantized copy with transformers)."
        )
    if method == gptq.METHOD:
        gptq.check(quantization, name)
    elif method == awq.METHOD:
        awq.check(quantization, name)
    elif method == compressed_tensors.METHOD:
        compressed_tensors.check(quantization, name)


def stored_forms(
    tensors: Mapping[str, CheckpointTensor], folder: Path, read: Read
) -> dict[str, tuple[StoredForm, tuple[int, ...], str]]:
    """Names that several of a checkpoint's tensors stand for: form, shape and dtype.

    MXFP4 is known by its names and shapes, the others by the folder's config. Raises CheckpointError for tensors that do not
    agree with the layout.
    """
    found: dict[str, tuple[StoredForm, tuple[int, ...], str]] = {}
    for base, shape in mxfp4.paired_names({name: (t.dtype, t.shape) for name, t in tensors.items()}).items():
        parts = {suffix: tensors[base + suffix] for suffix in (mxfp4.BLOCKS, mxfp4.SCALES)}
        found[base] = mxfp4.Mxfp4Form(parts, "MXFP4 (4.25 bits)"), shape, "BF16"
    config = _folder_config(folder)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in METHODS or method == mxfp4.METHOD:
        return found
    assert isinstance(quantization, Mapping)
    check_quantization(config, folder.name)
    dtype = _HALVES.get(str(config.get("dtype", config.get("torch_dtype"))))
    layout = {gptq.METHOD: gptq, awq.METHOD: awq, compressed_tensors.METHOD: compressed_tensors}[method]
    for name in tensors:
        if not name.endswith(layout.SUFFIX):
            continue
        base = name.removesuffix(layout.SUFFIX)
        if method == compressed_tensors.METHOD:
            form = compressed_tensors.form_of(base, tensors, read)
        else:
            form = (gptq if method == gptq.METHOD else awq).form_of(base, tensors, quantization)
        if form is None:
            held = {
                t.name.removeprefix(f"{base}."): (t.dtype, list(t.shape)) for t in tensors.values() if _is_of(t, base)
            }
            raise CheckpointError(
                f"{base!r} is stored in no layout of {method} that is known: {held}; config and weights do not belong "
                "together, or the checkpoint is of a newer form."
            )
        scales = next(part for word, part in form[0].parts.items() if word.endswith(("scale", "scales")))
        found[f"{base}.weight"] = (*form, dtype or scales.dtype)
    return found


def _is_of(tensor: CheckpointTensor, base: str) -> bool:
    return tensor.name.rpartition(".")[0] == base


def _folder_config(folder: Path) -> dict[str, Any]:
    """The folder's config, or nothing where there is none that can be read: who describes the model says so."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
