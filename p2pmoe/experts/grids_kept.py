"""The manifests of grids that a server served, kept beside what it saved of them. Blocking.

    <grid, 16 hex digits>/grid.cbor   the sealed manifest, as it came

A grid is known by the hash of its manifest, so what was saved belongs to a swarm that begins again
only if that has the same manifest: whoever begins one looks here first.
"""

from __future__ import annotations

import os
from pathlib import Path

from p2pmoe import telemetry
from p2pmoe.dht.messages import Manifest
from p2pmoe.errors import MalformedMessage
from p2pmoe.wire.envelope import Kind, Signed, open_envelope
from p2pmoe.wire.schema import MAX_ENVELOPE_BYTES

GRID_FILE = "grid.cbor"
AT_ONE_START = 10.0  # seconds between the files of one start; a guess
MOST_GRIDS = 64  # that are read; a guess


def grid_file(root: Path, digest: bytes) -> Path:
    """Where the manifest with this hash is, or would be."""
    return root / digest.hex()[:16] / GRID_FILE


def keep_grid(root: Path, manifest: Signed[Manifest]) -> None:
    """Write a manifest down, whole or not at all; `OSError` when the disk does not take it."""
    path = grid_file(root, manifest.digest)
    if path.exists():
        path.touch()
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{GRID_FILE}.new")
    with fresh.open("wb") as file:
        file.write(manifest.raw)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def kept_grids(root: Path, network: bytes) -> list[Signed[Manifest]]:
    """The manifests that lie here, the last used first. What is no manifest is passed over."""
    paths = [(-path.stat().st_mtime, path) for path in root.glob(f"*/{GRID_FILE}")]
    found = []
    for _, path in sorted(paths)[:MOST_GRIDS]:
        try:
            found.append(read_grid_file(path, network))
        except (OSError, MalformedMessage) as error:
            telemetry.emit(
                "expert.grid.unreadable",
                level="warning",
                file=path,
                error=error,
                advice="what was saved of that grid is not used; remove it if it is foreign",
            )
    return found


def last_grids(root: Path, network: bytes) -> list[Signed[Manifest]]:
    """Those that were served when this server ran last: it wrote or touched all at its start."""
    kept = kept_grids(root, network)
    used = [grid_file(root, manifest.digest).stat().st_mtime for manifest in kept]
    latest = max(used, default=0.0)
    return [one for one, at in zip(kept, used, strict=True) if at >= latest - AT_ONE_START]


def read_grid_file(path: Path, network: bytes) -> Signed[Manifest]:
    """One of them; `OSError`, or `MalformedMessage` when it is not signed for this network."""
    with path.open("rb") as file:
        raw = file.read(MAX_ENVELOPE_BYTES + 1)
    manifest = open_envelope(raw, Manifest, kind=Kind.MANIFEST, network=network)
    if path != grid_file(path.parent.parent, manifest.digest):
        raise MalformedMessage("manifest.place", "it is of another grid")
    return manifest


def kept_grid(root: Path, network: bytes, like: Manifest) -> Signed[Manifest] | None:
    """The one that was used last of those that say the same as this one, whenever it was made."""
    for manifest in kept_grids(root, network):
        body = manifest.body
        if all(
            getattr(body, name) == getattr(like, name)
            for name in like.__struct_fields__
            if name != "created_ms"
        ):
            return manifest
    return None
