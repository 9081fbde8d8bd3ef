"""Puts answers into one reply until it is full, always cutting in the same place.

The first answer is cut between records and says `more`; a later one that does not fit whole is
left out with all behind it, and the asker asks for those again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from p2pmoe.dht.leases import RecordCopy
from p2pmoe.dht.messages import (
    MAX_CONTACTS,
    MAX_LEFT_MS,
    MAX_RECORDS,
    Copy,
    Found,
    FoundReply,
)
from p2pmoe.dht.records import Held
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind

ANSWER_BYTES = 48 * 1024  # of records and contacts; a control frame has 64 KiB
CARD_BYTES = 24 * 1024  # of contacts that go with verdicts; at most MAX_CONTACTS of them
ENTRY_BYTES = 64  # around one record, contact or answer in CBOR; measured, rounded up

_OF_WHOM = {Kind.LEASE, Kind.SNAPSHOT}  # the publisher is called; of a dictionary by its lease

Card = Callable[[PeerId], bytes | None]  # the sealed record of a peer, if one is known


def copy_of(held: Held | RecordCopy[Any], now: float) -> Copy:
    """A record as it travels: with what is left of its lifetime."""
    left_ms = max(0, int((held.expires_at - now) * 1000))
    return Copy(record=held.signed.raw, left_ms=min(left_ms, MAX_LEFT_MS))


class Cards:
    """Contacts that go along with an answer, each once, as far as there is room."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._places: dict[PeerId, int] = {}
        self._bytes = 0
        self.raw: list[bytes] = []

    def place(self, peer: PeerId) -> int | None:
        """Where a peer's record stands; None when none is known or there is no room."""
        if peer not in self._places:
            raw = self._card(peer)
            if raw is None or self._bytes + len(raw) > CARD_BYTES:
                return None
            self._bytes += len(raw) + ENTRY_BYTES
            self._places[peer] = len(self.raw)
            self.raw.append(raw)
        return self._places[peer]


class Packer:
    """One reply in the making."""

    def __init__(self, card: Card, now: float) -> None:
        self._card, self._now = card, now
        self._answers: list[Found] = []
        self._places: dict[PeerId, int] = {}
        self._contacts: list[bytes] = []
        self._bytes = 0

    def add(self, closer: Sequence[PeerId], records: Sequence[Held], number: int = 0) -> bool:
        """Add an answer; False when the reply is full, and then nothing was added."""
        placed = len(self._contacts), self._bytes
        self._bytes += ENTRY_BYTES
        indices = [place for peer in closer if (place := self._place(peer)) is not None]
        copies: list[Copy] = []
        for held in records[:MAX_RECORDS]:
            before = len(self._contacts), self._bytes
            copy = copy_of(held, self._now)
            if held.signed.kind in _OF_WHOM:
                self._place(held.signed.signer)
            self._bytes += len(copy.record) + ENTRY_BYTES
            if copies and self._full:
                self._take_back(*before)
                break
            copies.append(copy)
        more = len(copies) < len(records)
        if self._answers and (more or self._full):
            self._take_back(*placed)
            return False
        self._answers.append(
            Found(closer=tuple(indices), records=tuple(copies), number=number, more=more)
        )
        return True

    def reply(self) -> FoundReply:
        """What was added."""
        return FoundReply(answers=tuple(self._answers), contacts=tuple(self._contacts))

    @property
    def _full(self) -> bool:
        return self._bytes > ANSWER_BYTES or len(self._contacts) > MAX_CONTACTS

    def _place(self, peer: PeerId) -> int | None:
        """Where a peer's record stands in the reply; it is added once."""
        if peer not in self._places:
            raw = self._card(peer)
            if raw is None:
                return None
            self._places[peer] = len(self._contacts)
            self._contacts.append(raw)
            self._bytes += len(raw) + ENTRY_BYTES
        return self._places[peer]

    def _take_back(self, contacts: int, used: int) -> None:
        del self._contacts[contacts:]
        self._places = {peer: at for peer, at in self._places.items() if at < contacts}
        self._bytes = used
