"""llama.cpp's quantizers, from a prebuilt wheel: K-quants and IQ-quants with an importance matrix, read back by gguf.

Settings: linears and embeddings, each the name of a ggml type for every matrix inside and outside the layers. Bytes are those of the tensors as a GGUF
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


def types(request):
    """Bits per weight of every type that can be made."""
    import gguf

    return {"bits": {kind.name: 8 * size / block for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}}


def describe(request):
    lib = library()
    lib.llama_print_system_info.restype = ctypes.c_char_p
    return {"system_info": lib.llama_print_system_info().decode()}


if __name__ == "__main__":
    serve({"weights": weights, "types": types, "describe": describe}, ["xllamacpp", "gguf"])
