"""`node`: how its options are spelled, and which contradict each other."""

from __future__ import annotations

import os
from typing import Any

import pytest

from p2pmoe.cli import node
from p2pmoe.cli.app import run


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the options come to; the node itself is not run."""
    from p2pmoe.cli import serving

    found: dict[str, Any] = {}
    monkeypatch.setattr(serving, "run_node", found.update)
    monkeypatch.delenv("P2PMOE_HOME", raising=False)
    return found


def test_several_initial_peers_may_follow_one_option(given: dict[str, Any]) -> None:
    assert run(["node", "--initial_peers", "a:1", "b:2", "--peer", "c:3", "--experts", "2"]) == 0
    assert given["initial_peers"] == ("a:1", "b:2")
    assert given["peers"] == ("c:3",)
    assert given["experts"] == 2


def test_a_word_too_many_is_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--peer", "a:1", "b:2"]) == 2
    assert "b:2" in capsys.readouterr().err


def test_units_and_both_spellings_are_understood(given: dict[str, Any]) -> None:
    assert run(["node", "--new_swarm", "--stop_within", "250ms", "--seconds", "5m"]) == 0
    assert given["stop_within"] == 0.25
    assert given["seconds"] == 300.0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--new-swarm", "--peer", "a:1"], "--new-swarm begins"),
        (["--client-only", "--peer", "a:1", "--experts", "1"], "accepts connections"),
        (["--client-only"], "needs a --peer"),
        (["--peer", "a:1", "--experts", "1", "--expert", "ffn.1.1"], "any free cells"),
        (["--experts", "1"], "of which grid?"),
        (["--experts", "-1"], "--experts"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["node", *words]) == 2
    assert why in capsys.readouterr().err


def test_the_spelling_is_only_changed_after_its_option() -> None:
    context = node.command.make_context("node", ["--initial-peers", "a:1", "--peer", "b:2"])
    assert context.params["initial_peers"] == ("a:1",)
    assert context.params["peers"] == ("b:2",)


@pytest.mark.parametrize("said", [None, "ACTIVE"])
def test_torchs_idle_threads_sleep_in_a_server_unless_its_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    from p2pmoe.cli import serving

    monkeypatch.setenv("OMP_WAIT_POLICY", said or "")
    if said is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("sys.setswitchinterval", lambda _: None)
    monkeypatch.setattr("trio.run", lambda *_: None)
    monkeypatch.setattr("p2pmoe.telemetry.configure", lambda *_: None)
    serving.run_node({"log_level": "info", "log_format": "json"})
    assert os.environ["OMP_WAIT_POLICY"] == (said or "PASSIVE")
