"""llama.cpp's caches of its own types: answers from them against those from one of f16. Runs in the environment of llama_cpp.

Task "kv": file (GGUF), kv ("q8_0" or "q4_0"), probes as in `cached_answers`, num_threads.
"""

import functools
import json
from pathlib import Path

from exchange import serve

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}


def kv(request):
    """Attention by the flash kernel for every type of cache, since quantized values need it; bytes are those of a sequence's state, as llama.cpp saves it."""
    import numpy as np

    probes = json.loads(Path(request["probes"]).read_text())
    settings = (request["file"], request["probes"], request["num_threads"])
    changed, held = answers(*settings, request["settings"]["kv"])
    reference, _ = answers(*settings, "f16")
    rows = {"kl": [], "nll": [], "exact": [], "bytes": held}
    for probe, p, q in zip(probes, reference, changed):
        right = np.array([ids[place] for ids, places in probe["turns"] for place in places])
        rows["kl"].append(float((np.exp(p) * (p - q)).sum(-1).mean()))
        rows["nll"].append(-float(q[np.arange(len(right)), right].mean()))
        rows["exact"].append(bool((q.argmax(-1) == right).all()))
    return rows


@functools.cache
def answers(file, probes_file, num_threads, kind):
    """Per probe, log-probabilities before each answer token `(answer tokens, vocab_size)`; and bytes held after the context."""
    import llama_cpp as api
    import numpy as np

    probes = json.loads(Path(probes_file).read_text())
    longest = max(len(p["context"]) + max(len(ids) for ids, _ in p["turns"]) for p in probes)
    api.llama_backend_init()
    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, None)
    model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = longest
    params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = num_threads
    params.type_k = params.type_v = TYPES[kind]
    params.flash_attn_type = 1
    context = api.llama_init_from_model(model, params)
    assert context, "llama.cpp made no context of these settings"
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    memory, made = api.llama_get_memory(context), api.llama_batch_init(longest, 0, 1)

    def decode(ids, start, wanted):
        made.n_tokens = len(ids)
        for i, token in enumerate(ids):
            made.token[i], made.pos[i], made.n_seq_id[i], made.logits[i] = token, start + i, 1, i in wanted
            made.seq_id[i][0] = 0
        code = api.llama_decode(context, made)
        assert code == 0, f"llama_decode gave {code}"

    out, held = [], []
    for probe in probes:
        length = len(probe["context"])
        api.llama_memory_clear(memory, True)
        decode(probe["context"], 0, {length - 1})
        held.append(int(api.llama_state_seq_get_size(context, 0)))
        rows = []
        for ids, places in probe["turns"]:
            decode(ids[:-1], length, {place - 1 for place in places})
            for place in places:
                logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, place - 1), (vocab_size,))
                shifted = logits.astype(np.float64) - logits.max()
                rows.append(shifted - np.log(np.exp(shifted).sum()))
            api.llama_memory_seq_rm(memory, 0, length, -1)
        out.append(np.stack(rows))
    api.llama_free(context)
    api.llama_model_free(model)
    return out, held


serve({"kv": kv}, ["llama-cpp-python"])
