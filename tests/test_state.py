"""The state folder: one process, one key, epochs that only rise."""

from pathlib import Path

import pytest

from p2pmoe.errors import KeyFileError, StateError
from p2pmoe.identity import KeyPair
from p2pmoe.state import MOST_PEERS, State, open_state


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


def test_peers_that_are_remembered_are_there_at_the_next_start(tmp_path: Path) -> None:
    with open_state(tmp_path, now_ms=1) as state:
        assert state.peers == ()
        state.remember([b"one", b"two"], now_ms=5)
        state.remember([bytes([n % 256]) * 600 for n in range(1000)], now_ms=6)
    with open_state(tmp_path, now_ms=2) as again:
        assert len(again.peers) == MOST_PEERS
        assert again.peers[3] == bytes([3]) * 600


def test_without_a_folder_nothing_is_remembered() -> None:
    State(KeyPair.generate(), 1, ran_before=False).remember([b"one"], now_ms=5)


@pytest.mark.parametrize("content", [b"soon", b"1 !!!!\n", b"\xff\xfe\n", b"1 " + b"A" * 5000])
def test_a_peers_file_that_is_not_right_is_ignored_with_a_warning(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers").write_bytes(content)
    with open_state(tmp_path, now_ms=1) as state:
        assert state.peers == ()
    assert "state.peers.unreadable" in capsys.readouterr().err


def test_a_peers_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_state(tmp_path, now_ms=1) as state:
        (tmp_path / "peers.new").mkdir()
        state.remember([b"one"], now_ms=5)
    assert "state.peers.unwritten" in capsys.readouterr().err
