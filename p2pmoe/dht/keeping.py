"""What a holder has, on disk: written behind in a thread, read once at the start. SQLite.

Rules: nothing waits for the disk, so a kill loses the last second. A record that comes back has
what was left of its life when it was written, less what has passed since by the clock that shows
more of it, the wall's or the machine's; if the wall's went back, it has ended, and only its lease
number is remembered. Nothing is believed because it lay here: each envelope is verified again. A
file that cannot be read is set aside with a warning. Contacts of the table are written too: a node
that comes back dials them. What was withdrawn is not written, since L2 outlasts any lease.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from p2pmoe import telemetry
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.messages import BODY_TYPES
from p2pmoe.dht.records import RecordStore
from p2pmoe.dht.shelves import Place
from p2pmoe.errors import MalformedMessage
from p2pmoe.wire.envelope import Kind, Signed, open_envelope
from p2pmoe.wire.peer_record import PeerRecord, open_record

FILE = "dht.sqlite"
LAYOUT = 1  # of the tables below; a file of another layout is set aside
WRITE_EVERY = 1.0  # seconds; so much is lost by a kill; a guess
CONTACTS_EVERY = 60  # writes between two of the contacts; a guess
LAST_WRITE = 2.0  # seconds for the write when the node ends; a guess
MOST_ROWS = 100_000  # that are read; a store that is full has 31,000 of the smallest records
TABLES = f"""
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    PRAGMA user_version = {LAYOUT};
    CREATE TABLE IF NOT EXISTS records (
        key BLOB, sub BLOB, kind TEXT, record BLOB,
        left_ms INTEGER, forget_ms INTEGER, wall_ms INTEGER, machine_ms INTEGER,
        PRIMARY KEY (key, sub)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS contacts (record BLOB);
"""

Row = tuple[bytes, bytes, str, bytes, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds since 1970, and since the machine began; a test has its own."""

    wall: Callable[[], float] = time.time
    machine: Callable[[], float] = time.monotonic

    def now_ms(self) -> tuple[int, int]:
        """Both, in milliseconds."""
        return int(self.wall() * 1000), int(self.machine() * 1000)


@dataclass(frozen=True, slots=True)
class Kept:
    """A record from disk, verified: seconds of life left, and until it may be forgotten."""

    signed: Signed[Any]
    left: float
    forget_in: float


class Keeper:
    """Keeps one holder's records and contacts in a folder."""

    def __init__(
        self, folder: Path, store: RecordStore, contacts: Contacts, network: bytes, clocks: Clocks
    ) -> None:
        self._path, self._store, self._contacts = folder / FILE, store, contacts
        self._network, self._clocks = network, clocks
        self._thread = trio.CapacityLimiter(1)
        store.shelves.changes = {}

    async def restore(self) -> None:
        """Take back what was held when this node last ran."""
        kept, contacts = await trio.to_thread.run_sync(self._read, limiter=self._thread)
        for at, each in enumerate(kept):
            self._store.restore(each.signed, each.left, each.forget_in, trio.current_time())
            if at % 256 == 0:
                await trio.lowlevel.checkpoint()
        self._store.shelves.changes = {}  # what was read need not be written
        for record in contacts:
            self._contacts.learn(record)
        telemetry.emit("dht.restored", records=len(kept), contacts=len(contacts))

    async def run(self) -> None:
        """Write what changes until cancelled, and then once more."""
        rounds = 0
        try:
            while True:
                await trio.sleep(WRITE_EVERY)
                await self._write(contacts=rounds % CONTACTS_EVERY == 0)
                rounds += 1
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_WRITE):
                await self._write(contacts=True)

    # ----------------------------------------------------------------------------------- writing
    async def _write(self, *, contacts: bool) -> None:
        shelves = self._store.shelves
        changes, shelves.changes = shelves.changes or {}, {}
        rows, gone = self._rows(changes)
        known = [self._contacts.record(peer) for peer in self._contacts.table.peers()]
        cards = [record.raw for record in known if record is not None]
        if not (changes or contacts):
            return
        save = partial(self._save, rows, gone, cards if contacts else None)
        try:
            await trio.to_thread.run_sync(save, limiter=self._thread)
        except (sqlite3.Error, OSError) as error:
            shelves.changes = changes | shelves.changes
            telemetry.emit("dht.not_written", level="warning", file=self._path, error=error)

    def _rows(self, changes: Iterable[Place]) -> tuple[list[Row], list[Place]]:
        now, (wall_ms, machine_ms) = trio.current_time(), self._clocks.now_ms()
        rows: list[Row] = []
        gone: list[Place] = []
        for place in changes:
            held = self._store.shelves.get(place)
            if held is None:
                gone.append(place)
                continue
            left_ms = max(0, int((held.expires_at - now) * 1000))
            forget_ms = max(0, int((held.forget_at - now) * 1000))
            signed = held.signed
            rows.append(
                (*place, signed.kind.value, signed.raw, left_ms, forget_ms, wall_ms, machine_ms)
            )
        return rows, gone

    def _save(self, rows: list[Row], gone: list[Place], cards: list[bytes] | None) -> None:
        with closing(self._open()) as file, file:
            file.executemany("DELETE FROM records WHERE key = ? AND sub = ?", gone)
            file.executemany("REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            if cards is not None:
                file.execute("DELETE FROM contacts")
                file.executemany("INSERT INTO contacts VALUES (?)", [(card,) for card in cards])

    # ----------------------------------------------------------------------------------- reading
    def _open(self) -> sqlite3.Connection:
        file = sqlite3.connect(self._path)
        try:
            (layout,) = file.execute("PRAGMA user_version").fetchone()
            if layout not in {0, LAYOUT}:
                raise sqlite3.DatabaseError(f"its layout is {layout}, not {LAYOUT}")
            if not layout:
                file.executescript(TABLES)
        except sqlite3.Error:
            file.close()
            raise
        return file

    def _read(self) -> tuple[list[Kept], list[Signed[PeerRecord]]]:
        try:
            with closing(self._open()) as file:
                rows = file.execute("SELECT * FROM records LIMIT ?", (MOST_ROWS,)).fetchall()
                cards = file.execute("SELECT record FROM contacts").fetchall()
        except sqlite3.DatabaseError as error:
            aside = self._path.with_suffix(".damaged")
            telemetry.emit(
                "dht.file_set_aside", level="warning", file=self._path, to=aside, error=error
            )
            for end in ("-wal", "-shm"):
                self._path.with_name(self._path.name + end).unlink(missing_ok=True)
            if self._path.exists():
                self._path.replace(aside)
            return [], []
        kept = [each for row in rows if (each := self._kept(row)) is not None]
        records = [card for (raw,) in cards if (card := self._card(raw)) is not None]
        return kept, records

    def _kept(self, row: Row) -> Kept | None:
        _, _, kind, raw, left_ms, forget_ms, wall_ms, machine_ms = row
        wall_now, machine_now = self._clocks.now_ms()
        passed = max(0, wall_now - wall_ms, machine_now - machine_ms)
        left_ms = left_ms - passed if wall_now >= wall_ms else 0
        try:
            signed = open_envelope(
                raw, BODY_TYPES[Kind(kind)], kind=Kind(kind), network=self._network
            )
        except (MalformedMessage, ValueError, KeyError, TypeError) as error:
            telemetry.emit("dht.row_refused", level="warning", error=error)
            return None
        return Kept(signed, left_ms / 1000, (forget_ms - passed) / 1000)

    def _card(self, raw: bytes) -> Signed[PeerRecord] | None:
        try:
            return open_record(raw, self._network)
        except (MalformedMessage, TypeError) as error:
            telemetry.emit("dht.row_refused", level="warning", error=error)
            return None
