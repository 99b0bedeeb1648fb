"""The largest whole number that still fits, where more never takes less."""

from __future__ import annotations

from collections.abc import Callable


def largest_that(fits: Callable[[int], bool], least: int, most: int, step: int = 1) -> int | None:
    """Quadrupling, then halving the interval, in steps of `step`, to one part in 64; None where not even `least` fits."""
    if not fits(least):
        return None
    low = least
    while low < most and fits(min(most, low * 4)):
        low = min(most, low * 4)
    if low >= most:
        return most // step * step
    high = min(most, low * 4)
    while high - low > max(step, low // 64):
        middle = (low + high) // 2 // step * step
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
