"""Answers given from a cache that was compressed after the context: KL from the full cache, exact match, bytes really held.

Runs in the peers' environments. Every probe is a `context` and `turns`, each a question and its answer, as token ids: the context is read first, then the
cache is what the method made of it; each turn goes on from a copy of that. Question and answer are fed token by token, so that each token is read from
the cache and not beside it.
"""

import copy


def compare(model, probes, new_cache, compressing, held_bytes):
    """Per probe `kl` and `nll` (nats per answer token, over all turns), `exact` and `bytes` held after the context.

    `compressing(num_tokens)` is a context manager under which a context of so many tokens is read; `held_bytes(cache)` counts every layer's storages.
    """
    import torch
    from transformers import DynamicCache

    rows = {"kl": [], "nll": [], "exact": [], "bytes": []}
    with torch.inference_mode():
        for probe in probes:
            full = DynamicCache(config=model.config)
            model(input_ids=torch.tensor([probe["context"]]), past_key_values=full, use_cache=True)
            reference = answered(model, probe, full)
            cache = new_cache()
            with compressing(len(probe["context"])):
                model(input_ids=torch.tensor([probe["context"]]), past_key_values=cache, use_cache=True)
            rows["bytes"].append(held_bytes(cache))
            changed = answered(model, probe, cache)
            right = torch.tensor([token for _, answer in probe["turns"] for token in answer])
            rows["kl"].append(float((reference.exp() * (reference - changed)).sum(-1).mean()))
            rows["nll"].append(-float(changed.gather(1, right[:, None]).mean()))
            rows["exact"].append(bool((changed.argmax(-1) == right).all()))
    return rows


def answered(model, probe, cache):
    """Log-probabilities before each answer token of all turns, `(answer tokens, vocab_size)` float32, under teacher forcing."""
    import torch

    return torch.cat([one_turn(model, probe, turn, copy.deepcopy(cache)) for turn in probe["turns"]])


def one_turn(model, probe, turn, cache):
    """The same of one turn; the cache is changed."""
    import torch

    question, answer = turn
    ids = question + answer
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
    return torch.stack(out[-len(answer) :])


def distinct_bytes(tensors):
    """Bytes of distinct storages: views count once, and as a whole."""
    seen = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
