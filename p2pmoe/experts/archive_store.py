"""Saved experts in a folder: written whole or not at all, found again at the next start. Blocking.

    <grid, 16 hex digits>/<uid>/<step>-<hash, 8 hex digits>.safetensors   the file
    <grid, 16 hex digits>/<uid>/<step>-<hash, 8 hex digits>.json          its owner's statement

A file is written under a name ending in `.new`, brought to the disk and renamed, then the statement
in the same way: a file without a statement is none. What an earlier process left half done is
removed at the start. Nothing saved before is touched until something newer is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from p2pmoe import telemetry
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import SnapshotRefused
from p2pmoe.experts.archive import MAX_STATEMENT_BYTES, rank, read_statement, write_statement
from p2pmoe.wire.envelope import Signed

FILE, STATEMENT, UNFINISHED = ".safetensors", ".json", ".new"
_numbers = itertools.count()  # of unfinished files, so that no two have one name


@dataclass(frozen=True, slots=True)
class Saved:
    """A file and what its owner said of it."""

    signed: Signed[SnapshotRecord]
    path: Path

    @property
    def name(self) -> tuple[bytes, bytes]:
        """By what it is known here: its expert, and the hash of the file."""
        return self.signed.body.key, self.signed.body.hash


class Incoming:
    """A file that is being written; `add` its bytes in order, then `finish` or `drop` it."""

    def __init__(self, folder: Folder, signed: Signed[SnapshotRecord]) -> None:
        self.signed, self.received = signed, 0
        self._folder, self._hash = folder, hashlib.sha256()
        self._path = folder.path_of(signed.body)
        self._fresh = self._path.with_name(f"{self._path.name}.{next(_numbers)}{UNFINISHED}")
        _make(self._path.parent)
        self._file: FileIO = self._fresh.open("wb", buffering=0)

    def add(self, data: bytes | memoryview) -> None:
        """Write the next bytes; `OSError` when the disk does not take them."""
        if self.received + len(data) > self.signed.body.bytes:
            raise SnapshotRefused("size", f"more than {self.signed.body.bytes} bytes")
        _write(self._file, data)
        self._hash.update(data)
        self.received += len(data)

    def finish(self) -> Saved:
        """Put the file in its place, once it is what the statement says."""
        if self._hash.digest() != self.signed.body.hash:
            raise SnapshotRefused("hash", f"{self.received} bytes are not those that were signed")
        os.fsync(self._file.fileno())
        self._file.close()
        self._fresh.replace(self._path)
        _sync(self._path.parent)
        statement = self._path.with_suffix(STATEMENT)
        fresh = statement.with_name(f"{statement.name}{UNFINISHED}")
        try:
            with fresh.open("wb", buffering=0) as file:
                _write(file, write_statement(self.signed))
                os.fsync(file.fileno())
            fresh.replace(statement)
        except OSError:
            fresh.unlink(missing_ok=True)
            if not statement.exists():
                self._path.unlink()
            raise
        _sync(statement.parent)
        return self._folder.add(Saved(self.signed, self._path))

    def drop(self) -> None:
        """Leave nothing of it, unless it is finished."""
        self._file.close()
        self._fresh.unlink(missing_ok=True)


class Folder:
    """The saved experts below one folder."""

    def __init__(self, root: Path, network: bytes) -> None:
        self._root, self._network = root, network
        self._saved: dict[tuple[bytes, bytes], Saved] = {}
        self._lock = threading.Lock()  # guards the table: files are handled in other threads

    def load(self) -> list[Saved]:
        """Find what is there, the oldest first, and remove what was left half done."""
        for path in sorted(self._root.glob(f"*/*/*{UNFINISHED}")):
            path.unlink(missing_ok=True)
        found = [saved for saved in self._read_statements() if saved is not None]
        with self._lock:
            self._saved = {saved.name: saved for saved in found}
        for path in sorted(self._root.glob(f"*/*/*{FILE}")):
            if not path.with_suffix(STATEMENT).exists():
                path.unlink(missing_ok=True)
        return found

    def _read_statements(self) -> Iterator[Saved | None]:
        paths = [(path.stat().st_mtime, path) for path in self._root.glob(f"*/*/*{STATEMENT}")]
        for _, path in sorted(paths):
            try:
                with path.open("rb") as file:
                    signed = read_statement(file.read(MAX_STATEMENT_BYTES), self._network)
                saved = Saved(signed, path.with_suffix(FILE))
                if saved.path != self.path_of(signed.body):
                    raise SnapshotRefused("statement", "it is about another file")
            except (OSError, SnapshotRefused) as error:
                telemetry.emit(
                    "expert.snapshot.unreadable",
                    level="warning",
                    file=path,
                    error=error,
                    advice="an older one is used; remove the file if this comes again",
                )
            else:
                yield saved

    def path_of(self, record: SnapshotRecord) -> Path:
        """Where the file of a statement is, or would be."""
        name = f"{record.step}-{record.hash.hex()[:8]}{FILE}"
        return self._root / record.grid.hex()[:16] / record.uid / name

    # ------------------------------------------------------------------ what is there
    def add(self, saved: Saved) -> Saved:
        """A file is whole."""
        with self._lock:
            self._saved[saved.name] = saved
        return saved

    def all(self) -> list[Saved]:
        """Everything, the oldest first."""
        with self._lock:
            return list(self._saved.values())

    def of(self, key: bytes) -> list[Saved]:
        """What there is of one expert, the newest first."""
        mine = [saved for saved in self.all() if saved.signed.body.key == key]
        return sorted(mine, key=lambda saved: rank(saved.signed.body), reverse=True)

    def find(self, digest: bytes) -> Saved | None:
        """A file with this hash."""
        return next((each for each in self.all() if each.signed.body.hash == digest), None)

    # ------------------------------------------------------------------ files
    def write(self, signed: Signed[SnapshotRecord], data: bytes) -> Saved:
        """Keep a file whose bytes are all there; `OSError` when the disk does not take it."""
        incoming = Incoming(self, signed)
        try:
            incoming.add(data)
            return incoming.finish()
        finally:
            incoming.drop()

    def read(self, saved: Saved, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end."""
        with saved.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def remove(self, saved: Saved) -> None:
        """Forget a file, its statement first."""
        with self._lock:
            self._saved.pop(saved.name, None)
        saved.path.with_suffix(STATEMENT).unlink(missing_ok=True)
        saved.path.unlink(missing_ok=True)

    def prune(self, key: bytes, keep: int) -> None:
        """Keep the newest files of one expert."""
        for saved in self.of(key)[keep:]:
            self.remove(saved)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of it; a disk that is nearly full takes a part and then none."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _make(folder: Path) -> None:
    """Make a folder and bring those that lead to it to the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in missing:
        _sync(each.parent)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
