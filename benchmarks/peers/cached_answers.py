"""Answers given from a cache that was compressed after the context: KL from the full cache, exact match, bytes really held.

Runs in the peers' environments. Every probe is a `context` and `turns`, each token ids and the places of the answers' tokens among them: the context is read
first, then the cache is what the method made of it; each turn goes on from a copy of that. What a whole cache answers is found once per process.
"""

import copy

_references = {}


def compare(model, probes, new_cache, compressing, held_bytes, most_bytes=None, by_token=True):
    """Per probe `kl` and `nll` (nats per answer token, over all turns), `exact` and `bytes` held after the context.

    `compressing(num_tokens)` is a context manager under which a context of so many tokens is read; `held_bytes(cache)` counts every layer's storages. With
    `by_token` a turn is fed token by token, for caches that change as tokens come. A cache that holds more than `most_bytes` after a context stands nowhere, and
    answers no more.
    """
    import torch
    from transformers import DynamicCache

    rows = {"kl": [], "nll": [], "exact": [], "bytes": []}
    with torch.inference_mode():
        for i, probe in enumerate(probes):
            if (i, by_token) not in _references:
                full = DynamicCache(config=model.config)
                read(model, probe, full)
                _references[i, by_token] = answered(model, probe, full, by_token)
            reference = _references[i, by_token]
            cache = new_cache()
            with compressing(len(probe["context"])):
                read(model, probe, cache)
            rows["bytes"].append(held_bytes(cache))
            if most_bytes is not None and rows["bytes"][-1] > most_bytes:
                break
            changed = answered(model, probe, cache, by_token)
            right = torch.tensor([ids[place] for ids, places in probe["turns"] for place in places])
            rows["kl"].append(float((reference.exp() * (reference - changed)).sum(-1).mean()))
            rows["nll"].append(-float(changed.gather(1, right[:, None]).mean()))
            rows["exact"].append(bool((changed.argmax(-1) == right).all()))
    return rows


def read(model, probe, cache):
    import torch

    model(input_ids=torch.tensor([probe["context"]]), past_key_values=cache, use_cache=True, logits_to_keep=1)


def answered(model, probe, cache, by_token):
    """Log-probabilities before each answer token of all turns, `(answer tokens, vocab_size)` float32, under teacher forcing."""
    import torch

    *others, last = probe["turns"]
    out = [one_turn(model, probe, turn, copy.deepcopy(cache), by_token) for turn in others]
    return torch.cat([*out, one_turn(model, probe, last, cache, by_token)])


def one_turn(model, probe, turn, cache, by_token):
    """The same of one turn; the cache is changed."""
    import torch

    ids, places = turn
    start, fed = len(probe["context"]), torch.tensor(ids[:-1])
    out = []
    for piece in torch.arange(len(fed)).split(1 if by_token else len(fed)):
        logits = model(
            input_ids=fed[piece][None], past_key_values=cache, use_cache=True, position_ids=(start + piece)[None]
        ).logits[0]
        out.append(logits)
    return torch.log_softmax(torch.cat(out)[[place - 1 for place in places]].float(), -1)


def distinct_bytes(tensors):
    """Bytes of distinct storages: views count once, and as a whole."""
    seen = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
