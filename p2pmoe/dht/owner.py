"""The owner's side: claims leases, renews them, and announces what this peer serves.

A claim is put at the r peers closest to its key; granted by a quorum it is held, and is renewed
from then on. What a minority granted is withdrawn. Of claimants that split the votes the one that
comes first (`claim_rank`) tries again and the others give way. Dictionaries of all that is
held are announced with every round of renewals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import trio

from p2pmoe import telemetry
from p2pmoe.dht.asks import Asks
from p2pmoe.dht.claims import Again, Claim, Lost, TooFew
from p2pmoe.dht.leases import (
    Granted,
    LeaseBook,
    LeaseName,
    LeaseParams,
    LeaseRefused,
    LeaseView,
    Vote,
    tally,
)
from p2pmoe.dht.messages import Lease, PrefixRecord, key_of
from p2pmoe.dht.reading import never
from p2pmoe.dht.search import Place, Searches
from p2pmoe.errors import LocalProtocolError, P2PMoEError, QuorumNotReached
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed

TOGETHER = 0.05  # seconds: cells that are claimed together are announced together; a guess

Seal = Callable[[Any, Kind], Signed[Any]]
PutHere = Callable[[Signed[Any]], Any]


@dataclass(frozen=True, slots=True)
class OwnerParts:
    """What the owner's side works with. `version` gives the next (epoch, incarnation)."""

    place: Place
    asks: Asks
    searches: Searches
    put_here: PutHere
    seal: Seal
    version: Callable[[], tuple[int, int]]


