"""Which free cells a server claims. A core, in the shape of a search.

Servers that start at once must not all ask for the same cell: each ranks the cells by
SHA-256(uid, own id), an order of its own, and claims the best that it does not know to be taken.
Cells that it is told to prefer come before all others: those that it served before, then those that
anybody did. A refusal names the cell's owner and is final until that cell is heard to be free
again; a claim that no quorum answered is tried again after a pause, longer each time and with
jitter.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from p2pmoe.experts.uid import ExpertUid, Grid

OWN, ORPHAN, LAST = 0, 1, 2  # levels: served here before, by anybody before, by nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementParams:
    """How a server goes about it. Times in seconds."""

    parallel: int = 8  # claims in flight; a guess
    pause: float = 0.5  # before the second attempt without a quorum; a guess
    longest_pause: float = 10.0  # one renewal of a lease
    considered: int = 2**14  # cells ranked, some 50 ms; of a larger grid a random choice. A guess


class Placement:
    """Claims `count` cells of a grid for the peer whose id is `me`, or exactly those of `only`."""

    def __init__(
        self,
        grid: Grid,
        me: bytes,
        count: int,
        *,
        rng: random.Random,
        params: PlacementParams = PlacementParams(),
        only: Iterable[ExpertUid] = (),
    ) -> None:
        self._me, self._rng, self._params = me, rng, params
        named = tuple(only)
        cells = named or _some_cells(grid, params.considered, rng)
        self._grid, self._named = grid, bool(named)
        self._ranked = sorted(cells, key=self._rank)
        self._levels: dict[ExpertUid, int] = {}  # of what is preferred; lower comes first
        self._count = len(named) or count
        self._held: set[ExpertUid] = set()
        self._taken: set[ExpertUid] = set()
        self._asked: set[ExpertUid] = set()
        self._promised: set[ExpertUid] = set()  # handed over, and not asked for yet
        self._attempts = 0  # failures since the last verdict
        self._pause_until = -math.inf

    @property
    def held(self) -> tuple[ExpertUid, ...]:
        """The cells granted so far, in order."""
        return tuple(sorted(self._held))

    @property
    def done(self) -> bool:
        """Whether enough cells are held, or none is free; a loss or a vacancy undoes it."""
        return not self._asked and (len(self._held) >= self._count or not self._free())

    @property
    def missing(self) -> int:
        """How many more cells are wanted, those asked for at present included."""
        return max(0, self._count - len(self._held))

    @property
    def free(self) -> list[ExpertUid]:
        """The cells that are not known to be taken, in the order in which they would be claimed."""
        return self._free()

    def wanted(self, now: float) -> list[ExpertUid]:
        """The cells to claim now. Each must end in `told`, `refused`, `failed` or `given_up`."""
        if now < self._pause_until:
            return []
        missing = self._count - len(self._held) - len(self._asked)
        room = min(missing, self._params.parallel - len(self._asked))
        chosen = self._free()[: max(0, room)]
        self._asked.update(chosen)
        self._promised.difference_update(chosen)
        return chosen

    def told(self, granted: ExpertUid) -> None:
        """A cell is ours."""
        self._asked.discard(granted)
        self._taken.discard(granted)
        self._held.add(granted)
        self._attempts = 0

    def refused(self, uid: ExpertUid) -> None:
        """Somebody else holds a cell."""
        self._asked.discard(uid)
        self._taken.add(uid)
        self._attempts = 0

    def failed(self, uid: ExpertUid, now: float) -> None:
        """Too few answered a claim: pause, then try again."""
        self._asked.discard(uid)
        if now < self._pause_until:
            return
        longest = min(self._params.pause * 2**self._attempts, self._params.longest_pause)
        self._attempts = min(self._attempts + 1, 32)
        self._pause_until = now + self._rng.uniform(longest / 2, longest)

    def given_up(self, uid: ExpertUid) -> None:
        """A claim ended without a verdict."""
        self._asked.discard(uid)

    def lost(self, uid: ExpertUid) -> None:
        """A cell that was ours is not any more: it is claimed again, or another in its place."""
        self._held.discard(uid)

    def seen(self, taken: Iterable[ExpertUid]) -> None:
        """What others hold at present, as a reading of the grid says; all else may be free."""
        self._taken = set(taken) - self._held
        self._promised -= self._taken

    def prefer(self, uids: Iterable[ExpertUid], level: int) -> None:
        """Claim these first, as far as they are cells that may be claimed: level 0 before 1."""
        known = set(self._ranked)
        for uid in uids:
            if uid not in known:
                if self._named or uid not in self._grid:
                    continue
                insort(self._ranked, uid, key=self._rank)
            self._levels[uid] = min(level, self._levels.get(uid, level))

    def take(self, uid: ExpertUid) -> bool:
        """Whether a cell that its owner hands over is wanted; then it is claimed first."""
        mine = self._held | self._asked | self._promised
        if uid in mine or len(mine) >= self._count:
            return False
        self.prefer([uid], OWN)
        if uid not in self._ranked:
            return False
        self._taken.discard(uid)
        self._promised.add(uid)
        return True

    def next_deadline(self) -> float:
        """When `wanted` is worth asking again, if nothing else happens before."""
        return math.inf if self.done else self._pause_until

    def _free(self) -> list[ExpertUid]:
        unfree = self._taken | self._asked | self._held
        free = [uid for uid in self._ranked if uid not in unfree]
        if self._levels:
            free.sort(key=lambda uid: self._levels.get(uid, LAST))
        return free

    def _rank(self, uid: ExpertUid) -> bytes:
        return hashlib.sha256(str(uid).encode() + self._me).digest()


def _some_cells(grid: Grid, most: int, rng: random.Random) -> list[ExpertUid]:
    """Every cell of a grid, or `most` random ones of a larger grid."""
    if grid.size <= most:
        return list(grid.uids())
    cells = {tuple(rng.randrange(count) for count in grid.cells) for _ in range(most)}
    return [ExpertUid(grid.name, coordinates) for coordinates in sorted(cells)]
