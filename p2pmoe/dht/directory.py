"""A grid as it stands: its manifest, which cells are served, by whom, and where those peers are.

`read_grid` reads it all, prefix by prefix. `GridWatch` does so again and again in the background,
so that a training step looks nothing up. A server that is lost, left, failed or refuses to be
dialled leaves the view at once and comes back when it answers; its lease may say otherwise for up
to 30 s. One that is suspected stays, marked as one to ask last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.dht.jobs import together
from p2pmoe.dht.leases import LeaseView
from p2pmoe.dht.messages import Manifest
from p2pmoe.dht.neighbours import Sign
from p2pmoe.dht.service import DhtService
from p2pmoe.errors import ExpertUnavailable, P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import Contact

PERIOD = 5.0  # seconds between readings; half of a renewal
SOON = 1.0  # seconds between them while a server does not serve what its lease says; a guess
DOUBT = 30.0  # seconds for which that is looked at so often: one lifetime of a lease
LEAST_GAP = 0.25  # seconds between readings, however often `poke` is called; a guess
FRESH = 10.0  # seconds that a lease must have left to be taken as read; one renewal
READ_LIMIT = 30.0  # seconds for one reading; one lifetime of a lease
MOST_CELLS = 4096  # prefixes of one length, and cells, that one reading follows; a guess


@dataclass(frozen=True, slots=True)
class GridReading:
    """One reading of a grid. `grid` is the hash of its manifest, `cells` the leases by uid.

    The peers in `doubted` may have failed: others are asked first.
    """

    manifest: Signed[Manifest]
    grid: bytes
    cells: Mapping[str, LeaseView]
    contacts: Mapping[PeerId, Contact]
    doubted: frozenset[PeerId] = frozenset()


async def read_grid(
    dht: DhtService, name: str, known: Mapping[str, LeaseView] | None = None
) -> GridReading:
    """Read the manifest, then the prefixes breadth first, then the leases of the cells they name.

    Leases `known` with time left are not read again. Cells without a valid lease, and such whose
    server nobody can find, are left out. Raises `ExpertUnavailable` when there is no such grid.
    """
    manifest = await dht.get_manifest(name)
    if manifest is None:
        raise ExpertUnavailable(f"no grid is named {name}: start a node that serves it")
    prefixes = [name]
    for size in manifest.body.cells:
        views = await together(
            [partial(dht.get_prefix, manifest.digest, each) for each in prefixes]
        )
        prefixes = [
            f"{prefix}.{coordinate}"
            for prefix, view in zip(prefixes, views, strict=True)
            for coordinate in view.coordinates
            if coordinate < size
        ][:MOST_CELLS]
    fresh_until = trio.current_time() + FRESH
    cells = {
        uid: known[uid]
        for uid in prefixes
        if known is not None and uid in known and known[uid].expires_at > fresh_until
    }
    cells |= await dht.get_leases(manifest.digest, [uid for uid in prefixes if uid not in cells])
    contacts = {view.peer: dht.contact(view.peer) for view in cells.values()}
    reachable = {peer: contact for peer, contact in contacts.items() if contact is not None}
    served = {uid: cells[uid] for uid in prefixes if uid in cells and cells[uid].peer in reachable}
    return GridReading(manifest, manifest.digest, served, reachable)


class GridWatch:
    """Keeps the reading of one grid fresh. `run` must be running."""

    def __init__(self, dht: DhtService, name: str) -> None:
        self.name = name
        self.current: GridReading | None = None  # None until somebody knows the grid
        self._dht = dht
        self._read: GridReading | None = None  # with the cells of lost peers
        self._lost: set[PeerId] = set()  # only peers that serve a cell of the reading
        self._doubted: set[PeerId] = set()  # of these, whom to ask for a sign of life
        self._wrong: dict[str, float] = {}  # cells not served as read, and until when to doubt it
        self._poked = trio.Event()
        self._changed = trio.Event()

    def poke(self, wrong: Iterable[str] = ()) -> None:
        """Read again at once: something in the view turned out to be wrong, as these cells."""
        until = trio.current_time() + DOUBT
        self._wrong |= {uid: until for uid in wrong if self._read and uid in self._read.cells}
        self._poked.set()

    async def changed(self) -> None:
        """Wait until `current` is another reading than now."""
        await self._changed.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read the grid again and again until cancelled."""
        self._dht.observers.append(self._observe)
        try:
            task_status.started()
            while True:
                self._poked = trio.Event()
                await self._refresh()
                await trio.sleep(LEAST_GAP)
                with trio.move_on_after((SOON if self._wrong else PERIOD) - LEAST_GAP):
                    await self._poked.wait()
        finally:
            self._dht.observers.remove(self._observe)

    async def _refresh(self) -> None:
        known = self._believed()
        doubted, self._doubted = self._doubted, set()
        try:
            with trio.fail_after(READ_LIMIT):
                reading = await read_grid(self._dht, self.name, known)
                await self._ask(doubted & reading.contacts.keys())
        except (P2PMoEError, trio.TooSlowError) as error:
            telemetry.emit("dht.grid.unread", grid=self.name, error=error)
        else:
            now = trio.current_time()
            self._wrong = {
                uid: until
                for uid, until in self._wrong.items()
                if until > now and self._is_as_before(uid, reading)
            }
            self._read = reading
            self._lost &= reading.contacts.keys()
            self._lost |= {peer for peer in reading.contacts if not self._dht.usable(peer)}
        self._doubted |= self._lost
        self._show()

    def _believed(self) -> dict[str, LeaseView]:
        """The leases that need not be read again if they have time left."""
        cells = {} if self._read is None else self._read.cells
        return {
            uid: view
            for uid, view in cells.items()
            if uid not in self._wrong and view.peer not in self._lost
        }

    def _is_as_before(self, uid: str, reading: GridReading) -> bool:
        """Whether a cell has the lease that it had; one that was renewed is the same."""
        old = self._read.cells.get(uid) if self._read is not None else None
        new = reading.cells.get(uid)
        if old is None or new is None:
            return False
        return (old.peer, old.number) == (new.peer, new.number)

    async def _ask(self, peers: set[PeerId]) -> None:
        """A sign of life from peers that said goodbye or were lost."""
        async with trio.open_nursery() as probes:
            for peer in peers:
                if self._dht.usable(peer):
                    probes.start_soon(self._ask_one, peer)

    async def _ask_one(self, peer: PeerId) -> None:
        if await self._dht.probe(peer):
            self._lost.discard(peer)
        else:
            self._lost.add(peer)

    def _observe(self, peer: PeerId, sign: Sign) -> None:
        if self._read is None or peer not in self._read.contacts:
            return
        if sign is Sign.CAME:
            self._lost.discard(peer)
        elif sign is not Sign.DOUBTED:
            self._doubted.add(peer)
            self.poke()
        if sign is Sign.GONE:
            self._lost.add(peer)
        self._show()

    def _show(self) -> None:
        """Make the reading without lost peers and ended leases the current one, if it differs."""
        if self._read is None:
            return
        now = trio.current_time()
        cells = {
            uid: view
            for uid, view in self._read.cells.items()
            if view.peer not in self._lost and view.expires_at > now
        }
        doubted = frozenset(filter(self._dht.suspected, self._read.contacts))
        shown = replace(self._read, cells=cells, doubted=doubted)
        if shown != self.current:
            self.current = shown
            changed, self._changed = self._changed, trio.Event()
            changed.set()
