"""Whom an owner asks to keep a copy, and which copies a keeper has room for. A core.

A keeper has caps on bytes and files, on those of one publisher, and on files of one expert. For a
new file it gives up the older ones of the same expert first, then the oldest of the same publisher,
then the oldest of whoever takes the most room, as long as that is more than the newcomer takes. So
a large publisher does not push out small ones, and equal tables decide equally.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pmoe.identity import PeerId

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomParams:
    """What a keeper has for others."""

    bytes_in_all: int = 8 * GIB  # 320 feed-forward experts of 512 features; a guess
    bytes_a_publisher: int = 2 * GIB  # a guess
    files: int = 4096  # a guess
    files_an_expert: int = 2  # the newest, and one if that is damaged
    uploads: int = 8  # at once; a guess
    uploads_a_publisher: int = 2  # at once; a guess


@dataclass(frozen=True, slots=True)
class Item:
    """A file that somebody wants kept: `key` is its expert's, `rank` says which is newer."""

    key: bytes
    hash: bytes
    publisher: PeerId
    rank: tuple[int, int, int]
    size: int


def make_room(kept: Sequence[Item], new: Item, params: RoomParams) -> list[Item] | str:
    """What goes for a new file, of those kept (the oldest first); or why it is not taken."""
    if new.size > min(params.bytes_a_publisher, params.bytes_in_all):
        return "too_large"
    stay = list(kept)
    of_expert = sorted((each for each in kept if each.key == new.key), key=lambda each: each.rank)
    for older in of_expert[: max(0, len(of_expert) + 1 - params.files_an_expert)]:
        if older.rank >= new.rank:
            return "older"
        stay.remove(older)
    used = Counter({new.publisher: new.size})
    for each in stay:
        used[each.publisher] += each.size
    while used[new.publisher] > params.bytes_a_publisher:
        _give_up(stay, used, new.publisher)
    while used.total() > params.bytes_in_all or len(stay) >= params.files:
        heaviest = max(used, key=lambda peer: (used[peer], peer == new.publisher, peer.raw))
        if heaviest == new.publisher and used[heaviest] <= new.size:
            return "full"
        _give_up(stay, used, heaviest)
    return [each for each in kept if each not in stay]


def _give_up(stay: list[Item], used: Counter[PeerId], publisher: PeerId) -> None:
    oldest = next(each for each in stay if each.publisher == publisher)
    stay.remove(oldest)
    used[publisher] -= oldest.size


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that might keep a copy. `networks` are the /24s and /48s where it says it is."""

    peer: PeerId
    serves: bool  # the same grid: it may take the expert over, and has its file then
    networks: frozenset[str] = frozenset()


def in_turn(candidates: Iterable[Candidate], rng: random.Random) -> list[PeerId]:
    """In which order to ask: who serves the grid first, then by chance, each network once first."""
    mixed = sorted(candidates, key=lambda each: each.peer.raw)
    rng.shuffle(mixed)
    mixed.sort(key=lambda each: not each.serves)
    seen: set[str] = set()
    first: list[PeerId] = []
    later: list[PeerId] = []
    for each in mixed:
        (later if each.networks & seen else first).append(each.peer)
        seen |= each.networks
    return first + later
