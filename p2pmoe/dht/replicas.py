"""Who holds what this peer has put, so that it puts it again before the last of them is gone.

A record of which all holders die at once is nowhere until its publisher puts it again: of a swarm
of which a third dies, one key in 250 has lost its five. A lease would be missing until its next
renewal, a manifest for a minute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed

LEAST_LEFT = 2  # holders; with fewer a record is put again; a guess, more would be put too often
MOST = 4096  # records whose holders are remembered, the latest put; a guess


class Replicas:
    """The latest of this peer's records by their keys, and who of those that took them is left."""

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, tuple[Signed[Any], set[PeerId]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Signed[Any], holders: Iterable[PeerId]) -> None:
        """These hold a record now, instead of what was put under its key before."""
        key = record.body.key
        self._records.pop(key, None)
        self._records[key] = record, set(holders)
        if len(self._records) > MOST:
            self._records.popitem(last=False)

    def forget(self, record: Signed[Any]) -> None:
        """What lies under its key need not be put again."""
        self._records.pop(record.body.key, None)

    def lost(self, peer: PeerId) -> list[Signed[Any]]:
        """A peer is gone: what has too few holders left because of that, and is to be put again."""
        few: list[Signed[Any]] = []
        for record, left in self._records.values():
            if peer in left:
                left.remove(peer)
                if len(left) < LEAST_LEFT:
                    few.append(record)
        for record in few:  # said once: it is on its way to others
            self.forget(record)
        return few
