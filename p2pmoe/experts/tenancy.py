"""The cells that this server holds in one grid: claimed once, then kept.

`acquire` reads which cells are taken, claims free ones and builds their experts; `run` then looks
after them. An expert whose lease is lost is not served, because every part is checked against the
lease; its cell is claimed again. If somebody else has it by then, the expert is given up and
another free cell takes its place.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import trio

from p2pmoe import telemetry
from p2pmoe.dht.leases import LeaseRefused
from p2pmoe.errors import PeerUnreachable, QuorumNotReached
from p2pmoe.experts.manifest import Offer
from p2pmoe.experts.placement import Placement
from p2pmoe.experts.service import ExpertService, LeaseBook
from p2pmoe.experts.uid import ExpertUid, Prefix
from p2pmoe.identity import PeerId

LOOK_AFTER = 2.0  # seconds between looks at the leases held; a guess
LOOK_AROUND = 30.0  # seconds between looks for vacant cells; one lifetime of a lease
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

    async def claim(self, grid: bytes, uid: str) -> object:
        """Take the lease of a uid and renew it; raises `LeaseRefused` or `QuorumNotReached`."""
        ...


class Tenancy:
    """Holds what an offer promises, as far as cells are free."""

    def __init__(
        self, dht: Dht, service: ExpertService, offer: Offer, me: PeerId, rng: random.Random
    ) -> None:
        self.offer = offer
        self._dht, self._service, self._me = dht, service, me
        self._placement = Placement(offer.grid, me.raw, offer.count, rng=rng, only=offer.only)

    @property
    def held(self) -> tuple[str, ...]:
        """The uids held, in order."""
        return tuple(map(str, self._placement.held))

    async def acquire(self) -> tuple[str, ...]:
        """Claim cells until enough are held or none is free; `run` goes on with what is missing.

        The caller sets a deadline, as there may be no quorum, and asks for `held` after it.
        """
        self._placement.seen(await self._taken())
        await self._claim_wanted()
        telemetry.emit(
            "expert.cells.held", level="info", grid=self.offer.grid, count=len(self.held)
        )
        return self.held

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is held, and look for more while it is too little; until cancelled."""
        task_status.started()
        look_around = trio.current_time() + LOOK_AROUND
        while True:
            await trio.sleep(LOOK_AFTER)
            self._notice_losses()
            if trio.current_time() >= look_around:
                look_around = trio.current_time() + LOOK_AROUND
                self._placement.seen(await self._taken())
            await self._claim_wanted()

    def _notice_losses(self) -> None:
        now = trio.current_time()
        for uid in self._placement.held:
            if self._dht.lease_number(self.offer.digest, str(uid), now) is None:
                telemetry.emit("expert.lease.lost", level="warning", expert=uid)
                self._placement.lost(uid)

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
        try:
            await self._dht.claim(self.offer.digest, str(uid))
        except LeaseRefused:
            self._placement.refused(uid)
            self._service.remove(str(uid))
        except (QuorumNotReached, PeerUnreachable) as error:
            telemetry.emit("expert.claim.failed", expert=uid, error=error)
            self._placement.failed(uid, trio.current_time())
        else:
            if str(uid) not in self._service.experts:
                await self._service.build(self.offer, str(uid))
            self._placement.told(uid)
        finally:
            self._placement.given_up(uid)  # when it was cancelled; else there is a verdict

    async def _taken(self) -> set[ExpertUid]:
        """The cells that others serve, read dimension by dimension through the prefixes."""
        grid = self.offer.grid
        prefixes = [Prefix(grid.name)]
        for _ in grid.cells:
            found: list[Prefix] = []
            limit = trio.CapacityLimiter(READERS)
            async with trio.open_nursery() as reads:
                for prefix in prefixes:
                    reads.start_soon(self._read, prefix, found, limit)
            prefixes = found
        taken = {ExpertUid(prefix.name, prefix.coordinates) for prefix in prefixes}
        return {uid for uid in taken if uid in grid}

    async def _read(self, prefix: Prefix, found: list[Prefix], limit: trio.CapacityLimiter) -> None:
        async with limit:
            view = await self._dht.get_prefix(self.offer.digest, str(prefix))
        for coordinate, peers in view.coordinates.items():
            if any(peer != self._me for peer in peers):
                found.append(Prefix(prefix.name, (*prefix.coordinates, coordinate)))
