"""`drain`: whom it asks to leave, how it waits, and what its exit code says."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pmoe.cli import drain
from p2pmoe.cli.app import run
from p2pmoe.state import hold_folder, leaving, open_state, running, tell_leaving

Kill = Callable[[int, int], None]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The signals that were sent; nobody gets them."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(drain.os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


def test_where_no_node_runs_it_says_so(
    tmp_path: Path, asked: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["drain", "--state-dir", str(tmp_path / "none")]) == 3
    with hold_folder(tmp_path):
        pass
    assert run(["drain", "--state-dir", str(tmp_path)]) == 3
    assert "--state-dir" in capsys.readouterr().err
    assert asked == []


def test_a_node_that_does_not_end_in_time_is_a_passing_failure(
    tmp_path: Path, asked: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_folder(tmp_path):
        assert run(["drain", "--state-dir", str(tmp_path), "--timeout", "0s"]) == 75
    assert asked == [(os.getpid(), signal.SIGTERM)]
    assert "has not ended" in capsys.readouterr().err


def test_it_waits_until_the_folder_is_free_and_tells_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = hold_folder(tmp_path)
    node.__enter__()
    left = iter([4, 2, 1])

    def go_on(_: float) -> None:
        """What happens while it sleeps."""
        count = next(left, None)
        if count is None:
            node.__exit__(None, None, None)
        else:
            tell_leaving(tmp_path, 4, count)

    monkeypatch.setattr(drain.os, "kill", lambda *_: None)
    monkeypatch.setattr(drain.time, "sleep", go_on)
    assert run(["drain", "--state-dir", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pid"], told["experts"]) == (os.getpid(), 4)
    assert running(tmp_path) is None


def test_people_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = hold_folder(tmp_path)
    node.__enter__()

    def end(*_: int) -> None:
        node.__exit__(None, None, None)
        raise ProcessLookupError

    monkeypatch.setattr(drain.os, "kill", end)
    assert run(["drain", "--state-dir", str(tmp_path)]) == 0
    assert "the node has left" in capsys.readouterr().out


def test_a_node_of_somebody_else_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(drain.os, "kill", refuse)
    with hold_folder(tmp_path):
        assert run(["drain", "--state-dir", str(tmp_path)]) == 3
    assert "another user" in capsys.readouterr().err


def test_a_folder_tells_who_uses_it_as_long_as_it_is_used(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    with open_state(tmp_path, 1):
        assert running(tmp_path) == os.getpid()
        tell_leaving(tmp_path, 3, 1)
        assert leaving(tmp_path) == (3, 1)
    assert running(tmp_path) is None
    assert leaving(tmp_path) is None
    (tmp_path / "leaving").write_text("nonsense")
    assert leaving(tmp_path) is None
    with open_state(tmp_path, 2):
        assert leaving(tmp_path) is None


def test_a_lock_without_a_pid_names_nobody(tmp_path: Path) -> None:
    with hold_folder(tmp_path):
        (tmp_path / "lock").write_text("")
        assert running(tmp_path) is None
