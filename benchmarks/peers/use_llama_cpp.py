"""llama.cpp through llama-cpp-python: decoding speed of random weights in its own formats, and caches of its own types.

Task "speed": format ("Q4_0", "Q4_K_M" or "F16"), kv ("f16", "q8_0" or "q4_0"), batch, context (tokens in the cache before decoding), prefill, tokens and
turns (room is made for so many).
"""

import ctypes
import time
from pathlib import Path

from decoding import turns
from exchange import serve

LONG_CONTEXT = 1024
HELD = []  # callbacks of ours that llama.cpp calls for as long as it lives
KV_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
MATRICES = {
    "attn_q": "q",
    "attn_k": "kv",
    "attn_v": "kv",
    "attn_output": "o",
    "ffn_gate": "up",
    "ffn_up": "up",
    "ffn_down": "down",
}


def write_model(config, form, path):
    """A GGUF file of random weights in a Llama's shape; the same matrices for every format."""
    import gguf
    import numpy as np
    from llama_cpp import _ggml

    kinds = gguf.GGMLQuantizationType
    hidden, feed, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    head_dim = hidden // heads
    shapes = {
        "q": (hidden, hidden),
        "kv": (kv_heads * head_dim, hidden),
        "o": (hidden, hidden),
        "up": (feed, hidden),
        "down": (hidden, feed),
    }
    quantize = _ggml.libggml.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rng = np.random.default_rng(0)
    made = {}  # one random matrix per shape and type: speed does not depend on the values

    def packed(shape, kind):
        if (shape, kind) not in made:
            matrix = (rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float32)
            if kind == kinds.F16:
                made[shape, kind] = matrix.astype(np.float16)
            else:
                block, size = gguf.GGML_QUANT_SIZES[kind]
                out = np.empty((shape[0], shape[1] // block * size), np.uint8)
                quantize(int(kind), matrix.ctypes.data, out.ctypes.data, 0, *shape, None)
                made[shape, kind] = out
        return made[shape, kind]

    def kind_of(name, layer):
        """Q4_K_M as llama.cpp mixes it: the head, and values and down projections of half the layers, in Q6_K."""
        if form != "Q4_K_M":
            return kinds[form]
        eighth = layers // 8
        more = layer is not None and (layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2)
        return kinds.Q6_K if name == "output" or (more and name in ("attn_v", "ffn_down")) else kinds.Q4_K

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(5, vocab))])
    writer.add_token_types([3, 3, *[1] * (vocab - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name in ("token_embd", "output"):
        kind = kind_of(name, None)
        writer.add_tensor(f"{name}.weight", packed((vocab, hidden), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name, shape in MATRICES.items():
            kind = kind_of(name, layer)
            writer.add_tensor(f"blk.{layer}.{name}.weight", packed(shapes[shape], kind), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(request):
    import llama_cpp as api
    import numpy as np

    config, settings = request["config"], request["settings"]
    path = Path(request["folder"]) / f"{settings['format']}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        write_model(config, settings["format"], partial)
        partial.rename(path)
    batch, context, tokens = settings["batch"], settings["context"], settings["tokens"]
    api.llama_backend_init()
    HELD.append(api.llama_log_callback(lambda level, text, data: None))
    api.llama_log_set(HELD[-1], None)
    model_params = api.llama_model_default_params()
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    params = api.llama_context_default_params()
    params.n_ctx = batch * (max(context, settings["prefill"]) + settings["turns"] * tokens + 8)
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = request["num_threads"]
    params.type_k = params.type_v = KV_TYPES[settings["kv"]]
    params.flash_attn_type = 1 if settings["kv"] != "f16" or settings["flash_attention"] else 0
    params.kv_unified = False
    params.no_perf = True
    runner = api.llama_init_from_model(model, params)
    assert runner, "llama.cpp made no context of these settings"
    rng = np.random.default_rng(1)
    made = api.llama_batch_init(max(512, batch), 0, 1)

    def decode(rows):
        """Rows of (token, position, sequence, wants logits)."""
        made.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            made.token[i], made.pos[i], made.n_seq_id[i], made.logits[i] = token, position, 1, logits
            made.seq_id[i][0] = sequence
        code = api.llama_decode(runner, made)
        assert code == 0, f"llama_decode gave {code}"
        api.llama_synchronize(runner)

    def fill(sequence, length):
        ids = rng.integers(5, config["vocab_size"], length).tolist()
        for start in range(0, length, 512):
            rows = [(t, start + i, sequence, 0) for i, t in enumerate(ids[start : start + 512])]
            rows[-1] = (*rows[-1][:3], 1)
            decode(rows)

    memory = api.llama_get_memory(runner)
    saved = path.with_name(f"{settings['format']}-{settings['kv']}-{context}.state")
    state = {"position": -1}

    def fill_context():
        if context <= LONG_CONTEXT or batch > 1:
            for sequence in range(batch):
                fill(sequence, context)
            return
        # Reading thousands of tokens takes minutes, and timed runs are kept short: the cache is kept in a file.
        ids = (api.llama_token * context)()
        count = ctypes.c_size_t()
        if saved.exists():
            done = api.llama_state_seq_load_file(runner, str(saved).encode(), 0, ids, context, ctypes.byref(count))
            assert done and count.value == context, f"{saved} is not of this context"
        else:
            fill(0, context)
            partial = saved.with_suffix(".partial")
            assert api.llama_state_seq_save_file(runner, str(partial).encode(), 0, ids, context), "no state was saved"
            partial.rename(saved)

    def turn():
        prefill, steps = [], []
        if settings["prefill"]:  # in the cache's own place: the context is read again
            api.llama_memory_clear(memory, True)
            started = time.perf_counter()
            fill(0, settings["prefill"])
            prefill.append(time.perf_counter() - started)
            api.llama_memory_clear(memory, True)
            state["position"] = -1
        if state["position"] < 0:
            fill_context()
            state["position"] = context
        for _ in range(tokens):
            ids = rng.integers(5, config["vocab_size"], batch).tolist()
            started = time.perf_counter()
            decode([(t, state["position"], sequence, 1) for sequence, t in enumerate(ids)])
            steps.append(time.perf_counter() - started)
            state["position"] += 1
        return {"step_seconds": steps, "prefill_seconds": prefill}

    return turn, {
        "weight_bytes": int(api.llama_model_size(model)),
        "cache_tokens": int(params.n_ctx),
        "system_info": api.llama_print_system_info().decode(),
    }


def describe(request):
    import llama_cpp as api

    return {"system_info": api.llama_print_system_info().decode()}


if __name__ == "__main__":
    serve({"speed": turns(prepare), "describe": describe}, ["llama-cpp-python", "gguf"])
