"""A node's folder on disk: its key, the epoch of its last start, and a lock.

    key.pem   the identity, 0600, made at the first start
    epoch     the last epoch used, milliseconds since 1970, as text
    lock      held while a process uses the folder, so that two never share a key

The folder belongs to one process from `open_state` until that block ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from p2pmoe.errors import StateError
from p2pmoe.identity import KeyPair

KEY_FILE = "key.pem"
EPOCH_FILE = "epoch"
LOCK_FILE = "lock"


@dataclass(frozen=True, slots=True)
class State:
    """What a start found: the identity, its new epoch (ms), and whether this key ran before."""

    keys: KeyPair
    epoch: int
    ran_before: bool


@contextmanager
def open_state(folder: Path, now_ms: int) -> Iterator[State]:
    """Take the folder, making it and its key where they are missing; blocking disk I/O.

    The epoch is `now_ms`, or one more than the last one should the clock have gone back. Raises
    `StateError` when the folder cannot be made or another process holds it, `KeyFileError` when
    its key is not a key.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"cannot use the state folder {folder}: {error.strerror}") from None
    try:
        _lock(lock, folder)
        keys = load_or_create_key(folder / KEY_FILE)
        last = _last_epoch(folder)
        epoch = max(now_ms, last + 1)
        _save_epoch(folder, epoch)
        yield State(keys, epoch, ran_before=last > 0)
    finally:
        os.close(lock)


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
    fresh = folder / (EPOCH_FILE + ".new")
    try:
        fresh.write_text(f"{epoch}\n")
        fresh.replace(folder / EPOCH_FILE)
    except OSError as error:
        raise StateError(f"cannot write {folder / EPOCH_FILE}: {error.strerror}") from None
