"""`p2pmoe simulate`: one seed one answer, JSON, charts, settings, and wrong calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.cli import app, simulate
from p2pmoe.cli.simulate import SIMULATIONS, load_simulation

GOSSIP = ["simulate", "gossip", "--nodes", "12", "--seconds", "15s", "--json"]


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert app.run([*GOSSIP, *words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def test_a_death_is_timed_and_the_same_seed_gives_the_same_answer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chart = tmp_path / "deaths.svg"
    words = ("--runs", "2", "--silent", "1", "--plot", str(chart))
    first = answer(capsys, *words)
    assert first == answer(capsys, *words)
    assert 0 < first["killed_median"] <= first["killed_most"]
    assert first["silent_median"] > 0
    assert [row["seed"] for row in first["rows"]] == [1, 2]
    assert chart.read_text().startswith("<svg")


def test_a_rumour_is_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chart = tmp_path / "rumour.svg"
    found = answer(capsys, "--spread", "--seed", "5", "--plot", str(chart))
    (row,) = found["rows"]
    assert row["seed"] == 5
    assert 0 < row["t50"] <= row["t99"] <= row["t100"] < 5
    assert chart.read_text().startswith("<svg")


def test_what_never_happened_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--seconds", "0.5s", "--silent", "1")
    assert found["silent_most"] is None


def test_by_default_people_get_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(GOSSIP[:-1]) == 0
    assert "killed median" in capsys.readouterr().out


def test_options_may_come_from_a_file_or_the_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[simulate]\nseed = 11\n")
    monkeypatch.setenv("P2PMOE_RUNS", "2")
    words = [GOSSIP[0], "--config", str(file), *GOSSIP[1:]]
    assert app.run(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["seed"] for row in rows] == [11, 12]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["simulate"], "Missing command"),
        (["simulate", "gosip"], "there is gossip"),
        (["simulate", "weather"], "gossip"),
        (["simulate", "gossip", "--nods", "3"], "--nodes"),
        (["simulate", "gossip", "--rtt", "soon"], "300ms"),
        (["simulate", "gossip", "--nodes", "3", "--crash", "2", "--silent", "1"], "live on"),
        (["simulate", "gossip", "--crash", "0", "--plot", "x.svg"], "--plot shows deaths"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert hint in said


def test_a_chart_that_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*GOSSIP, "--plot", "/nowhere/at/all.svg"]) == 78
    assert "/nowhere/at/all.svg" in capsys.readouterr().err


@pytest.mark.parametrize("name", SIMULATIONS)
def test_every_simulation_of_the_table_says_what_it_and_its_options_are(name: str) -> None:
    simulation = load_simulation(name)
    assert simulation.name == name
    assert simulation.help
    assert all(getattr(option, "help", None) for option in simulation.params)


def test_on_a_terminal_there_is_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate.sys.stderr, "isatty", lambda: True)
    with simulate.open_progress("12 members") as progress:
        progress(1.0)
    assert "12 members" in capsys.readouterr().err
