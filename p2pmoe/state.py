"""A node's folder on disk: its key, the epoch of its last start, and a lock.

    key.pem   the identity, 0600, made at the first start
    epoch     the last epoch used, milliseconds since 1970, as text
    peers     the live members that it knew last, a line each: when (ms since 1970), and the record
    leaving   while it leaves: how many experts it had, and how many it has
    lock      held while a process uses the folder, so that two never share a key; its pid as text

The folder belongs to one process from `open_state` until that block ends.
"""

from __future__ import annotations

import base64
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from p2pmoe import telemetry
from p2pmoe.errors import StateError
from p2pmoe.identity import KeyPair

KEY_FILE = "key.pem"
EPOCH_FILE = "epoch"
PEERS_FILE = "peers"
LOCK_FILE = "lock"
LEAVING_FILE = "leaving"
MOST_PEERS = 256  # that are remembered: 220 KB at most; a guess
MOST_LINE_BYTES = 1024  # of one; a record of 600 bytes takes 800, and the time 14


@dataclass(frozen=True, slots=True)
class State:
    """What a start found: the identity, its new epoch (ms), and whether this key ran before.

    `peers` are sealed records, not yet verified, of members that were alive at its last run.
    """

    keys: KeyPair
    epoch: int
    ran_before: bool
    folder: Path | None = None
    peers: tuple[bytes, ...] = ()

    def remember(self, peers: Sequence[bytes], now_ms: int) -> None:
        """Write down the first of these records; blocking. Without a folder, nothing happens."""
        if self.folder is None:
            return
        lines = [f"{now_ms} {base64.b64encode(raw).decode()}\n" for raw in peers[:MOST_PEERS]]
        try:
            _replace(self.folder / PEERS_FILE, "".join(lines))
        except OSError as error:
            telemetry.emit(
                "state.peers.unwritten",
                level="warning",
                error=error.strerror,
                advice="free some space, or a restart will need --peer",
            )


@contextmanager
def open_state(folder: Path, now_ms: int) -> Iterator[State]:
    """Take the folder, making it and its key where they are missing; blocking disk I/O.

    The epoch is `now_ms`, or one more than the last one should the clock have gone back. Raises
    `StateError` when the folder cannot be made or another process holds it, `KeyFileError` when
    its key is not a key.
    """
    with hold_folder(folder):
        keys = load_or_create_key(folder / KEY_FILE)
        last = _last_epoch(folder)
        epoch = max(now_ms, last + 1)
        _save_epoch(folder, epoch)
        (folder / LEAVING_FILE).unlink(missing_ok=True)  # of a run that was killed
        yield State(keys, epoch, last > 0, folder, _last_peers(folder))
        (folder / LEAVING_FILE).unlink(missing_ok=True)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Use the folder alone, making it where it is missing; `StateError` when another one does."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"cannot use the state folder {folder}: {error.strerror}") from None
    try:
        _lock(lock, folder)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(lock)


def running(folder: Path) -> int | None:
    """The pid of the process that uses the folder now, None when none does."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.read(lock, 32).decode(errors="replace").strip()
        return int(text) if text.isdecimal() and int(text) > 0 else None
    finally:
        os.close(lock)
    return None


def tell_leaving(folder: Path, had: int, left: int) -> None:
    """Write down for whoever watches how far the node has left; blocking, a few bytes."""
    with suppress(OSError):  # nobody depends on it
        _replace(folder / LEAVING_FILE, f"{had} {left}\n")


def leaving(folder: Path) -> tuple[int, int] | None:
    """How many experts a node that leaves had and has, None when nothing is said."""
    try:
        had, left = map(int, (folder / LEAVING_FILE).read_text().split())
    except (OSError, ValueError):
        return None
    return had, left


def load_or_create_key(path: Path) -> KeyPair:
    """The key in this file, or a new one saved there; `KeyFileError` when it is not a key."""
    if path.exists():
        return KeyPair.load(path)
    keys = KeyPair.generate()
    keys.save(path)
    return keys


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StateError(
            f"the state folder {folder} is in use by another process:"
            " stop it, or give this one its own --state-dir"
        ) from None


def _last_epoch(folder: Path) -> int:
    try:
        text = (folder / EPOCH_FILE).read_text()
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise StateError(f"cannot read {folder / EPOCH_FILE}: {error}") from None
    if not text.strip().isdecimal():
        raise StateError(f"{folder / EPOCH_FILE} does not hold a number: delete it") from None
    return int(text)


def _save_epoch(folder: Path, epoch: int) -> None:
    try:
        _replace(folder / EPOCH_FILE, f"{epoch}\n")
    except OSError as error:
        raise StateError(f"cannot write {folder / EPOCH_FILE}: {error.strerror}") from None


def _replace(file: Path, content: str) -> None:
    """Write a file so that it has all of the content or the old one."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(content)
    fresh.replace(file)


def _last_peers(folder: Path) -> tuple[bytes, ...]:
    """The records of the last run. A file that is not right costs what it holds, not the start."""
    file = folder / PEERS_FILE
    try:
        with file.open("rb") as lines:
            read = [lines.readline(MOST_LINE_BYTES) for _ in range(MOST_PEERS)]
        return tuple(base64.b64decode(line.split()[1], validate=True) for line in read if line)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, IndexError) as error:
        advice = "it is ignored: give --peer if the swarm is not found"
        telemetry.emit(
            "state.peers.unreadable", level="warning", file=file, error=error, advice=advice
        )
        return ()
