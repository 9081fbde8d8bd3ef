"""The state folder: one process, one key, epochs that only rise."""

from pathlib import Path

import pytest

from p2pmoe.errors import KeyFileError, StateError
from p2pmoe.state import open_state


def test_the_first_start_makes_a_key_that_only_its_owner_may_read(tmp_path: Path) -> None:
    with open_state(tmp_path / "deep" / "home", now_ms=1000) as state:
        assert not state.ran_before
        assert state.epoch == 1000
    key = tmp_path / "deep" / "home" / "key.pem"
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_restart_finds_the_same_key_and_a_later_epoch(tmp_path: Path) -> None:
    with open_state(tmp_path, now_ms=1000) as first:
        pass
    with open_state(tmp_path, now_ms=900) as second:
        assert second.keys.peer_id == first.keys.peer_id
        assert second.ran_before
        assert second.epoch == 1001


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        open_state(tmp_path, now_ms=1),
        pytest.raises(StateError, match="in use by another process"),
        open_state(tmp_path, now_ms=2),
    ):
        raise AssertionError("both hold it")
    with open_state(tmp_path, now_ms=3):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot use the state folder"):
        open_state(tmp_path / "file" / "home", now_ms=1).__enter__()


def test_a_key_file_that_is_not_a_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("hello")
    with pytest.raises(KeyFileError, match="is not a key"):
        open_state(tmp_path, now_ms=1).__enter__()


@pytest.mark.parametrize("content", [b"soon", b"\xff\xfe"])
def test_an_epoch_that_is_no_number_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "epoch").write_bytes(content)
    with pytest.raises(StateError, match="epoch"):
        open_state(tmp_path, now_ms=1).__enter__()
