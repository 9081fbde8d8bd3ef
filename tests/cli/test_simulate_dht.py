"""`p2pmoe simulate dht`: tables, JSON, charts, and wrong calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pmoe.cli import app
from p2pmoe.cli.simulate_dht import latency_of

DHT = ["simulate", "dht", "--nodes", "24", "--experts", "16", "--searches", "2", "--gets", "5"]


def test_searches_and_gets_come_as_one_json_object_with_a_chart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chart = tmp_path / "dht.svg"
    words = ["--half-life", "5m", "--adversaries", "25%", "--dead", "10%", "--json", "--plot"]
    assert app.run([*DHT, *words, str(chart)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["connections"] for row in found["rows"]] == ["up", "cold"]
    assert found["rows"][0]["mean_ms"] < found["rows"][1]["mean_ms"]
    assert found["adversaries_gets"] == found["churn_gets"] == 5
    assert chart.read_text().startswith("<svg")


@pytest.mark.parametrize("kind", ["churn", "churn-time", "churn-hops"])
def test_a_chart_of_churn_shows_gets_by_half_life(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    chart = tmp_path / "churn.svg"
    words = ["--half-life", "10m", "--chart", kind, "--json", "--plot", str(chart)]
    assert app.run([*DHT, *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["half_life"] for row in rows] == [50.0, 150.0, 600.0]
    assert "half-life" in chart.read_text()


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(DHT) == 0
    assert "cold" in capsys.readouterr().out


@pytest.mark.parametrize("share", ["110%", "-1", "many"])
def test_a_share_is_less_than_all(capsys: pytest.CaptureFixture[str], share: str) -> None:
    assert app.run([*DHT, f"--dead={share}"]) == 2
    assert "share" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["exponential", "lognormal", "regions", "constant"])
def test_every_latency_has_the_mean_that_was_asked_for(kind: str) -> None:
    import random

    model, dice = latency_of(kind, 0.05), random.Random(1)
    delays = [model.one_way(a % 3, b % 3, dice) for a in range(60) for b in range(60)]
    assert sum(delays) / len(delays) == pytest.approx(0.025, rel=0.05)
