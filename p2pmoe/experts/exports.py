"""A whole swarm's experts in one folder: what lies there, written last, and how it is taken in.

    manifest.json                                     what is there; without it there is nothing
    <grid, 16 hex digits>/grid.cbor                   the sealed manifest of a grid
    <grid, 16 hex digits>/<uid>/<step>-<hash>.*       as a server saves an expert

Blocking. Whoever takes an export in checks every signature and every hash again, and only then
touches the state folder of a node. What is newer there stays unless it is told to go.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from p2pmoe.errors import ConfigurationError, MalformedMessage, SnapshotRefused
from p2pmoe.experts.archive import MAX_STATEMENT_BYTES, rank, read_statement
from p2pmoe.experts.archive_store import FILE, STATEMENT, Folder, Incoming, Saved
from p2pmoe.experts.grids_kept import grid_file, keep_grid, read_grid_file

MANIFEST = "manifest.json"
PIECE = 1 << 20  # bytes that are copied at once
MOST_MANIFEST_BYTES = 64 << 20  # of an export's manifest: some 100,000 experts

Hex64 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class ExportedGrid(msgspec.Struct, frozen=True, kw_only=True):
    """A grid: `grid` is the SHA-256 of its sealed manifest."""

    name: str
    grid: Hex64
    cells: tuple[int, ...]


class ExportedExpert(msgspec.Struct, frozen=True, kw_only=True):
    """One expert's newest snapshot: the file, what it is, and who saved it when."""

    uid: str
    grid: Hex64
    step: int
    lease: int
    saved_ms: int
    sha256: Hex64
    bytes: int
    signer: str


class MissingExpert(msgspec.Struct, frozen=True, kw_only=True):
    """An expert that is not in the export, and why not."""

    uid: str
    why: str


class ExportManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an export has. `untrained` experts have the first weights, which need no file."""

    format: Literal["p2pmoe.export/1"] = "p2pmoe.export/1"
    network: Hex64
    created_ms: int
    grids: tuple[ExportedGrid, ...] = ()
    experts: tuple[ExportedExpert, ...] = ()
    untrained: tuple[str, ...] = ()
    missing: tuple[MissingExpert, ...] = ()


def write_manifest(folder: Path, manifest: ExportManifest) -> None:
    """Put the manifest of an export in its place, whole."""
    fresh = folder / f"{MANIFEST}.new"
    with fresh.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> ExportManifest:
    """What an export has; `ConfigurationError` when the folder is none."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return msgspec.json.decode(file.read(MOST_MANIFEST_BYTES), type=ExportManifest)
    except OSError as error:
        raise ConfigurationError(f"{folder} is no export: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{folder / MANIFEST}: {error}") from None


@dataclass(frozen=True, slots=True)
class Import:
    """An export that was checked, and the folder of saved experts that takes it in."""

    source: Path
    manifest: ExportManifest
    target: Path
    network: bytes

    def newer(self) -> list[str]:
        """The uids of which the target has something newer than the export."""
        here = self._folder()
        return [
            saved.signed.body.uid
            for saved in self._experts()
            if any(rank(one.signed.body) > rank(saved.signed.body) for one in _of(here, saved))
        ]

    def run(self) -> Iterator[str]:
        """Copy one expert after the other; what is newer in the target goes. Yields the uids."""
        here = self._folder()
        for grid in self.manifest.grids:
            path = grid_file(self.source, bytes.fromhex(grid.grid))
            keep_grid(self.target, read_grid_file(path, self.network))
        for saved in self._experts():
            body = saved.signed.body
            older = [one for one in _of(here, saved) if rank(one.signed.body) > rank(body)]
            if here.find(body.hash) is None:
                _copy(saved, here)
            for each in older:
                here.remove(each)
            yield body.uid

    def _folder(self) -> Folder:
        folder = Folder(self.target, self.network)
        folder.load()
        return folder

    def _experts(self) -> Iterator[Saved]:
        return (_exported(self.source, each, self.network) for each in self.manifest.experts)


def checked(source: Path, target: Path, network: bytes) -> Iterator[str | Import]:
    """Check a whole export: the uids as they are found right, and at last what may be imported.

    Raises `ConfigurationError` that names the first thing that is wrong.
    """
    manifest = read_manifest(source)
    if manifest.network != network.hex():
        raise ConfigurationError(
            f"{source} was exported from another network: name it by --network"
        )
    for grid in manifest.grids:
        path = grid_file(source, bytes.fromhex(grid.grid))
        try:
            found = read_grid_file(path, network)
        except (OSError, MalformedMessage) as error:
            raise ConfigurationError(f"{path}: {error}") from None
        if (found.digest.hex(), found.body.name) != (grid.grid, grid.name):
            raise ConfigurationError(f"{path} is not the grid that {MANIFEST} names")
    grids = {grid.grid for grid in manifest.grids}
    for each in manifest.experts:
        saved = _exported(source, each, network)
        if each.grid not in grids or _hash_of(saved.path) != saved.signed.body.hash:
            raise ConfigurationError(f"{saved.path} is damaged: export again")
        yield each.uid
    yield Import(source, manifest, target, network)


def _exported(source: Path, expert: ExportedExpert, network: bytes) -> Saved:
    """An expert of an export by its own signed statement, if that is what the manifest says."""
    name = f"{expert.step}-{expert.sha256[:8]}"
    if "/" in expert.uid or expert.uid.startswith("."):
        raise ConfigurationError(f"{source}: {expert.uid!r} is no expert")
    path = source / expert.grid[:16] / expert.uid / f"{name}{FILE}"
    try:
        with path.with_suffix(STATEMENT).open("rb") as file:
            signed = read_statement(file.read(MAX_STATEMENT_BYTES), network)
    except (OSError, SnapshotRefused) as error:
        raise ConfigurationError(f"{path.with_suffix(STATEMENT)}: {error}") from None
    body = signed.body
    said = body.uid, body.grid.hex(), body.step, body.hash.hex()
    if said != (expert.uid, expert.grid, expert.step, expert.sha256):
        raise ConfigurationError(f"{path}: its statement is about something else")
    return Saved(signed, path)


def _hash_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    return digest.digest()


def _of(folder: Folder, saved: Saved) -> list[Saved]:
    return folder.of(saved.signed.body.key)


def _copy(saved: Saved, here: Folder) -> None:
    incoming = Incoming(here, saved.signed)
    try:
        with saved.path.open("rb") as file:
            while piece := file.read(PIECE):
                incoming.add(piece)
        incoming.finish()
    finally:
        incoming.drop()
