"""The owner's side: claims leases, renews them, and announces what this peer serves.

A claim is put at the r peers closest to its key; granted by a quorum it is held, and is renewed
from then on. What a minority granted is withdrawn. Of claimants that split the votes the one that
comes first (`claim_rank`) tries again and the others give way. Dictionaries of all that is
held are announced with every round of renewals. What has lost nearly all of its holders is put
again at once; a lease that they have taken with them, while others remember its number, is claimed
anew. Who hands a lease over ends it first, then offers it to the other peer, which claims it with
what was signed; nobody is asked what an offer is worth, because only the holders of the lease can
say.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import trio

from p2pmoe import telemetry
from p2pmoe.dht.asks import Asks
from p2pmoe.dht.claims import Again, Claim, Lost, TooFew
from p2pmoe.dht.direct import Place
from p2pmoe.dht.leases import (
    Granted,
    LeaseBook,
    LeaseName,
    LeaseParams,
    LeaseRefused,
    LeaseView,
    Vote,
    quorum,
    tally,
)
from p2pmoe.dht.messages import Lease, PrefixRecord, Transfer, key_of
from p2pmoe.dht.reading import never
from p2pmoe.dht.replicas import Replicas
from p2pmoe.dht.search import Searches
from p2pmoe.dht.writing import PutHere, Votes, Writer
from p2pmoe.errors import LeaseLost, LocalProtocolError, P2PMoEError, QuorumNotReached
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed

TOGETHER = 0.05  # seconds: cells that are claimed together are announced together; a guess

MOST_OFFERS = 64  # leases that others handed over, not claimed yet; a guess

Seal = Callable[[Any, Kind], Signed[Any]]
OnTransfer = Callable[[bytes, str, PeerId], bool]  # grid, uid, and who hands it over


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
        self._writer = Writer(parts.place, parts.asks, parts.searches, parts.put_here)
        self._claiming: dict[LeaseName, trio.Event] = {}
        self._offers: dict[LeaseName, Signed[Transfer]] = {}  # to this peer
        self._handing: dict[LeaseName, int] = {}  # leases ended here, and not yet taken
        self._announced: set[LeaseName] = set()
        self._announce_at = math.inf
        self._replicas = Replicas()
        self._again: dict[bytes, Signed[Any]] = {}  # to be put once more, by key
        self._changed = trio.Event()

    # ---------------------------------------------------------------------------------- claiming
    async def claim(self, name: LeaseName, above: int = 0) -> LeaseView:
        """Take a lease, or return the one that is held. Raises as `DhtService.claim`."""
        if self._parts.place.holder is None:
            raise LocalProtocolError("a peer that cannot be dialled cannot serve experts")
        async with self._alone(name):
            if self.book.number(name, trio.current_time()) is None:
                await self._win(name, above)
        return self.book.view(name, self._parts.place.own)

    @asynccontextmanager
    async def _alone(self, name: LeaseName) -> AsyncIterator[None]:
        """One at a time: the withdrawal of a defeat must not follow the lease of a victory."""
        await self._claimed(name)
        self._claiming[name] = ended = trio.Event()
        try:
            yield
        finally:
            del self._claiming[name]
            ended.set()

    async def _claimed(self, name: LeaseName) -> None:
        """Wait until no claim of it is under way, which would give back what is given away."""
        while name in self._claiming:
            await self._claiming[name].wait()

    async def _win(self, name: LeaseName, above: int) -> None:
        transfer = self._offers.pop(name, None)
        claim = Claim(self._parts.place.own, transfer, above=above)
        while True:
            again = await self._round(name, claim, transfer)
            if again is None:
                return
            await trio.sleep(self._rng.uniform(again.least, again.most))

    async def _round(
        self, name: LeaseName, claim: Claim, transfer: Signed[Transfer] | None
    ) -> Again | None:
        """Look who has it, ask for it, count, and clean up after a defeat.

        None when it is granted. Raises when there is nothing to try again for.
        """
        found = await self._parts.searches.read(Kind.LEASE, key_of(Kind.LEASE, *name), never)
        asked, asked_at = len(found.holders), trio.current_time()
        look = claim.look(found.copies(), found.number(), asked, asked_at)
        if isinstance(look, Lost):
            raise LeaseRefused(owner=look.owner, expert=name[1])
        lease = self._lease(name, look.number, self._params.ttl)
        votes = await self._writer.put_at(found.holders, lease, transfer)
        outcome = claim.count(lease, list(votes.values()), asked)
        if isinstance(outcome, Granted):
            self._granted(lease, votes, asked_at)
            self._handing.pop(name, None)
            self._announce_soon()
            telemetry.emit("dht.lease.granted", uid=name[1], number=look.number)
            return None
        await self._writer.put_at(found.holders, self._lease(name, look.number, 0))
        match outcome:
            case Lost():
                raise LeaseRefused(owner=outcome.owner, expert=name[1])
            case TooFew():
                _no_quorum(name[1], outcome, asked)
        return outcome

    # ------------------------------------------------------------------------------ giving back
    async def withdraw(self, uids: Iterable[str]) -> None:
        """Give leases back and announce what is left; the caller sets a deadline."""
        wanted, own = set(uids), self._parts.place.own
        while claimed := [name for name in self._claiming if name[1] in wanted]:
            await self._claimed(claimed[0])
        names = [name for name in self.book.names() if name[1] in wanted]
        numbers = {name: self.book.view(name, own).number for name in names}
        numbers |= {
            name: self._handing.pop(name) for name in set(self._handing) if name[1] in wanted
        }
        async with trio.open_nursery() as writes:
            for name, number in numbers.items():
                self.book.drop(name)
                writes.start_soon(self.publish, self._lease(name, number, 0))
        if numbers:
            await self._announce()

    async def transfer(self, name: LeaseName, to: PeerId) -> bool:
        """End a lease here and offer it to a peer. Raises as `DhtService.transfer`."""
        await self._claimed(name)
        held = self.book.end(name, trio.current_time())
        number = held or self._handing.get(name)
        if number is None:
            raise LeaseLost(f"this peer does not hold {name[1]}, so it cannot hand it over")
        self._handing[name] = number
        body = Transfer(grid=name[0], uid=name[1], to=to.raw, number=number + 1)
        vote = await self._parts.asks.put(to, self._parts.seal(body, Kind.TRANSFER))
        if vote.outcome != "stored":
            return False
        self._handing.pop(name, None)
        self._announce_soon()
        return True

    def offered(self, transfer: Signed[Transfer], wanted: OnTransfer) -> Vote:
        """Remember what another owner signs over to this peer, if it is wanted; the latest ones."""
        body, name = transfer.body, (transfer.body.grid, transfer.body.uid)
        if body.to != self._parts.place.own.raw:
            return Vote("refused", "not_for_me")
        if not wanted(body.grid, body.uid, transfer.signer):
            return Vote("full", "slots")
        self._offers.pop(name, None)
        self._offers[name] = transfer
        if len(self._offers) > MOST_OFFERS:
            del self._offers[next(iter(self._offers))]
        return Vote("stored")

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
                self.book.looked(now)
                for name in self.book.lapsed(now):
                    self._lost(name, "not renewed in time")
                for name in self.book.due(now):
                    rounds.start_soon(self._renew, name)
                for record in self._again.values():
                    rounds.start_soon(self.publish, record)
                self._again.clear()
                if now >= self._announce_at:
                    self._announce_at = math.inf
                    rounds.start_soon(self._announce)

    def peer_lost(self, peer: PeerId) -> None:
        """A peer is gone: what it held may have too few holders now."""
        for record in self._replicas.lost(peer):
            if record.kind is Kind.LEASE:
                self.book.hurry((record.body.grid, record.body.uid), trio.current_time())
            else:
                self._again[record.body.key] = record
            self._changed.set()

    async def _renew(self, name: LeaseName) -> None:
        asked_at = trio.current_time()
        renewal = self.book.renewal(name, asked_at)
        if renewal is None:  # withdrawn meanwhile: a renewal must not follow that
            return
        number, renewed_as = renewal
        lease = self._lease(name, renewed_as, self._params.ttl)
        try:
            directly = await self._writer.put_directly(lease)
            if directly is None:
                found = (await self._parts.searches.nearest(lease.body.key)).holders
                asked_at = trio.current_time()
                if self.book.number(name, asked_at) != number:
                    return
                lease = self._lease(name, renewed_as, self._params.ttl)
                directly = found, await self._writer.put_at(found, lease)
        except P2PMoEError as error:
            telemetry.emit("dht.renewal.failed", uid=name[1], error=error)
            self._missed(name)
            return
        holders, votes = directly
        outcome = tally(lease, list(votes.values()), len(holders), renewal=True)
        if self.book.number(name, trio.current_time()) != number:  # withdrawn, or too late
            return
        if isinstance(outcome, Granted):
            self._granted(lease, votes, asked_at)
            if sum(vote.outcome == "stored" for vote in votes.values()) < quorum(len(holders)):
                self._missed(name)  # it stands, but most have abstained: they are to have it soon
        elif outcome.owner is not None:
            self._taken(name, outcome.owner)
        elif _is_forgotten(votes.values(), len(holders)):
            await self._claim_anew(name, number, outcome.number)
        else:
            self._missed(name)

    async def _claim_anew(self, name: LeaseName, number: int, remembered: int) -> None:
        """Its holders are gone, and others remember that there was a lease: nobody has it now."""
        try:
            async with self._alone(name):
                if self.book.number(name, trio.current_time()) == number:
                    await self._win(name, remembered)
        except LeaseRefused as error:
            self._taken(name, error.owner)
        except P2PMoEError as error:
            telemetry.emit("dht.renewal.failed", uid=name[1], error=error)
            self._missed(name)

    def _granted(self, lease: Signed[Lease], votes: Votes, asked_at: float) -> None:
        body = lease.body
        self.book.granted((body.grid, body.uid), body.number, asked_at)
        self._note(lease, votes)

    def _taken(self, name: LeaseName, owner: PeerId | None) -> None:
        self.book.drop(name)
        self._lost(name, f"peer {owner} has it")

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
            _, votes = await self._writer.put(record)
        except P2PMoEError as error:
            telemetry.emit("dht.publish.failed", kind=record.kind, error=error)
        else:
            self._note(record, votes)

    async def store(
        self, record: Signed[Any]
    ) -> tuple[tuple[PeerId, ...], tuple[PeerId, ...], str]:
        """Put a record at whoever is closest now: who holds it, who does not, and what they say."""
        holders, votes = await self._writer.put(record)
        self._note(record, votes)
        stored = tuple(holder for holder, vote in votes.items() if vote.outcome == "stored")
        failed = tuple(holder for holder in holders if holder not in stored)
        return stored, failed, ", ".join(sorted({vote.why for vote in votes.values() if vote.why}))

    def _note(self, record: Signed[Any], votes: Votes) -> None:
        """Remember who holds this; but of snapshots, which come anew with every save."""
        if record.kind is Kind.SNAPSHOT:
            return
        if record.kind is not Kind.MANIFEST and not record.body.ttl_ms:
            self._replicas.forget(record)
        else:
            took = {peer for peer, vote in votes.items() if vote.outcome in ("stored", "stale")}
            self._replicas.put(record, took)

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


def _is_forgotten(votes: Iterable[Vote], asked: int) -> bool:
    """Whether so many refuse a renewal for its number that it can find no quorum any more."""
    return sum(vote.why == "number" for vote in votes) > asked - quorum(asked)


def _no_quorum(uid: str, outcome: TooFew, asked: int) -> NoReturn:
    said = f" ({', '.join(outcome.reasons)})" if outcome.reasons else ""
    raise QuorumNotReached(
        f"{uid}: {outcome.granted} of {asked} holders granted the lease,"
        f" {outcome.needed} are needed{said}",
        answered=outcome.granted,
        needed=outcome.needed,
    )
