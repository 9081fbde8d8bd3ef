"""The DHT of a node: join, find, store, and hold leases. The Trio shell around the cores.

A peer that can be dialled holds records for others; a client only reads. A read follows the rule of
the record's kind: for a lease the publisher that most of the r closest name, for a manifest the one
that most of them saw first, for dictionaries the newest of every publisher, for snapshots all that
are known, best first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from p2pmoe.dht.asks import Asks
from p2pmoe.dht.contacts import ContactParams, Contacts
from p2pmoe.dht.direct import Place
from p2pmoe.dht.holder import Holder, HolderParts
from p2pmoe.dht.jobs import Jobs, together
from p2pmoe.dht.keeping import Clocks, Keeper
from p2pmoe.dht.leases import LeaseParams, LeaseView, most_named, quorum
from p2pmoe.dht.leases import LeaseRefused as LeaseRefused
from p2pmoe.dht.messages import NO_GRID, Manifest, SnapshotRecord, key_of
from p2pmoe.dht.neighbours import NeighbourParts, Neighbours, Sign
from p2pmoe.dht.owner import OnTransfer, Owner, OwnerParts
from p2pmoe.dht.reading import Searched, first_named, newest, saved
from p2pmoe.dht.records import RecordParams, RecordStore
from p2pmoe.dht.search import Searches, SearchParams
from p2pmoe.errors import P2PMoEError, QuorumNotReached
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.pool import Pool
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.peer_record import Contact, PeerRecord, contact_of

ABSENT_FOR = 1.0  # seconds for which "there is nothing" is believed; a guess
MOST_ABSENT = 4096  # keys that are remembered to have nothing; a guess
REPUBLISH = 60.0  # seconds between puts of a manifest by those who use it; a guess
VACANT_AFTER = 5.0  # seconds from a member's failure until its leases are vacant here
SWEEP = 10.0  # seconds between looks for records that ended; a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtParams:
    """Parameters of all parts. `amnesia`: this key ran before and may have granted leases (L2).

    `folder` keeps what this peer holds across restarts; without one it starts with nothing.
    """

    contacts: ContactParams = field(default_factory=ContactParams)
    records: RecordParams = field(default_factory=RecordParams)
    leases: LeaseParams = field(default_factory=LeaseParams)
    search: SearchParams = field(default_factory=SearchParams)
    amnesia: bool = False
    folder: Path | None = None
    clocks: Clocks = field(default_factory=Clocks)


@dataclass(frozen=True, slots=True)
class PrefixView:
    """The coordinates served next below a prefix, and by whom; until when that may be believed."""

    coordinates: dict[int, tuple[PeerId, ...]]
    expires_at: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who holds a manifest now, who did not take it, and which one its name leads to."""

    stored: tuple[PeerId, ...]
    failed: tuple[PeerId, ...]
    manifest: Signed[Manifest]


