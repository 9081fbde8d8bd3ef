"""The room of a holder: records by key and place, counted in bytes, and what goes when it is full.

Rules: what is valid is never put out for another's sake. What has ended goes first, in the order in
which it ended (then by key and place), so that equal histories leave equal shelves. A publisher and
a network of the internet have a cap, and the fuller the shelves are the less each newcomer may
take: an eighth of what all others leave for a publisher, half for a network. So a flood fills them
with ever smaller shares and never keeps a newcomer with a little out. What takes no more room
than what it replaces is always taken. Changes are noted for whoever writes them to disk.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from p2pmoe.dht.routing import Networks
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed

OVERHEAD_BYTES = 900  # that one entry takes besides its envelope: 10,000 leases take 11.5 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomParams:
    """Bytes, and the parts of what others leave that one may take."""

    per_publisher: int = 2 << 20  # about 1,800 leases, for a server of 1,024 experts
    per_network: int = 4 << 20  # a guess
    in_all: int = 16 << 20  # about eleven thousand records; a guess
    publisher_part: int = 8  # one eighth; dynamic thresholds of Choudhury and Hahne, a guess
    network_part: int = 2  # one half; a guess


@dataclass(frozen=True, slots=True)
class Held:
    """A record as this peer has it. Seconds on its clock."""

    signed: Signed[Any]
    expires_at: float
    forget_at: float
    granted_at: float = -math.inf  # of a lease: when its uid was vacant, and granted here
    networks: Networks = frozenset()  # of its publisher

    @property
    def charge(self) -> int:
        """Bytes that it takes."""
        return len(self.signed.raw) + OVERHEAD_BYTES


Place = tuple[bytes, bytes]  # key, and the publisher or digest below it


class Shelves:
    """Records by key, each with how much it takes and when it ends."""

    def __init__(self, params: RoomParams) -> None:
        self._params = params
        self._keys: dict[bytes, dict[bytes, Held]] = {}
        self._publishers: dict[PeerId, dict[Place, Held]] = {}
        self._used: Counter[PeerId | str] = Counter()  # by publisher and by network
        self._ending: list[tuple[float, Place]] = []  # a heap; what was replaced stays until then
        self._ended: dict[Place, Held] = {}  # first ended first
        self._ended_bytes = 0
        self._entries = 0
        self.bytes = 0
        self.changes: dict[Place, None] | None = None  # since they were last taken; None: not noted

    def __len__(self) -> int:
        return self._entries

    def __iter__(self) -> Iterator[tuple[Place, Held]]:
        return (
            ((key, sub), held)
            for key, entries in self._keys.items()
            for sub, held in entries.items()
        )

    def at(self, key: bytes) -> Mapping[bytes, Held]:
        """All entries under a key, in the order in which they came."""
        return self._keys.get(key, {})

    def get(self, place: Place) -> Held | None:
        """What is at one place."""
        return self._keys.get(place[0], {}).get(place[1])

    def of(self, publisher: PeerId) -> Mapping[Place, Held]:
        """All entries of one publisher."""
        return self._publishers.get(publisher, {})

    def put(self, place: Place, held: Held, now: float, instead: Place | None = None) -> str:
        """Put an entry in its place, or say for whom there is no room: "" when it was put.

        It replaces what is there, or else `instead`, which lies under the same key.
        """
        self.expire(now)
        taken = place if instead is None or self.get(place) is not None else instead
        old = self.get(taken)
        if why := self._no_room_for(held, old, ended=taken in self._ended):
            return why
        if old is not None:
            self._take_out(taken, old)
        while self.bytes + held.charge > self._params.in_all:
            self.remove(next(iter(self._ended)))
        self._put_in(place, held)
        return ""

    def remove(self, place: Place) -> None:
        """Take an entry out."""
        self._take_out(place, self._keys[place[0]][place[1]])
        if not self._keys[place[0]]:
            del self._keys[place[0]]

    def expire(self, now: float) -> None:
        """Note what has ended, and forget what ended long enough ago."""
        while self._ending and self._ending[0][0] <= now:
            _, place = heapq.heappop(self._ending)
            held = self.get(place)
            if held is not None and held.expires_at <= now and place not in self._ended:
                self._ended[place] = held
                self._ended_bytes += held.charge
                if held.forget_at <= now:
                    self.remove(place)
        while self._ended and next(iter(self._ended.values())).forget_at <= now:
            self.remove(next(iter(self._ended)))

    # ------------------------------------------------------------------------------------- room
    def _no_room_for(self, held: Held, old: Held | None, *, ended: bool) -> str:
        """Ended entries give way, so they count for nobody but their publisher."""
        params, publisher = self._params, held.signed.signer
        replaced = 0 if old is None else old.charge
        its_own = replaced if old is not None and old.signed.signer == publisher else 0
        if held.charge <= its_own:
            return ""
        free = params.in_all - (self.bytes - self._ended_bytes) + (0 if ended else replaced)
        if held.charge > free:
            return "holder"
        used = self._used[publisher] - its_own
        if used + held.charge > min(params.per_publisher, (free + used) // params.publisher_part):
            return "publisher"
        for network in held.networks:
            used = self._used[network] - (its_own if old and network in old.networks else 0)
            if used + held.charge > min(params.per_network, (free + used) // params.network_part):
                return "network"
        return ""

    def _put_in(self, place: Place, held: Held) -> None:
        self._keys.setdefault(place[0], {})[place[1]] = held
        self._entries += 1
        self._publishers.setdefault(held.signed.signer, {})[place] = held
        self._count(held, held.charge)
        heapq.heappush(self._ending, (held.expires_at, place))
        if len(self._ending) > 4 * len(self) + 64:  # most of it was replaced since
            self._ending = [(each.expires_at, at) for at, each in self if at not in self._ended]
            heapq.heapify(self._ending)
        self._note(place)

    def _take_out(self, place: Place, held: Held) -> None:
        """Its key stays, even if it is empty now."""
        del self._keys[place[0]][place[1]]
        self._entries -= 1
        own = self._publishers[held.signed.signer]
        del own[place]
        if not own:
            del self._publishers[held.signed.signer]
        self._count(held, -held.charge)
        if self._ended.pop(place, None) is not None:
            self._ended_bytes -= held.charge
        self._note(place)

    def _count(self, held: Held, charge: int) -> None:
        self.bytes += charge
        owners: tuple[PeerId | str, ...] = (held.signed.signer, *held.networks)
        for who in owners:
            self._used[who] += charge
            if not self._used[who]:
                del self._used[who]

    def _note(self, place: Place) -> None:
        if self.changes is not None:
            self.changes[place] = None
