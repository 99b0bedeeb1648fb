"""Optimizers of the plain training step: torch's own, master weights around them, and AdamW with 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

MUON_EXCLUDED = ("embedding", "head", "position")
"""What Muon leaves to AdamW besides vectors: matrices whose rows are looked up, and the head (Jordan et al. 2024)."""

EIGHT_BIT_BLOCK = 256
EIGHT_BIT_MIN_ELEMENTS = 4096
"""Smaller tensors keep 32-bit states, as in bitsandbytes (`min_8bit_size`)."""

UPDATE_ELEMENTS = 2**20
"""Elements that the 8-bit rule holds in float32 at a time."""


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], matrices: Iterable[nn.Parameter] = ()) -> Stepper:
    """The optimizer `name` over `parameters`; `matrices` are those that Muon may take. One tensor at a time: torch's
    grouped forms hold temporaries of all of them at once."""
    if name == "adamw":
        return Stepper([torch.optim.AdamW(parameters, lr=1e-4, foreach=False)])
    if name == "sgdm":
        return Stepper([torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, foreach=False)])
    if name == "adafactor":
        return Stepper([torch.optim.Adafactor(parameters, lr=1e-3, foreach=False)])
    if name == "adamw8bit":
        return Stepper([AdamW8bit(parameters, lr=1e-4)])
    assert name == "muon"
    taken = {id(parameter) for parameter in matrices}
    inside = [parameter for parameter in parameters if id(parameter) in taken]
    others = [parameter for parameter in parameters if id(parameter) not in taken]
    optimizers: list[Optimizer] = [torch.optim.Muon(inside, lr=1e-3)] if inside else []
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=1e-4, foreach=False))
    return Stepper(optimizers)


class Stepper:
    """Optimizers that step together."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = list(optimizers)

    def step(self) -> None:
        """Update the weights; gradients are dropped."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> list[torch.Tensor]:
        """Everything kept from step to step."""
        kept: list[torch.Tensor] = []
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                kept += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return kept


class MasterWeights(Stepper):
    """Weights and gradients in 16 bits, a float32 copy that the optimizer updates, and its state in float32.

    One tensor at a time: its gradient is widened, its copy updated and rounded back, so that wide gradients never exist
    together. Costs 4 bytes per weight. Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], make: Callable[[nn.Parameter, nn.Parameter], Stepper]):
        super().__init__([])
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.steppers: list[Stepper] = []
        for parameter in parameters:
            master = nn.Parameter(parameter.detach().float())
            self.pairs.append((parameter, master))
            self.steppers.append(make(master, parameter))
            self.optimizers += self.steppers[-1].optimizers

    def step(self) -> None:
        for (parameter, master), stepper in zip(self.pairs, self.steppers, strict=True):
            if parameter.grad is None:
                continue
            master.grad = parameter.grad.float()
            parameter.grad = None
            stepper.step()
            with torch.no_grad():
                parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter, master in self.pairs:
            parameter.grad = master.grad = None

    @property
    def masters(self) -> list[nn.Parameter]:
        return [master for _, master in self.pairs]


class AdamW8bit(Optimizer):
    """AdamW whose moments are kept as 8-bit codes with one float32 scale per block of 256 elements.

    States take `2 n + 8 n / 256` bytes for `n` weights. The first moment is coded linearly with sign, the second by its
    square root, rounded up, so that it is never taken for smaller than it is. The update runs over blocks of 2^20 elements;
    workspace about 24 MiB. Source: block-wise states after Dettmers et al. 2021, arXiv 2110.02861, section 2; differs in
    its linear codes. Error: half a code of the block's largest moment.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            _begin(state, parameter)
        state["step"] += 1
        grad = parameter.grad
        assert grad is not None
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        correction = (1 - beta2 ** state["step"]) ** 0.5
        flat, flat_grad = parameter.view(-1), grad.reshape(-1)
        for start in range(0, flat.numel(), UPDATE_ELEMENTS):
            block = slice(start, min(start + UPDATE_ELEMENTS, flat.numel()))
            g = flat_grad[block].float()
            m, v = _read(state, block)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            _write(state, block, m, v)
            v.sqrt_().div_(correction).add_(group["eps"])
            flat[block].mul_(1 - group["lr"] * group["weight_decay"])
            flat[block].sub_(m.div_(v).mul_(step_size))


def _begin(state: dict[str, Any], parameter: nn.Parameter) -> None:
    state["step"] = 0
    n = parameter.numel()
    if n < EIGHT_BIT_MIN_ELEMENTS:
        state["exp_avg"] = torch.zeros(n, device=parameter.device)
        state["exp_avg_sq"] = torch.zeros(n, device=parameter.device)
        return
    num_blocks = -(-n // EIGHT_BIT_BLOCK)
    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        state[name] = torch.zeros(n, dtype=dtype, device=parameter.device)
        state[f"{name}_scale"] = torch.zeros(num_blocks, device=parameter.device)


def _read(state: dict[str, Any], block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments of a block of elements, in float32."""
    if "exp_avg_scale" not in state:
        return state["exp_avg"][block].clone(), state["exp_avg_sq"][block].clone()
    m = state["exp_avg"][block].float().mul_(_spread(state["exp_avg_scale"], block))
    v = state["exp_avg_sq"][block].float().mul_(_spread(state["exp_avg_sq_scale"], block)).square_()
    return m, v


def _write(state: dict[str, Any], block: slice, m: torch.Tensor, v: torch.Tensor) -> None:
    if "exp_avg_scale" not in state:
        state["exp_avg"][block], state["exp_avg_sq"][block] = m, v
        return
    groups = slice(block.start // EIGHT_BIT_BLOCK, -(-block.stop // EIGHT_BIT_BLOCK))
    for name, values, most in (("exp_avg", m, 127.0), ("exp_avg_sq", v.sqrt(), 255.0)):
        scale = _block_max(values.abs() if name == "exp_avg" else values).div_(most)
        state[f"{name}_scale"][groups] = scale
        codes = values / _spread(state[f"{name}_scale"], block).clamp_min_(torch.finfo(torch.float32).tiny)
        state[name][block] = (codes.round_() if name == "exp_avg" else codes.ceil_()).clamp_(-most, most)


def _block_max(values: torch.Tensor) -> torch.Tensor:
    padding = -values.numel() % EIGHT_BIT_BLOCK
    if padding:
        values = torch.nn.functional.pad(values, (0, padding))
    return values.view(-1, EIGHT_BIT_BLOCK).amax(1)


def _spread(scale: torch.Tensor, block: slice) -> torch.Tensor:
    """Each element's scale."""
    groups = slice(block.start // EIGHT_BIT_BLOCK, -(-block.stop // EIGHT_BIT_BLOCK))
    return scale[groups].repeat_interleave(EIGHT_BIT_BLOCK)[: block.stop - block.start]
