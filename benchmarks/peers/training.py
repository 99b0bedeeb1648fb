"""Runs that train, the same for every contender: which rows come when, rates, evaluation, and the allocator's peak.

Imported in the peers' environments and in this project's. A contender is a function that takes the request and returns a `Step`. Requests
name `model` (a folder), `init` ("random": the shape alone, by `seed`; "trained"), `tokens` (an .npy file of token ids), `settings` of the contender, and
`steps`, `rows_per_step`, `seq_len`, `rate`, `seed`, `held_windows` (windows at the end of the tokens that nobody trains on).
"""

import gc
import math
import time


class Step:
    """One training step over micro-batches: `model` as it is evaluated, `groups` whose `lr` is set."""

    def __init__(self, model, optimizers, micro_batch=1):
        self.model, self.optimizers, self.micro_batch = model, optimizers, micro_batch

    @property
    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def micro_step(self, ids, share):
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss * share
        loss.backward()
        return float(loss.detach())

    def update(self):
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def factor(done, steps):
    """Of the peak rate: up in the first tenth of the steps, then half a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if done < warmup:
        return (done + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))


def read_tokens(request):
    """(tokens that are trained on, held-back windows `(windows, seq_len)`)."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.load(request["tokens"], allow_pickle=False).astype("int64"))
    held = request["held_windows"] * request["seq_len"]
    return ids[:-held], ids[-held:].view(request["held_windows"], request["seq_len"])


def set_rates(step, base, times):
    """Every group's rate in place; a rate that is a tensor (compiled steps) stays one."""
    for group, rate in zip(step.groups, base):
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(rate * times)
        else:
            group["lr"] = rate * times


def run_step(step, rows):
    """The mean loss of a step's rows, which were trained on."""
    loss = 0.0
    for start in range(0, len(rows), step.micro_batch):
        batch = rows[start : start + step.micro_batch]
        loss += step.micro_step(batch, len(batch) / len(rows))
    step.update()
    return loss


def train(make):
    """Answers a request with each step's loss, and the negative log-likelihood of every held-back window, nats per token."""

    def answer(request):
        import torch

        torch.set_num_threads(request["num_threads"])
        torch.manual_seed(request["seed"])
        step = make(request)
        ids, windows = read_tokens(request)
        base = [float(group["lr"]) for group in step.groups]
        generator = torch.Generator().manual_seed(request["seed"])
        losses, length = [], request["seq_len"]
        started = time.perf_counter()
        for done in range(request["steps"]):
            set_rates(step, base, factor(done, request["steps"]))
            starts = torch.randint(0, len(ids) - length + 1, (request["rows_per_step"],), generator=generator)
            losses.append(run_step(step, torch.stack([ids[i : i + length] for i in starts.tolist()])))
        seconds = time.perf_counter() - started
        step.model.eval()
        with torch.no_grad():
            nll = [window_loss(step.model, rows) for rows in windows.split(1)]
        return {"losses": losses, "windows": nll, "training_seconds": seconds}

    return answer


def window_loss(model, ids):
    """Nats per token of one window `(1, seq_len)`, from whole logits in 32 bits."""
    import torch

    logits = model(input_ids=ids, use_cache=False).logits.float()
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


def measure(make):
    """Answers a request with the most bytes that the allocator had given out at once, by torch's profiler: while the contender was made, and in each
    of two whole steps; and with the bytes of optimizer states."""

    def answer(request):
        import torch

        torch.set_num_threads(request["num_threads"])
        torch.manual_seed(request["seed"])
        length = request["seq_len"]
        gc.collect()
        marks = []
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            marks.append(("making", time.time_ns()))
            step = make(request)
            rows = torch.randint(0, 1000, (request["rows_per_step"], length))
            for number in range(2):
                marks.append((f"step {number}", time.time_ns()))
                run_step(step, rows)
        events = [
            (event.start_ns(), event.nbytes())
            for event in profile.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        peaks, live, held = {}, 0, sorted(events)
        for (name, begin), (_, end) in zip(marks, [*marks[1:], ("end", 2**63)]):
            peaks[name] = live
            while held and held[0][0] < end:
                live += held.pop(0)[1]
                peaks[name] = max(peaks[name], live)
            assert begin < end
        return {"peak_bytes": peaks, "state_bytes": sum(map(state_bytes, step.optimizers))}

    return answer


def state_bytes(optimizer):
    """Of the tensors in an optimizer's state, whatever they are made of, tables that it shares apart."""
    return sum(tensor_bytes(value) for state in optimizer.state.values() for value in state.values())


def tensor_bytes(value):
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
    if names:
        return sum(tensor_bytes(getattr(value, name)) for name in names)
    return getattr(value, "nbytes", 0)
