"""Which limits have a test at their edge: so many are allowed, one more is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

TESTED: set[str] = set()
NEARLY = 0.001  # seconds before and after a deadline
Test = TypeVar("Test", bound=Callable[..., object])


def edge(*limits: str) -> Callable[[Test], Test]:
    """Marks a test as the one at the edge of these limits."""

    def mark(test: Test) -> Test:
        TESTED.update(limits)
        return test

    return mark
