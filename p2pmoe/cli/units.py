"""Values with units: `30s`, `2GiB`, `20Mbit/s`. Pure, but for click's parameter types.

A unit is required, but for a plain number of seconds in a duration; its spelling is exact, since
`m` and `M`, or `B` and `b`, are not the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import click

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BITS_PER_SECOND = {"bit/s": 1, "kbit/s": 10**3, "Mbit/s": 10**6, "Gbit/s": 10**9}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z/]*)\Z")


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """A number with a unit. `bare` is what a number without a unit is multiplied by, if allowed."""

    def __init__(
        self, name: str, units: Mapping[str, float], bare: float | None, example: str
    ) -> None:
        self.name, self.units, self.bare, self.example = name, units, bare, example

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The quantity in its base unit; a number that is not text passes as it is."""
        if isinstance(value, int | float):
            return value
        text = str(value).strip()
        match = _QUANTITY.match(text)
        factor = None
        if match:
            factor = self.units.get(match[2]) if match[2] else self.bare
        if match is None or factor is None:
            units = ", ".join(self.units)
            why = f"{text!r} is no {self.name}, such as {self.example} (units: {units})"
            self.fail(why, param, ctx)
        return float(match[1]) * factor


class WholeQuantity(Quantity):
    """A quantity that comes in whole base units."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The quantity, rounded."""
        return round(super().convert(value, param, ctx))


DURATION = Quantity("duration", SECONDS, 1.0, "30s or 5m")  # seconds
SIZE = WholeQuantity("size", BYTES, None, "512MiB or 2GiB")  # bytes
RATE = WholeQuantity("rate", BITS_PER_SECOND, None, "20Mbit/s")  # bits a second


def seconds_text(seconds: float) -> str:
    """A duration for people: `250ms`, `42s`, `3m20s`, `5h12m`, `2d3h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    whole = round(seconds)
    steps = [("d", 86400), ("h", 3600), ("m", 60), ("s", 1)]
    for (unit, length), (next_unit, next_length) in pairwise(steps):
        if whole >= length:
            rest = whole % length // next_length
            return f"{whole // length}{unit}" + (f"{rest}{next_unit}" if rest else "")
    return f"{whole}s"
