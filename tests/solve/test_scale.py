"""The size that the design promises: 1,008 sites, 24 options, 126 time points."""

from __future__ import annotations

import time

import numpy as np
import pytest

from haversack.solve.exact import solve
from haversack.solve.problem import Choice, Group, PeakTerm, Problem, TimePoint

NUM_LAYERS, SITES_PER_LAYER, NUM_CHOICES = 126, 8, 24
TIME_LIMIT_SECONDS = 20.0


def large_problem(num_layers: int = NUM_LAYERS, seed: int = 0, budget: float = 0.3) -> Problem:
    """A model of `num_layers` layers of 8 sites; a time point per layer with that layer's workspaces as a peak term.

    Choices: 2 to 8 bits with several overheads, damage falling by about 4 per bit with noise, resident or streamed
    through a window of two layers. `budget` is a share of the 16-bit bytes.
    """
    draw = np.random.default_rng(seed)
    groups, total = [], 0
    for layer in range(num_layers):
        for site in range(SITES_PER_LAYER):
            numbers = int(draw.integers(1 << 20, 1 << 26))
            weight = float(draw.lognormal(-6, 1.5))
            total += 2 * numbers
            choices = []
            for option in range(NUM_CHOICES):
                streamed = option % 4 == 3
                bits = float(draw.choice([2, 3, 4, 8])) + float(draw.choice([0.125, 0.25, 0.5]))
                num_bytes = int(numbers * bits / 8)
                workspace = int(draw.integers(0, 1 << 20))
                home = f"layer.{layer}" if streamed else "weights"
                choices.append(
                    Choice(
                        f"o{option}",
                        damage=weight * 4.0**-bits * float(draw.uniform(0.6, 1.4)),
                        seconds=num_bytes / (2e9 if streamed else 2e10),
                        account_bytes={home: num_bytes, f"workspace.{layer}.{site}": workspace},
                    )
                )
            groups.append(Group(f"{layer}.{site}", tuple(choices), kind=str(site)))
    window = PeakTerm(tuple(f"layer.{layer}" for layer in range(num_layers)), 2)
    points = tuple(
        TimePoint(
            f"decode.{layer}",
            "device",
            ("weights",),
            (window, PeakTerm(tuple(f"workspace.{layer}.{site}" for site in range(SITES_PER_LAYER)))),
            fixed_bytes=int(draw.integers(0, 1 << 24)),
        )
        for layer in range(num_layers)
    )
    capacity = int(total * budget)
    return Problem(tuple(groups), points, {"device": capacity}, max_seconds=1.5 * capacity / 2e10)


@pytest.mark.slow
def test_a_large_model_in_seconds() -> None:
    problem = large_problem()
    start = time.process_time()
    solution = solve(problem, time_limit_seconds=TIME_LIMIT_SECONDS)
    seconds = time.process_time() - start
    print(f"{seconds:.1f} s of CPU time, gap {solution.gap:.2e}")
    assert solution.fits and solution.evaluation.feasible
    assert solution.gap <= 1e-2  # greedy alone reaches 5e-3; a busy machine may leave no wall time for more
    assert seconds < 30


if __name__ == "__main__":
    test_a_large_model_in_seconds()
