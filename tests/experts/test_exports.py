"""Exports: written whole, checked whole, taken in only where nothing newer is lost."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pmoe.cli.app import run
from p2pmoe.dht.messages import Manifest, SnapshotRecord
from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.exports import (
    ExportedExpert,
    ExportedGrid,
    ExportManifest,
    Import,
    checked,
    read_manifest,
    write_manifest,
)
from p2pmoe.experts.grids_kept import (
    GRID_FILE,
    grid_file,
    keep_grid,
    kept_grid,
    kept_grids,
    last_grids,
)
from p2pmoe.identity import KeyPair, network_id, open_network_seed
from p2pmoe.state import hold_folder
from p2pmoe.wire.envelope import Kind, Signed, seal
from tests.dht.swarm_of_ids import manifest as some_manifest

ANN = KeyPair.from_seed(bytes([1]) * 32)
NETWORK = network_id(KeyPair.from_seed(open_network_seed("p2pmoe")).public_key)
BODY: Manifest = some_manifest(ANN).body


def sealed(body: Manifest = BODY) -> Signed[Manifest]:
    return seal(ANN, body, kind=Kind.MANIFEST, network=NETWORK)


def save(folder: Folder, grid: bytes, uid: str, data: bytes, **facts: int) -> SnapshotRecord:
    body = SnapshotRecord(
        grid=grid,
        uid=uid,
        lease=facts.get("lease", 1),
        step=facts.get("step", 3),
        saved_ms=1,
        hash=hashlib.sha256(data).digest(),
        bytes=len(data),
    )
    folder.write(seal(ANN, body, kind=Kind.SNAPSHOT, network=NETWORK), data)
    return body


@dataclass
class Exported:
    """An export of two experts in a folder, and the state folder that is to take it in."""

    source: Path
    target: Path
    grid: bytes

    def check(self) -> Import:
        *uids, taken = checked(self.source, self.target / "snapshots", NETWORK)
        assert uids == ["ffn.0.1", "ffn.1.0"]
        assert isinstance(taken, Import)
        return taken

    def path(self, name: str) -> Path:
        return next(self.source.rglob(name))

    def wrong(self) -> str:
        """Why it is refused; nothing was taken in."""
        with pytest.raises(ConfigurationError) as caught:
            list(checked(self.source, self.target / "snapshots", NETWORK))
        assert run(["import", str(self.source), "--state-dir", str(self.target)]) == 78
        assert not list(self.target.rglob("*.safetensors"))
        return str(caught.value)

    def here(self) -> Folder:
        folder = Folder(self.target / "snapshots", NETWORK)
        folder.load()
        return folder


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    source, grid = tmp_path / "export", sealed()
    folder = Folder(source, NETWORK)
    bodies = [
        save(folder, grid.digest, uid, data)
        for uid, data in (("ffn.0.1", b"first"), ("ffn.1.0", b"second" * 300_000))
    ]
    keep_grid(source, grid)
    experts = tuple(
        ExportedExpert(
            uid=body.uid,
            grid=body.grid.hex(),
            step=body.step,
            lease=body.lease,
            saved_ms=body.saved_ms,
            sha256=body.hash.hex(),
            bytes=body.bytes,
            signer=ANN.peer_id.hex,
        )
        for body in bodies
    )
    grids = (ExportedGrid(name="ffn", grid=grid.digest.hex(), cells=(4, 4)),)
    write_manifest(
        source, ExportManifest(network=NETWORK.hex(), created_ms=5, grids=grids, experts=experts)
    )
    return Exported(source, tmp_path / "state", grid.digest)


# ------------------------------------------------------------------------------------- taken in
def test_an_export_becomes_what_the_node_saved_last(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(exported.source), "--state-dir", str(exported.target)]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"state_dir": str(exported.target), "experts": ["ffn.0.1", "ffn.1.0"]}
    files = {saved.signed.body.uid: saved.path.read_bytes() for saved in exported.here().all()}
    assert files == {"ffn.0.1": b"first", "ffn.1.0": b"second" * 300_000}
    root = exported.target / "snapshots"
    assert kept_grid(root, NETWORK, sealed().body) == sealed()
    assert run(words) == 0  # once more changes nothing
    assert "2 experts" in capsys.readouterr().out
    assert len(exported.here().all()) == 2


def test_what_was_saved_later_stays_unless_it_is_told_to_go(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    save(exported.here(), exported.grid, "ffn.1.0", b"newer", step=4)
    save(exported.here(), exported.grid, "ffn.0.1", b"older", step=2)
    words = ["import", str(exported.source), "--state-dir", str(exported.target)]
    assert run(words) == 78
    assert "1 experts were saved later here (ffn.1.0)" in capsys.readouterr().err
    assert len(exported.here().all()) == 2
    assert run([*words, "--force"]) == 0
    steps = sorted((s.signed.body.uid, s.signed.body.step) for s in exported.here().all())
    assert steps == [("ffn.0.1", 2), ("ffn.0.1", 3), ("ffn.1.0", 3)]


def test_a_node_that_runs_takes_nothing_in(exported: Exported) -> None:
    with hold_folder(exported.target):
        words = ["import", str(exported.source), "--state-dir", str(exported.target)]
        assert run(words) == 73
    assert not (exported.target / "snapshots").exists()


# -------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("name", ["*.safetensors", "*.json", GRID_FILE])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_whatever_is_damaged_nothing_is_taken_in(
    exported: Exported, name: str, damage: str
) -> None:
    path = max(exported.source.rglob(f"*/{name}"))
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert path.name in exported.wrong()


def change(exported: Exported, **changes: object) -> None:
    path = exported.source / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_that_is_no_export_is_refused(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no export"):
        read_manifest(tmp_path / "empty")
    (exported.source / "manifest.json").write_text("{")
    assert "manifest.json" in exported.wrong()


def test_an_export_of_another_network_is_refused(exported: Exported) -> None:
    change(exported, network="ab" * 32)
    assert "--network" in exported.wrong()


def test_a_manifest_that_names_other_things_than_lie_there_is_refused(exported: Exported) -> None:
    document = json.loads((exported.source / "manifest.json").read_text())
    first, second = document["experts"]
    change(exported, experts=[first | {"step": 2}, second])
    exported.wrong()
    change(exported, experts=[first | {"uid": "../../x"}, second])
    assert "no expert" in exported.wrong()
    change(exported, experts=[first, second], grids=[])
    exported.wrong()
    change(exported, grids=[document["grids"][0] | {"name": "other"}])
    assert "is not the grid" in exported.wrong()


def test_a_statement_about_another_expert_is_refused(exported: Exported) -> None:
    one, two = sorted(exported.source.rglob("*/*/*.json"))
    one.write_bytes(two.read_bytes())
    assert "something else" in exported.wrong()


# ---------------------------------------------------------------------------------- kept grids
def test_a_grid_goes_on_whenever_its_manifest_was_made(tmp_path: Path) -> None:
    first = sealed()
    keep_grid(tmp_path, first)
    again = Manifest(**{n: getattr(BODY, n) for n in BODY.__struct_fields__} | {"created_ms": 99})
    assert kept_grid(tmp_path, NETWORK, again) == first
    other = Manifest(**{n: getattr(BODY, n) for n in BODY.__struct_fields__} | {"hidden_dim": 9})
    assert kept_grid(tmp_path, NETWORK, other) is None
    assert kept_grid(tmp_path, bytes(32), again) is None


def test_the_grids_of_the_last_run_are_those_that_were_touched_with_the_latest(
    tmp_path: Path,
) -> None:
    assert last_grids(tmp_path, NETWORK) == []
    other = Manifest(**{n: getattr(BODY, n) for n in BODY.__struct_fields__} | {"name": "zoo"})
    both = sealed(), sealed(other)
    for manifest in both:
        keep_grid(tmp_path, manifest)
    assert {one.digest for one in last_grids(tmp_path, NETWORK)} == {one.digest for one in both}
    os.utime(grid_file(tmp_path, both[1].digest), (1.0, 1.0))
    assert last_grids(tmp_path, NETWORK) == [both[0]]


def test_what_is_no_manifest_is_passed_over(tmp_path: Path) -> None:
    keep_grid(tmp_path, sealed())
    keep_grid(tmp_path, sealed())
    path = grid_file(tmp_path, sealed().digest)
    foreign = tmp_path / "0123456789abcdef" / GRID_FILE
    foreign.parent.mkdir()
    foreign.write_bytes(path.read_bytes())
    assert kept_grids(tmp_path, NETWORK) == [sealed()]
    path.write_bytes(b"")
    assert kept_grids(tmp_path, NETWORK) == []