class Owner:
    """Holds leases for this peer. `run` must be running for them to stay valid."""

    def __init__(self, parts: OwnerParts, params: LeaseParams, rng: random.Random) -> None:
        self._parts, self._params, self._rng = parts, params, rng
        self.book = LeaseBook(params)
        self._claiming: dict[LeaseName, trio.Event] = {}
        self._announced: set[LeaseName] = set()
        self._announce_at = math.inf
        self._changed = trio.Event()

    # ---------------------------------------------------------------------------------- claiming
    async def claim(self, name: LeaseName) -> LeaseView:
        """Take a lease, or return the one that is held. Raises as `DhtService.claim`."""
        if self._parts.place.holder is None:
            raise LocalProtocolError("a peer that cannot be dialled cannot serve experts")
        # One at a time: the withdrawal of a defeat must not follow the lease of a victory.
        while name in self._claiming:
            await self._claiming[name].wait()
        self._claiming[name] = ended = trio.Event()
        try:
            if self.book.number(name, trio.current_time()) is None:
                await self._win(name)
        finally:
            del self._claiming[name]
            ended.set()
        return self.book.view(name, self._parts.place.own)

    async def _win(self, name: LeaseName) -> None:
        claim = Claim(self._parts.place.own)
        while True:
            again = await self._round(name, claim)
            if again is None:
                return
            await trio.sleep(self._rng.uniform(again.least, again.most))

    async def _round(self, name: LeaseName, claim: Claim) -> Again | None:
        """Look who has it, ask for it, count, and clean up after a defeat.

        None when it is granted. Raises when there is nothing to try again for.
        """
        found = await self._parts.searches.read(Kind.LEASE, key_of(Kind.LEASE, *name), never)
        asked, asked_at = len(found.holders), trio.current_time()
        look = claim.look(found.copies(), found.number(), asked, asked_at)
        if isinstance(look, Lost):
            raise LeaseRefused(owner=look.owner, expert=name[1])
        lease = self._lease(name, look.number, self._params.ttl)
        votes = await self.write(found.holders, lease)
        outcome = claim.count(lease, list(votes.values()), asked)
        if isinstance(outcome, Granted):
            self.book.granted(name, look.number, asked_at)
            self._announce_soon()
            telemetry.emit("dht.lease.granted", uid=name[1], number=look.number)
            return None
        await self.write(found.holders, self._lease(name, look.number, 0))
        match outcome:
            case Lost():
                raise LeaseRefused(owner=outcome.owner, expert=name[1])
            case TooFew():
                _no_quorum(name[1], outcome, asked)
        return outcome

    # ------------------------------------------------------------------------------ giving back
    async def withdraw(self, uids: Iterable[str]) -> None:
        """Give leases back and announce what is left; the caller sets a deadline."""
        wanted = set(uids)
        names = [name for name in self.book.names() if name[1] in wanted]
        async with trio.open_nursery() as writes:
            for name in names:
                number = self.book.view(name, self._parts.place.own).number
                self.book.drop(name)
                writes.start_soon(self.publish, self._lease(name, number, 0))
        if names:
            await self._announce()

    # ---------------------------------------------------------------------------------- renewing
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew what is due and announce it, until cancelled."""
        task_status.started()
        async with trio.open_nursery() as rounds:
            while True:
                with trio.move_on_at(min(self.book.next_deadline(), self._announce_at)):
                    await self._changed.wait()
                self._changed = trio.Event()
                now = trio.current_time()
                for name in self.book.lapsed(now):
                    self._lost(name, "not renewed in time")
                for name in self.book.due(now):
                    rounds.start_soon(self._renew, name)
                if now >= self._announce_at:
                    self._announce_at = math.inf
                    rounds.start_soon(self._announce)

    async def _renew(self, name: LeaseName) -> None:
        try:
            found = await self._parts.searches.find(key_of(Kind.LEASE, *name))
        except P2PMoEError as error:
            telemetry.emit("dht.renewal.failed", uid=name[1], error=error)
            self._missed(name)
            return
        asked_at = trio.current_time()
        number = self.book.number(name, asked_at)
        if number is None:  # withdrawn meanwhile: a renewal must not follow that
            return
        lease = self._lease(name, number, self._params.ttl)
        votes = await self.write(found.holders, lease)
        outcome = tally(lease, list(votes.values()), len(found.holders), renewal=True)
        if self.book.number(name, trio.current_time()) != number:  # withdrawn, or too late
            return
        if isinstance(outcome, Granted):
            self.book.granted(name, number, asked_at)
        elif outcome.owner is not None:
            self.book.drop(name)
            self._lost(name, f"peer {outcome.owner} has it")
        else:
            self._missed(name)

    def _missed(self, name: LeaseName) -> None:
        self.book.missed(name, trio.current_time())
        self._changed.set()

    def _lost(self, name: LeaseName, why: str) -> None:
        telemetry.emit("dht.lease.lost", level="info", uid=name[1], why=why)
        telemetry.count("p2pmoe_dht_leases_lost_total")
        self._announce_soon()

    # -------------------------------------------------------------------------------- announcing
    def _announce_soon(self) -> None:
        self._announce_at = min(self._announce_at, trio.current_time() + TOGETHER)
        self._changed.set()

    async def _announce(self) -> None:
        """Every dictionary of what is held, and an end to those that are empty now."""
        wanted = self.book.coordinates()
        empty = self._announced - wanted.keys()
        self._announced = set(wanted)
        again = trio.current_time() + self._params.renew_every
        self._announce_at = again if wanted else math.inf
        self._changed.set()
        async with trio.open_nursery() as writes:
            for name, coordinates in wanted.items():
                record = self._prefix(name, coordinates, self._params.prefix_ttl)
                writes.start_soon(self.publish, record)
            for name in empty:
                writes.start_soon(self.publish, self._prefix(name, (), 0))

    # ----------------------------------------------------------------------------------- writing
    async def publish(self, record: Signed[Any]) -> None:
        """Put a record at whoever is closest now; who cannot be reached is not waited for."""
        try:
            found = await self._parts.searches.find(record.body.key)
            await self.write(found.holders, record)
        except P2PMoEError as error:
            telemetry.emit("dht.publish.failed", kind=record.kind, error=error)

    async def write(self, holders: Sequence[PeerId], record: Signed[Any]) -> dict[PeerId, Vote]:
        """What each holder that answers makes of a record."""
        votes: dict[PeerId, Vote] = {}
        async with trio.open_nursery() as writes:
            for holder in holders:
                writes.start_soon(self._write_at, holder, record, votes)
        return votes

    async def _write_at(
        self, holder: PeerId, record: Signed[Any], votes: dict[PeerId, Vote]
    ) -> None:
        here = holder == self._parts.place.own
        put = self._parts.put_here if here else partial(self._parts.asks.put, holder)
        try:
            votes[holder] = await put(record)
        except P2PMoEError:  # marked and told about where it was asked; it has no vote
            return

    def _lease(self, name: LeaseName, number: int, ttl: float) -> Signed[Lease]:
        epoch, incarnation = self._parts.version()
        body = Lease(
            grid=name[0],
            uid=name[1],
            number=number,
            epoch=epoch,
            incarnation=incarnation,
            ttl_ms=int(ttl * 1000),
        )
        return self._parts.seal(body, Kind.LEASE)

    def _prefix(
        self, name: LeaseName, coordinates: tuple[int, ...], ttl: float
    ) -> Signed[PrefixRecord]:
        epoch, incarnation = self._parts.version()
        body = PrefixRecord(
            grid=name[0],
            prefix=name[1],
            coordinates=coordinates,
            epoch=epoch,
            incarnation=incarnation,
            ttl_ms=int(ttl * 1000),
        )
        return self._parts.seal(body, Kind.PREFIX)


def _no_quorum(uid: str, outcome: TooFew, asked: int) -> NoReturn:
    said = f" ({', '.join(outcome.reasons)})" if outcome.reasons else ""
    raise QuorumNotReached(
        f"{uid}: {outcome.granted} of {asked} holders granted the lease,"
        f" {outcome.needed} are needed{said}",
        answered=outcome.granted,
        needed=outcome.needed,
    )
