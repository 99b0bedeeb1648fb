"""Answers given from a cache that was compressed after the context: KL from the full cache, exact match, bytes really held.

Runs in the peers' environments. Every probe is a `context` and `turns`, each token ids and the places of the answers' tokens among them: the context is read,
the cache is what the method makes of it, and each turn goes on from a copy of that. A context's keys and values, and what a whole cache answers, are the
same for every method: they are found once per process, and a method is handed what its model's attention was called with.
"""

import copy

_contexts = {}


class Context:
    """What reading a probe's context left: a whole cache, the calls of its layers' attention, and the answers from it."""

    def __init__(self, model, probe):
        import torch
        from transformers import DynamicCache

        self.calls = []

        def note(module, args, kwargs, output):
            kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
            self.calls.append((module, args, kwargs, output))

        modules = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
        hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
        self.whole = DynamicCache(config=model.config)
        ids = torch.tensor([probe["context"]])
        model(input_ids=ids, past_key_values=self.whole, use_cache=True, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        self.answers = answered(model, probe, duplicate(self.whole))

    def read_into(self, cache):
        """Let the layers of `cache` take the context's keys and values, and the hooks that a method set see the calls."""
        for layer, of_layer in enumerate(self.whole.layers):
            cache.update(of_layer.keys, of_layer.values, layer)
        for module, args, kwargs, output in self.calls:
            for hook in list(module._forward_hooks.values()):
                hook(module, args, {**kwargs, "past_key_values": cache}, output)


def compare(model, probes, new_cache, compressing, held_bytes, most_bytes=None):
    """Per probe `kl` and `nll` (nats per answer token, over all turns), `exact` and `bytes` held after the context.

    `compressing(num_tokens)` is a context manager under which a context of so many tokens is read; `held_bytes(cache)` counts every layer's storages. A cache
    that holds more than `most_bytes` after a context stands nowhere, and answers no more.
    """
    import torch

    rows = {"kl": [], "nll": [], "exact": [], "bytes": []}
    with torch.inference_mode():
        for i, probe in enumerate(probes):
            if i not in _contexts:
                _contexts[i] = Context(model, probe)
            cache, reference = new_cache(), _contexts[i].answers
            with compressing(len(probe["context"])):
                _contexts[i].read_into(cache)
            rows["bytes"].append(held_bytes(cache))
            if most_bytes is not None and rows["bytes"][-1] > most_bytes:
                break
            changed = answered(model, probe, cache)
            right = torch.tensor([ids[place] for ids, places in probe["turns"] for place in places])
            rows["kl"].append(float((reference.exp() * (reference - changed)).sum(-1).mean()))
            rows["nll"].append(-float(changed.gather(1, right[:, None]).mean()))
            rows["exact"].append(bool((changed.argmax(-1) == right).all()))
    return rows


def answered(model, probe, cache):
    """Log-probabilities before each answer token of all turns, `(answer tokens, vocab_size)` float32, under teacher forcing."""
    import torch

    *others, last = probe["turns"]
    out = [one_turn(model, probe, turn, duplicate(cache)) for turn in others]
    return torch.cat([*out, one_turn(model, probe, last, cache)])


def duplicate(cache):
    """A cache that goes on by itself: layers put new tensors in the place of old ones, and write into none."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def one_turn(model, probe, turn, cache):
    """The same of one turn; the cache is changed. A turn goes in at once, but token by token where it would fill a window from which tokens are packed
    (some would be read as they came), and where layers hold different numbers of tokens (they share one mask)."""
    import torch

    ids, places = turn
    start, fed = len(probe["context"]), torch.tensor(ids[:-1])
    window = getattr(cache.layers[0], "residual_length", None)
    uneven = len({layer.get_seq_length() for layer in cache.layers}) > 1
    step = 1 if uneven or (window is not None and len(fed) >= window) else len(fed)
    out = []
    for piece in torch.arange(len(fed)).split(step):
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
