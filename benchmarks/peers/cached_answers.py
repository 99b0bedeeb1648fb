"""Answers given from a cache that was compressed after the context: KL from the full cache, exact match, bytes really held.

Runs in the peers' environments. Every probe is `context`, `question`, `answer` as token ids: the context is read first, then the cache is what the
method made of it; question and answer are fed token by token, so that each token is read from the cache and not beside it.
"""


def compare(model, probes, new_cache, compressing, held_bytes):
    """Per probe `kl` (nats per answer token), `exact` and `share` (bytes held after the context over those of a full 16-bit cache).

    `compressing` is a context manager under which the context is read; `held_bytes(cache)` counts every layer's storages.
    """
    import torch
    from transformers import DynamicCache

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    rows = {"kl": [], "exact": [], "share": []}
    with torch.inference_mode():
        for probe in probes:
            full = DynamicCache(config=config)
            model(input_ids=torch.tensor([probe["context"]]), past_key_values=full, use_cache=True)
            reference = answered(model, probe, full)
            cache = new_cache()
            with compressing():
                model(input_ids=torch.tensor([probe["context"]]), past_key_values=cache, use_cache=True)
            rows["share"].append(held_bytes(cache) / (per_token * len(probe["context"])))
            changed = answered(model, probe, cache)
            rows["kl"].append(float((reference.exp() * (reference - changed)).sum(-1).mean()))
            rows["exact"].append(changed.argmax(-1).tolist() == probe["answer"])
    return rows


def answered(model, probe, cache):
    """Log-probabilities before each answer token, `(answer tokens, vocab_size)` float32, under teacher forcing."""
    import torch

    ids = probe["question"] + probe["answer"]
    out = []
    for i, token in enumerate(ids[:-1]):
        position = torch.tensor([len(probe["context"]) + i])
        logits = model(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            use_cache=True,
            position_ids=position[None],
        ).logits
        out.append(torch.log_softmax(logits[0, -1].float(), -1))
    return torch.stack(out[-len(probe["answer"]) :])


def distinct_bytes(tensors):
    """Bytes of distinct storages: views count once, and as a whole."""
    seen = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
