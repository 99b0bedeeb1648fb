"""llama.cpp's quantizers, from a prebuilt wheel: K-quants and IQ-quants with an importance matrix, read back by gguf.

Task "logits": what llama.cpp computes from a GGUF file ("file") for sequences of token ids ("ids"), left as a float32 tensor "logits" in "out".
Task "quantize": see there.

Settings of "weights": linears and embeddings, each the name of a ggml type for every matrix inside and outside the layers. Bytes are those of the tensors as a GGUF
file holds them; norms stay float32, as llama.cpp keeps them.
"""

import ctypes
from pathlib import Path

from exchange import serve


def library():
    """The extension module exports ggml's C interface."""
    import xllamacpp

    lib = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return lib


def weights(request):
    import gguf
    import numpy as np
    from safetensors.numpy import load_file, save_file

    lib, settings = library(), request["settings"]
    importance = load_file(request["importance"])
    dense, stored = {}, {}
    for name, matrix in load_file(request["checkpoint"]).items():  # float32
        if matrix.ndim != 2:
            stored[name], dense[name] = matrix.nbytes, matrix
            continue
        kind = gguf.GGMLQuantizationType[settings["linears" if ".layers." in name else "embeddings"]]
        weighing = importance.get(name)
        if weighing is None and lib.ggml_quantize_requires_imatrix(int(kind)):
            raise ValueError(f"{kind.name} needs an importance matrix and {name} has none")
        rows, columns = matrix.shape
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if columns % block:
            raise ValueError(f"{kind.name} needs widths divisible by {block}; {name} has {columns}")
        packed = np.empty((rows, columns // block * size), np.uint8)
        matrix = np.ascontiguousarray(matrix, np.float32)
        pointer = None if weighing is None else np.ascontiguousarray(weighing, np.float32).ctypes.data
        done = lib.ggml_quantize_chunk(int(kind), matrix.ctypes.data, packed.ctypes.data, 0, rows, columns, pointer)
        assert done == packed.nbytes, (name, done, packed.nbytes)
        stored[name] = packed.nbytes
        dense[name] = gguf.quants.dequantize(packed, kind).astype(np.float32)
    path = str(Path(request["out"]).with_suffix(".dense.safetensors"))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in dense.items()}, path)
    return {"dense": path, "tensor_bytes": stored, "file_bytes": sum(stored.values())}


class Opaque(ctypes.Structure):
    """Parameters by value, of which only the first few are known: larger than either kind, and always the last argument."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def logits(request):
    import json

    import numpy as np
    from safetensors.numpy import save_file

    lib, pointer = library(), ctypes.c_void_p
    rows = json.loads(Path(request["ids"]).read_text())
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Opaque
    lib.llama_model_load_from_file.restype, lib.llama_model_load_from_file.argtypes = pointer, [ctypes.c_char_p, Opaque]
    lib.llama_init_from_model.restype, lib.llama_init_from_model.argtypes = pointer, [pointer, Opaque]
    lib.llama_model_get_vocab.restype, lib.llama_model_get_vocab.argtypes = pointer, [pointer]
    lib.llama_vocab_n_tokens.restype, lib.llama_vocab_n_tokens.argtypes = ctypes.c_int32, [pointer]
    lib.llama_get_memory.restype, lib.llama_get_memory.argtypes = pointer, [pointer]
    lib.llama_memory_clear.argtypes = [pointer, ctypes.c_bool]
    lib.llama_batch_init.restype, lib.llama_batch_init.argtypes = Batch, [ctypes.c_int32] * 3
    lib.llama_decode.restype, lib.llama_decode.argtypes = ctypes.c_int32, [pointer, Batch]
    lib.llama_get_logits.restype, lib.llama_get_logits.argtypes = ctypes.POINTER(ctypes.c_float), [pointer]
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(request["file"]).encode(), lib.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp does not load {request['file']}")
    length, params = max(map(len, rows)), lib.llama_context_default_params()
    params.words[0] = params.words[1] = params.words[2] = length  # n_ctx, n_batch, n_ubatch
    params.words[7] = params.words[8] = request["num_threads"]  # for one token, for several
    context = lib.llama_init_from_model(model, params)
    num_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(length, 0, 1)
    out = np.empty((len(rows), length, num_tokens), np.float32)
    for i, row in enumerate(rows):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = len(row)
        for at, token in enumerate(row):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
            batch.seq_id[at][0] = 0
        code = lib.llama_decode(context, batch)
        if code:
            raise ValueError(f"llama_decode gave {code}")
        out[i] = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(row), num_tokens))
    path = str(Path(request["out"]).with_suffix(".logits.safetensors"))
    save_file({"logits": out}, path)
    return {"logits": path}


def quantize(request):
    """A GGUF file written again by the gguf package, its matrices in a type that ggml's own code makes ("type")."""
    import gguf
    import numpy as np

    lib, kind = library(), gguf.GGMLQuantizationType[request["type"]]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    reader = gguf.GGUFReader(request["file"])
    writer = gguf.GGUFWriter(request["out"], reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim != 2:
            writer.add_tensor(tensor.name, values)
            continue
        packed = np.empty((len(values), values.shape[1] // block * size), np.uint8)
        lib.ggml_quantize_chunk(int(kind), values.ctypes.data, packed.ctypes.data, 0, *values.shape, None)
        writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"file_bytes": Path(request["out"]).stat().st_size}


def types(request):
    """Bits per weight of every type that can be made."""
    import gguf

    return {"bits": {kind.name: 8 * size / block for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}}


def describe(request):
    lib = library()
    lib.llama_print_system_info.restype = ctypes.c_char_p
    return {"system_info": lib.llama_print_system_info().decode()}


if __name__ == "__main__":
    serve(
        {"weights": weights, "logits": logits, "quantize": quantize, "types": types, "describe": describe},
        ["xllamacpp", "gguf"],
    )
