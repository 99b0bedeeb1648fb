"""ShiftAddLLM: sums of sign matrices, their errors fed back by the outputs they spoil."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.sign_planes import SignPlanes
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(WeightOption(SignPlanes(bits, 128, bases=True), HessianFeedback()) for bits in (2, 3, 4))


RECIPE = Recipe(
    id="shiftaddllm",
    resident="weights",
    title="sums of sign matrices chosen with second-order feedback, products by table lookup",
    source=Source(
        "You, Guo, Fu, Zhou, Shi, Zhang, Kundu, Yazdanbakhsh, Lin",
        2024,
        "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization",
        "2406.05981",
    ),
    options=options,
    candidates=False,
)
