"""Updates traced at short lengths and continued, against updates traced whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from haversack.engine.optimizers import MasterWeights, Stepper, make_optimizer
from haversack.engine.update_trace import SHORT_SHAPES, TrainedTensor, run_update, trace_updates
from haversack.kernels import pieces
from haversack.parts.optimizer.base import PIECE_ELEMENTS
from haversack.recipes.base import optimizer_option


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgdm", "sgd-sai", "adafactor", "galore"])
@pytest.mark.parametrize("shape", [(1280, 1024), (1_310_723,)])
def test_a_wide_tensor_is_continued_from_short_ones(name: str, shape: tuple[int, ...]) -> None:
    tensor = TrainedTensor(shape, "BF16", len(shape) == 2)
    assert torch.Size(shape).numel() > torch.Size(SHORT_SHAPES[1]).numel()

    def make(parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> Stepper:
        return make_optimizer(name, parameters, matrices)

    continued = trace_updates(make, optimizer_option(name), [tensor])
    assert continued == pytest.approx(run_update(make, tensor).rise_bytes, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgdm"])
def test_what_is_made_of_a_whole_tensor_decides_where_it_is_wide(name: str) -> None:
    """A gradient widened whole outgrows what a piece takes, which is higher at short lengths."""
    tensor = TrainedTensor((12_000, 1024), "BF16", True)

    def make(parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> Stepper:
        return MasterWeights(parameters, lambda masters: make_optimizer(name, masters))

    continued = trace_updates(make, optimizer_option(name), [tensor])
    assert continued == pytest.approx(run_update(make, tensor).rise_bytes, rel=1e-4)


def test_gradients_that_are_dropped_make_room_for_later_tensors() -> None:
    def make(parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> Stepper:
        return MasterWeights(parameters, lambda masters: make_optimizer("adamw", masters))

    small, large = TrainedTensor((64, 64), "BF16", False), TrainedTensor((96, 64), "BF16", False)
    rise = run_update(make, large).rise_bytes
    assert run_update(make, small).change_bytes == -2 * 64 * 64
    option = optimizer_option("adamw")
    assert trace_updates(make, option, [large, small]) == rise
    assert trace_updates(make, option, [small, large]) == rise - 2 * 64 * 64


@pytest.mark.parametrize("name", ["galore8bit", "q-galore", "adamw4bit"])
def test_pieces_in_the_middle_hold_what_the_second_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = TrainedTensor((1300, 1024), "BF16", True)

    def make(parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> Stepper:
        return make_optimizer(name, parameters, matrices)

    assert len(pieces.piece_starts(1300 * 1024, PIECE_ELEMENTS, torch.empty(0, device="meta"))) == 3
    shown = run_update(make, tensor)
    monkeypatch.setattr(pieces, "SHOWN_PIECES", 10**9)
    assert shown == run_update(make, tensor)


def test_tensors_with_values_are_walked_whole() -> None:
    assert list(pieces.piece_starts(10, 2, torch.empty(0), first=1)) == [1, 3, 5, 7, 9]
    assert list(pieces.piece_starts(10, 2, torch.empty(0, device="meta"), first=1)) == [1, 3, 9]