class DhtService:
    """One node's part in the DHT. Made inside Trio; `run` must be running for anything to work."""

    def __init__(
        self,
        pool: Pool,
        keys: KeyPair,
        network: bytes,
        own_record: Callable[[], Signed[PeerRecord] | None],
        params: DhtParams,
        rng: random.Random,
    ) -> None:
        now = trio.current_time()
        self.own = keys.peer_id
        self.observers: list[Callable[[PeerId, Sign], None]] = []  # told between awaits
        self.on_transfer: OnTransfer = lambda _grid, _uid, _owner: False  # a server says otherwise
        self._own_record, self._incarnation = own_record, 0
        place = Place(self.own, lambda: own_record() is not None, pool.usable, pool.connected)
        self._jobs = Jobs()
        self._contacts = contacts = Contacts(self.own, params.contacts, now)
        self._store = RecordStore(params.records, started_at=now, amnesia=params.amnesia)
        self._asks = asks = Asks(pool, contacts, network, self._jobs)
        self._searches = searches = Searches(
            place, contacts, asks, self._store, self._jobs, params.search
        )
        self._neighbours = Neighbours(
            self.own,
            NeighbourParts(pool, contacts, asks, searches, self._jobs, self._changed),
            rng,
        )
        self._holder = holder = Holder(
            HolderParts(
                place,
                self._store,
                contacts,
                asks,
                searches,
                self._neighbours.dial_back,
                lambda transfer: self._owner.offered(transfer, self.on_transfer),
                self._jobs,
            )
        )
        pool.handlers.update(holder.handlers)
        sign = partial(_seal, keys, network)
        self._owner = Owner(
            OwnerParts(place, asks, searches, holder.put, sign, self._next_version),
            params.leases,
            rng,
        )
        self._keeper: Keeper | None = None
        if params.folder is not None:
            self._keeper = Keeper(params.folder, self._store, contacts, network, params.clocks)
        self._pinned: dict[str, Signed[Manifest]] = {}  # by names that this node asked for
        self._put_here: dict[str, Signed[Manifest]] = {}  # manifests that this node stored
        self._absent: dict[bytes, float] = {}  # until when a key is believed to have nothing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer, renew, republish and refresh until cancelled."""
        if self._keeper is not None:
            await self._keeper.restore()
        async with trio.open_nursery() as parts:
            if self._keeper is not None:
                parts.start_soon(self._keeper.run)
            await parts.start(self._jobs.run)
            await parts.start(self._owner.run)
            await parts.start(self._neighbours.run)
            parts.start_soon(self._republish)
            task_status.started()
            while True:
                await trio.sleep(SWEEP)
                self._store.expire(trio.current_time())

    async def join(self, addresses: Iterable[Address]) -> int:
        """Enter the swarm by any of these; returns how many peers are known after.

        Raises the error of the first address when none of them answers.
        """
        return await self._neighbours.join(addresses)

    # ------------------------------------------------------------------------------------- grids
    async def get_manifest(self, name: str) -> Signed[Manifest] | None:
        """The manifest that a grid's name leads to, pinned from then on; None if nobody has one."""
        if name not in self._pinned:
            found = await self._read(Kind.MANIFEST, NO_GRID, name)
            manifest = first_named(found)
            if manifest is None:
                return None
            self._pinned.setdefault(name, manifest)
        return self._pinned[name]

    async def put_manifest(self, manifest: Signed[Manifest]) -> Receipt:
        """Store a manifest. The receipt names the one that its name leads to, pinned from now on.

        Raises `QuorumNotReached` when nobody stored it.
        """
        name = manifest.body.name
        stored, failed, said = await self._owner.store(manifest)
        self._absent.pop(manifest.body.key, None)
        if len(stored) >= quorum(len(stored) + len(failed)) and not said:  # at all it comes first
            self._pinned.setdefault(name, manifest)
        winner = await self.get_manifest(name)
        if winner is None:
            raise QuorumNotReached(f"nobody stored the manifest of {name}", needed=1)
        if winner.digest == manifest.digest:
            self._put_here[name] = manifest
        return Receipt(stored, failed, winner)

    async def get_prefix(self, grid: bytes, prefix: str) -> PrefixView:
        """Which coordinates are served next below a prefix, by whom."""
        found = await self._read(Kind.PREFIX, grid, prefix)
        now = trio.current_time()
        live = [copy for copy in newest(found.all_copies()) if copy.expires_at > now]
        serving: dict[int, list[PeerId]] = {}
        for copy in live:
            for coordinate in copy.signed.body.coordinates:
                serving.setdefault(coordinate, []).append(copy.signed.signer)
        return PrefixView(
            {coordinate: tuple(sorted(serving[coordinate])) for coordinate in sorted(serving)},
            min((copy.expires_at for copy in live), default=now + ABSENT_FOR),
        )

    # ------------------------------------------------------------------------------------ leases
    async def get_leases(self, grid: bytes, uids: Iterable[str]) -> dict[str, LeaseView]:
        """Who serves each of these experts, for those that somebody serves."""
        asks = [partial(self._get_lease, grid, uid) for uid in dict.fromkeys(uids)]
        return {view.uid: view for view in await together(asks) if view is not None}

    async def _get_lease(self, grid: bytes, uid: str) -> LeaseView | None:
        if self._owner.book.number((grid, uid), trio.current_time()) is not None:
            return self._owner.book.view((grid, uid), self.own)
        found = await self._read(Kind.LEASE, grid, uid)
        now = trio.current_time()
        copy = most_named([copy for copy in found.copies() if copy.expires_at > now])
        if copy is None:
            return None
        return LeaseView(uid, copy.signed.signer, copy.signed.body.number, copy.expires_at)

    async def claim(self, grid: bytes, uid: str, above: int = 0) -> LeaseView:
        """Take the lease of an expert; from then on it is renewed and announced.

        Its number is above all that holders remember, and above `above`. What was transferred to
        this peer is granted at once.

        Raises `LeaseRefused` when another peer has it, `QuorumNotReached` when too few holders
        grant it now (try again later), `LocalProtocolError` when this peer cannot be dialled.
        """
        view = await self._owner.claim((grid, uid), above)
        self._absent.pop(key_of(Kind.LEASE, grid, uid), None)
        return view

    async def withdraw(self, uids: Sequence[str]) -> None:
        """Give leases back and end their announcements; the caller sets a deadline."""
        await self._owner.withdraw(uids)

    async def transfer(self, grid: bytes, uid: str, to: PeerId) -> bool:
        """End a lease here and offer it; whether the other peer takes it. It claims it then.

        From the call on this peer does not serve the expert, whatever comes of it: try another
        peer, or withdraw. Raises `LeaseLost` when it is not held, `P2PMoEError` when the peer does
        not answer.
        """
        return await self._owner.transfer((grid, uid), to)

    # --------------------------------------------------------------------------------- snapshots
    async def put_snapshot(self, record: Signed[SnapshotRecord]) -> tuple[PeerId, ...]:
        """Tell what was saved of an expert whose lease is held, beside that lease: who holds it.

        Raises `QuorumNotReached` when nobody stored it.
        """
        stored, _, why = await self._owner.store(record)
        if not stored:
            raise QuorumNotReached(f"nobody stored what was saved of {record.body.uid} ({why})")
        return stored

    async def snapshots(self, grid: bytes, uid: str) -> list[Signed[SnapshotRecord]]:
        """What is known to be saved of an expert, best first; what few holders name comes last."""
        found = await self._searches.read(Kind.SNAPSHOT, key_of(Kind.LEASE, grid, uid))
        return [copy.signed for copy in saved(found, trio.current_time())]

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        """The number of a lease held; None when it was lost, or not renewed at a quorum in time.

        Also None from the end of a pause of this process until the next renewal.
        """
        return self._owner.book.serving((grid, uid), now)

    async def inspect(self, key: bytes) -> Searched:
        """What every holder of a key has, of any kind, for people who look. It changes nothing."""
        return await self._searches.inspect(key)

    # ------------------------------------------------------------------------------------- peers
    def contact(self, peer: PeerId) -> Contact | None:
        """Where to dial a peer, if any record of it has come by."""
        if peer == self.own:
            record = self._own_record()
            return None if record is None else contact_of(record)
        return self._contacts.contact(peer)

    async def locate(self, peer: PeerId) -> Contact | None:
        """Where to dial a peer, which is looked for if no record of it has come by."""
        if self.contact(peer) is None:
            await self._searches.find(peer.raw)
        return self.contact(peer)

    def grids(self) -> set[str]:
        """The names of the grids that known peers say they serve."""
        return self._contacts.grids()

    def usable(self, peer: PeerId) -> bool:
        """Whether a call to this peer may succeed: it did not fail a short while ago."""
        return peer == self.own or self._searches.usable(peer)

    def suspected(self, peer: PeerId) -> bool:
        """Whether others should be asked first."""
        return self._contacts.suspected(peer)

    def peer_failed(self, peer: PeerId) -> None:
        """Somebody else found this peer gone: it is avoided for a while."""
        self._contacts.failed(peer, trio.current_time())

    # ----------------------------------------------------------------- what the membership says
    def member_alive(self, record: Signed[PeerRecord]) -> None:
        """A member was met or is back: it may be asked, and its leases are its own again."""
        self._contacts.alive(record)
        self._store.is_back(record.signer)
        self._changed(record.signer, Sign.CAME)

    def member_suspected(self, peer: PeerId) -> None:
        """A member may be gone: it is asked after the others."""
        self._contacts.suspect(peer)
        self._changed(peer, Sign.DOUBTED)

    def member_failed(self, peer: PeerId) -> None:
        """A member is gone: it is avoided, and its leases are vacant here after a while."""
        self._gone(peer, VACANT_AFTER)

    def member_left(self, peer: PeerId) -> None:
        """A member said that it leaves: it is avoided, and its leases are vacant here now."""
        self._gone(peer, 0.0)

    async def probe(self, peer: PeerId) -> bool:
        """Ask a peer for a sign of life."""
        try:
            await self._asks.find(peer, self.own.raw)
        except P2PMoEError:  # marked and told about where it was asked
            return False
        return True

    def stats(self) -> dict[str, int]:
        """Figures for operators."""
        return {
            "dht_contacts": len(self._contacts),
            "dht_table": len(self._contacts.table),
            "dht_records": len(self._store),
            "dht_record_bytes": self._store.shelves.bytes,
            "dht_leases": len(self._owner.book.names()),
        }

    # ----------------------------------------------------------------------------------- reading
    async def _read(self, kind: Kind, grid: bytes, name: str) -> Searched:
        """What the holders of a key say; a recent "nothing" is believed."""
        key = key_of(kind, grid, name)
        now = trio.current_time()
        if now < self._absent.get(key, 0.0) and not self._store.get(key, now):
            return Searched([])
        found = await self._searches.look(kind, key)
        now = trio.current_time()
        self._absent.pop(key, None)
        if not found.copies():
            if len(self._absent) >= MOST_ABSENT:
                del self._absent[next(iter(self._absent))]
            self._absent[key] = now + ABSENT_FOR
        return found

    # ----------------------------------------------------------------------------------- keeping
    async def _republish(self) -> None:
        """Keep the manifests of the grids that this node created or serves."""
        while True:
            await trio.sleep(REPUBLISH)
            served = {grid for grid, _ in self._owner.book.names()}
            used = {name: one for name, one in self._pinned.items() if one.digest in served}
            for manifest in (used | self._put_here).values():
                await self._owner.publish(manifest)

    def _next_version(self) -> tuple[int, int]:
        record = self._own_record()
        assert record is not None  # only a peer that can be dialled signs records
        self._incarnation += 1
        return record.body.epoch, self._incarnation

    def _gone(self, peer: PeerId, vacant_after: float) -> None:
        self._contacts.failed(peer, now := trio.current_time())
        self._store.gone(peer, now + vacant_after)
        self._changed(peer, Sign.GONE)

    def _changed(self, peer: PeerId, sign: Sign) -> None:
        if sign is Sign.GONE:
            self._owner.peer_lost(peer)
        for observer in self.observers:
            observer(peer, sign)


def _seal(keys: KeyPair, network: bytes, body: Any, kind: Kind) -> Signed[Any]:
    return seal(keys, body, kind=kind, network=network)
