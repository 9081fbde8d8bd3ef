"""The cells that this server holds in one grid: claimed once, then kept.

`acquire` reads which cells are taken, claims free ones and builds their experts; `run` then looks
after them. Cells that this server saved when it last ran come first, then orphans: cells that were
served and are not any more. An expert begins as the newest snapshot that survives, and is served
when it has that; the lease decides who does so. A member that failed or left has orphans, so a
server with free cells looks for them at once, and again until the lease of the lost one has ended.

An expert whose lease is lost is not served, because every part is checked against the lease; its
cell is claimed again. If somebody else has it by then, the expert is given up and another free cell
takes its place.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import trio

from p2pmoe import telemetry
from p2pmoe.dht.jobs import together
from p2pmoe.dht.leases import LeaseRefused
from p2pmoe.errors import P2PMoEError, PeerUnreachable, QuorumNotReached
from p2pmoe.experts.adoption import Adoption
from p2pmoe.experts.manifest import Offer
from p2pmoe.experts.placement import ORPHAN, OWN, Placement
from p2pmoe.experts.service import ExpertService, LeaseBook
from p2pmoe.experts.uid import ExpertUid, Prefix
from p2pmoe.identity import PeerId

LOOK_AFTER = 2.0  # seconds between looks at the leases held; a guess
LOOK_AROUND = 30.0  # seconds between looks for vacant cells; one lifetime of a lease
LOOK_SOON = 1.5  # seconds between them after a member was lost; a guess
HURRY = 40.0  # seconds after a loss in which to look so often: its leases end in 30
SETTLE = 0.2  # seconds to wait for more news after some; a guess
MOST_ASKED = 256  # free cells of which a server asks at its start whether they were saved; a guess
MOST_CELLS = 4096  # cells of a grid that are looked at; a guess, as the directory's
READERS = 16  # prefixes read at once; a guess


class PrefixView(Protocol):
    """Who serves what below a prefix."""

    @property
    def coordinates(self) -> Mapping[int, Sequence[PeerId]]:
        """The active next coordinates, and who announces each."""
        ...


class Dht(LeaseBook, Protocol):
    """What a tenancy asks of the DHT."""

    async def get_prefix(self, grid: bytes, prefix: str) -> PrefixView:
        """The active coordinates next below a prefix."""
        ...

    async def get_leases(self, grid: bytes, uids: Iterable[str]) -> Mapping[str, object]:
        """Those of these uids that somebody holds a lease of."""
        ...

    async def claim(self, grid: bytes, uid: str, above: int = 0) -> object:
        """Take the lease of a uid and renew it; raises `LeaseRefused` or `QuorumNotReached`."""
        ...


class Tenancy:
    """Holds what an offer promises, as far as cells are free."""

    def __init__(
        self,
        dht: Dht,
        service: ExpertService,
        adoption: Adoption,
        offer: Offer,
        me: PeerId,
        rng: random.Random,
    ) -> None:
        self.offer = offer
        self._dht, self._service, self._adoption, self._me = dht, service, adoption, me
        self._placement = Placement(offer.grid, me.raw, offer.count, rng=rng, only=offer.only)
        self._served: set[ExpertUid] = set()  # cells that others were seen to serve
        self._orphans: set[ExpertUid] = set()  # of these, and of those saved, what nobody serves
        self._news = trio.Event()
        self._look_at = self._hurry_until = -math.inf

    @property
    def held(self) -> tuple[str, ...]:
        """The uids held, in order."""
        return tuple(map(str, self._placement.held))

    @property
    def missing(self) -> int:
        """How many more cells this server would serve."""
        return self._placement.missing

    async def acquire(self) -> tuple[str, ...]:
        """Claim cells until enough are held or none is free; `run` goes on with what is missing.

        The caller sets a deadline, as there may be no quorum, and asks for `held` after it.
        """
        saved = self._adoption.saved_here(self.offer.digest)
        self._placement.prefer(map(ExpertUid.parse, saved), OWN)
        await self._look_around()
        await self._ask_what_was_saved()
        await self._claim_wanted()
        telemetry.emit(
            "expert.cells.held", level="info", grid=self.offer.grid, count=len(self.held)
        )
        return self.held

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is held, and look for more while it is too little; until cancelled."""
        task_status.started()
        self._look_at = max(self._look_at, trio.current_time() + LOOK_AROUND)
        while True:
            with trio.move_on_after(min(LOOK_AFTER, self._pause)):
                await self._news.wait()
                await trio.sleep(SETTLE)
            self._news = trio.Event()
            self._notice_losses()
            if self.missing and trio.current_time() >= self._look_at:
                self._look_at = trio.current_time() + self._pause
                await self._look_around()
            await self._claim_wanted()

    def look_now(self) -> None:
        """A member failed or left: its cells may be free now, or soon."""
        self._hurry_until = trio.current_time() + HURRY
        self._look_at = trio.current_time()
        self._news.set()

    def handed(self, uid: str) -> bool:
        """Whether this server takes a cell whose owner hands it over; it is claimed at once."""
        cell = ExpertUid.parse(uid)
        if not self._placement.take(cell):
            return False
        self._orphans.add(cell)
        self._news.set()
        return True

    @property
    def _pause(self) -> float:
        return LOOK_SOON if trio.current_time() < self._hurry_until else LOOK_AROUND

    def _notice_losses(self) -> None:
        now = trio.current_time()
        for uid in self._placement.held:
            if self._dht.lease_number(self.offer.digest, str(uid), now) is None:
                telemetry.emit("expert.lease.lost", level="warning", expert=uid)
                self._placement.lost(uid)

    # -------------------------------------------------------------- claiming
    async def _claim_wanted(self) -> None:
        placement = self._placement
        while not placement.done:
            wanted = placement.wanted(trio.current_time())
            if not wanted:
                await trio.sleep_until(placement.next_deadline())
            async with trio.open_nursery() as claims:
                for uid in wanted:
                    claims.start_soon(self._claim, uid)

    async def _claim(self, uid: ExpertUid) -> None:
        grid = self.offer.digest
        above = self._adoption.highest_lease(grid, str(uid))
        try:
            await self._dht.claim(grid, str(uid), above)
        except LeaseRefused:
            self._served.add(uid)
            self._placement.refused(uid)
            self._service.remove(str(uid))
        except (QuorumNotReached, PeerUnreachable) as error:
            telemetry.emit("expert.claim.failed", expert=uid, error=error)
            self._placement.failed(uid, trio.current_time())
        else:
            if str(uid) not in self._service.experts:
                await self._begin(uid)
            self._placement.told(uid)
        finally:
            self._placement.given_up(uid)  # when it was cancelled; else there is a verdict

    async def _begin(self, uid: ExpertUid) -> None:
        """Serve an expert as it was saved last, or with its first weights."""
        expert = await self._service.make(self.offer, str(uid))
        known = await self._adoption.known(self.offer.digest, str(uid))
        await self._adoption.restore(expert, known, was_served=uid in self._orphans)
        self._service.add(expert)
        self._orphans.discard(uid)

    # -------------------------------------------------------------- looking
    async def _look_around(self) -> None:
        """Learn which cells others serve, and which are orphans."""
        try:
            listed = await self._listed()
            leases = await self._dht.get_leases(self.offer.digest, map(str, sorted(listed)))
        except P2PMoEError as error:  # this node has too much to do: there is a next time
            telemetry.emit("expert.grid.unread", grid=self.offer.grid, error=error)
            return
        taken = {uid for uid in listed if str(uid) in leases}
        self._served |= listed
        self._orphans = (self._orphans | self._served) - taken - set(self._placement.held)
        self._placement.seen(taken)
        self._placement.prefer(self._orphans, ORPHAN)

    async def _ask_what_was_saved(self) -> None:
        """Of the cells that are free, those of which anything was saved are orphans."""
        if not self.missing:
            return
        asks = [
            partial(self._adoption.known, self.offer.digest, str(uid))
            for uid in self._placement.free[:MOST_ASKED]
        ]
        saved = [known[0].body.uid for known in await together(asks) if known]
        self._orphans |= set(map(ExpertUid.parse, saved))
        self._placement.prefer(self._orphans, ORPHAN)

    async def _listed(self) -> set[ExpertUid]:
        """The cells that others announce, read dimension by dimension through the prefixes."""
        grid = self.offer.grid
        prefixes = [Prefix(grid.name)]
        limit = trio.CapacityLimiter(READERS)
        for _ in grid.cells:
            below = await together([partial(self._below, prefix, limit) for prefix in prefixes])
            prefixes = [prefix for found in below for prefix in found][:MOST_CELLS]
        listed = (ExpertUid(prefix.name, prefix.coordinates) for prefix in prefixes)
        return {uid for uid in listed if uid in grid}

    async def _below(self, prefix: Prefix, limit: trio.CapacityLimiter) -> list[Prefix]:
        async with limit:
            view = await self._dht.get_prefix(self.offer.digest, str(prefix))
        return [
            Prefix(prefix.name, (*prefix.coordinates, coordinate))
            for coordinate, peers in view.coordinates.items()
            if any(peer != self._me for peer in peers)
        ]
