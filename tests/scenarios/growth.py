"""Whether something grows: a straight line through what was measured, by least squares."""

from __future__ import annotations

from collections.abc import Sequence


def slope(values: Sequence[float]) -> float:
    """By how much the values grow from one to the next."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    above = sum((x - middle) * (y - mean) for x, y in enumerate(values))
    return above / sum((x - middle) ** 2 for x in range(len(values)))


def growth(values: Sequence[float]) -> float:
    """By how much the line through the values rises from the first to the last."""
    return slope(values) * (len(values) - 1)
