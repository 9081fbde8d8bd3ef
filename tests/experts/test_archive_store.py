"""A file is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from p2pmoe.errors import SnapshotRefused
from p2pmoe.experts import archive_store
from p2pmoe.experts.archive_store import Folder, Incoming
from tests.experts.saved import NETWORK, file_of, statement

OLD, NEW = file_of(1), file_of(2)
KEY = statement(OLD).body.key


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def again(root: Path) -> Folder:
    """The folder as the next process finds it."""
    folder = Folder(root, NETWORK)
    folder.load()
    return folder


def test_what_was_written_is_found_by_the_next_process(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NETWORK)
    for packed in (NEW, OLD):
        folder.write(statement(packed), packed.data)
    for each in (folder, again(tmp_path)):
        newest, oldest = each.of(KEY)
        assert (newest.signed, oldest.signed) == (statement(NEW), statement(OLD))
        assert each.read(newest, 0, 10**6) == NEW.data
        assert each.read(newest, 10, 20) == NEW.data[10:30]
        assert each.find(OLD.hash) == oldest
        assert each.find(bytes(32)) is None
    place = "0001020304050607/ffn.0.0"
    assert files(tmp_path) == [
        f"{place}/{packed.step}-{packed.hash.hex()[:8]}.{end}"
        for packed in (OLD, NEW)
        for end in ("json", "safetensors")
    ]


def test_the_newest_are_kept_and_others_go(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NETWORK)
    folder.write(statement(OLD, uid="ffn.0.1"), OLD.data)
    for packed in (OLD, NEW):
        folder.write(statement(packed), packed.data)
    folder.prune(KEY, 1)
    assert [saved.signed.body.step for saved in folder.of(KEY)] == [2]
    assert len(again(tmp_path).all()) == 2


def test_a_later_statement_about_the_same_file_takes_the_place_of_the_first(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NETWORK)
    for lease in (1, 2):
        folder.write(statement(OLD, lease=lease), OLD.data)
    (saved,) = again(tmp_path).of(KEY)
    assert saved.signed.body.lease == 2


class Lost(BaseException):
    """The machine loses power."""


@pytest.mark.parametrize("fails", [Lost(), OSError(errno.ENOSPC, "No space left on device")])
def test_whatever_step_fails_the_old_file_stays_and_no_half_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: BaseException
) -> None:
    Folder(tmp_path, NETWORK).write(statement(OLD), OLD.data)
    steps, taken = 0, [0]

    def step(real: object) -> object:
        def work(*args: object) -> object:
            taken[0] += 1
            if taken[0] == steps:
                raise fails
            return real(*args)  # type: ignore[operator]  # what it stands for

        return work

    for module, name in ((archive_store, "_write"), (os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(module, name, step(getattr(module, name)))
    outcomes = []
    while True:
        steps, taken[0] = steps + 1, 0
        folder = Folder(tmp_path, NETWORK)
        folder.load()
        try:
            folder.write(statement(NEW), NEW.data)
        except type(fails):
            found = again(tmp_path)
            assert found.read(found.of(KEY)[-1], 0, 10**6) == OLD.data
            assert all(found.read(one, 0, 10**6) in {OLD.data, NEW.data} for one in found.all())
            assert [name for name in files(tmp_path) if name.endswith(".new")] == []
            outcomes.append(len(found.all()))
            found.prune(KEY, 2)
            for saved in found.of(KEY)[:-1]:
                found.remove(saved)
        else:
            break
    assert len(outcomes) == 8  # write, sync, rename and sync of the folder, twice
    assert outcomes[:-1] == [1] * 7


def test_a_disk_that_takes_only_a_part_is_asked_again_for_the_rest(tmp_path: Path) -> None:
    written: list[bytes] = []

    class Slow:
        def write(self, data: memoryview) -> int:
            written.append(bytes(data[:7]))
            return len(written[-1])

    archive_store._write(Slow(), OLD.data)  # type: ignore[arg-type]  # as much of a file as it needs
    assert b"".join(written) == OLD.data


def test_an_upload_takes_no_more_and_nothing_else_than_was_signed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NETWORK)
    incoming = Incoming(folder, statement(OLD))
    incoming.add(OLD.data)
    with pytest.raises(SnapshotRefused, match="size"):
        incoming.add(b"more")
    incoming.drop()
    other = Incoming(folder, statement(OLD))
    other.add(NEW.data[: len(OLD.data)])
    with pytest.raises(SnapshotRefused, match="hash"):
        other.finish()
    other.drop()
    assert files(tmp_path) == []
    assert folder.all() == []


def test_half_done_and_orphaned_files_are_removed_at_the_start(tmp_path: Path) -> None:
    saved = Folder(tmp_path, NETWORK).write(statement(OLD), OLD.data)
    incoming = Incoming(Folder(tmp_path, NETWORK), statement(NEW))
    incoming.add(NEW.data[:10])
    (saved.path.parent / "9-00000000.safetensors").write_bytes(b"no statement")
    assert [each.path for each in again(tmp_path).all()] == [saved.path]
    assert len(files(tmp_path)) == 2
    incoming.drop()


@pytest.mark.parametrize("text", [b"", b"{}", b'{"expert":"ffn.0.0","step":1,"record":"AAAA"}'])
def test_a_statement_that_cannot_be_read_is_passed_over_with_a_warning(
    tmp_path: Path, text: bytes
) -> None:
    folder = Folder(tmp_path, NETWORK)
    for packed in (OLD, NEW):
        newest = folder.write(statement(packed), packed.data)
    newest.path.with_suffix(".json").write_bytes(text)
    with capture_logs() as events:
        found = again(tmp_path)
    assert [each.signed.body.step for each in found.all()] == [1]
    (event,) = events
    assert event["event"] == "expert.snapshot.unreadable"
    assert event["log_level"] == "warning"
    assert "older" in event["advice"]


def test_a_statement_about_another_file_is_passed_over(tmp_path: Path) -> None:
    saved = Folder(tmp_path, NETWORK).write(statement(OLD), OLD.data)
    saved.path.with_suffix(".json").rename(saved.path.with_name("7-00000000.json"))
    with capture_logs() as events:
        assert again(tmp_path).all() == []
    assert len(events) == 1
