"""Names of experts: a grid of cells, one cell's uid, and the prefixes that lead to it.

A grid is written `ffn.[0:8].[0:8]`, a uid in it `ffn.3.7`, its prefixes `ffn` and `ffn.3`. A grid
has any number of dimensions from one up, and more cells than there are experts. There is exactly
one spelling of each: no signs, no leading zeros, no spaces.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from p2pmoe.errors import ConfigurationError, printable

MAX_CELLS = 2**16  # cells along one dimension; a coordinate fits 16 bits
MAX_TEXT = 64  # characters of a uid: a text of this length travels in every message
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_COORDINATE = re.compile(r"(0|[1-9][0-9]{0,4})\Z")
_RANGE = re.compile(r"\[0:([1-9][0-9]{0,4})\]\Z")


@dataclass(frozen=True, slots=True, order=True)
class Prefix:
    """A grid's name and the leading coordinates of the uids below it; none for all of them."""

    name: str
    coordinates: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read `ffn` or `ffn.3`; `ConfigurationError` says what is wrong with it."""
        return cls(*_coordinates("prefix", text, example="ffn.3"))

    def __str__(self) -> str:
        return _spell(self.name, self.coordinates)


@dataclass(frozen=True, slots=True, order=True)
class ExpertUid:
    """The name of one cell of a grid, and of the expert that lives there."""

    name: str
    coordinates: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ExpertUid:
        """Read `ffn.3.7`; `ConfigurationError` says what is wrong with it."""
        name, coordinates = _coordinates("uid", text, example="ffn.3.7")
        if not coordinates:
            raise _bad("uid", text, "it names no cell", example="ffn.3.7")
        return cls(name, coordinates)

    def __str__(self) -> str:
        return _spell(self.name, self.coordinates)

    @property
    def prefixes(self) -> tuple[Prefix, ...]:
        """Every proper prefix, the shortest first."""
        return tuple(Prefix(self.name, self.coordinates[:n]) for n in range(len(self.coordinates)))


@dataclass(frozen=True, slots=True)
class Grid:
    """A name and how many cells each dimension has."""

    name: str
    cells: tuple[int, ...]

    def __post_init__(self) -> None:
        text = str(self)
        if not _NAME.match(self.name):
            raise _bad("grid", text, "a name is a-z, 0-9 and _, at most 32, and begins with a-z")
        if not self.cells or not all(0 < count <= MAX_CELLS for count in self.cells):
            raise _bad("grid", text, f"a dimension has 1 to {MAX_CELLS} cells")
        if len(str(ExpertUid(self.name, tuple(count - 1 for count in self.cells)))) > MAX_TEXT:
            raise _bad("grid", text, f"its uids would be longer than {MAX_TEXT} characters")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read `ffn.[0:8].[0:8]`; `ConfigurationError` says what is wrong with it."""
        name, *ranges = text.split(".")
        found = [_RANGE.match(part) for part in ranges]
        for part, match in zip(ranges, found, strict=True):
            if match is None:
                raise _bad("grid", text, f"{printable(part)!r} is no range from 0, such as [0:8]")
        return cls(name, tuple(int(match[1]) for match in found if match))

    def __str__(self) -> str:
        return ".".join([self.name, *(f"[0:{count}]" for count in self.cells)])

    def __contains__(self, uid: ExpertUid) -> bool:
        return (
            uid.name == self.name
            and len(uid.coordinates) == len(self.cells)
            and all(at < count for at, count in zip(uid.coordinates, self.cells, strict=True))
        )

    @property
    def size(self) -> int:
        """Cells in all."""
        return math.prod(self.cells)

    def uids(self) -> Iterator[ExpertUid]:
        """Every cell, the last coordinate running fastest."""
        for coordinates in itertools.product(*map(range, self.cells)):
            yield ExpertUid(self.name, coordinates)


def _spell(name: str, coordinates: tuple[int, ...]) -> str:
    return ".".join([name, *map(str, coordinates)])


def _coordinates(field: str, text: str, *, example: str) -> tuple[str, tuple[int, ...]]:
    name, *parts = text.split(".")
    if len(text) > MAX_TEXT:
        raise _bad(field, text, f"it has more than {MAX_TEXT} characters", example=example)
    if not _NAME.match(name):
        raise _bad(field, text, "a name is a-z, 0-9 and _, at most 32", example=example)
    for part in parts:
        if not _COORDINATE.match(part) or int(part) >= MAX_CELLS:
            raise _bad(field, text, f"{part!r} is no number below {MAX_CELLS}", example=example)
    return name, tuple(map(int, parts))


def _bad(
    field: str, text: str, why: str, *, example: str = "ffn.[0:8].[0:8]"
) -> ConfigurationError:
    return ConfigurationError(f"{field} {printable(text)!r}: {why} (expected as in {example})")
