"""The demo itself, short: real processes, one of them killed, and figures that say it learns.

It takes most of a minute, so `nox -s soak` runs it, and CI by name.
"""

from __future__ import annotations

import json

import pytest

from tests.scenarios.conftest import Launcher

STEPS = 40  # enough to see that it learns


@pytest.mark.soak
def test_a_short_demo_learns_and_survives_the_loss_of_a_server(launch: Launcher) -> None:
    demo = launch.start("demo", "--steps", str(STEPS), "--servers", "3", "--json")
    out, _ = demo.popen.communicate(timeout=180)
    assert demo.popen.returncode == 0, demo.log.read_text()
    (line,) = out.splitlines()
    found = json.loads(line)
    assert found["peers"] == 3
    assert found["experts"] == 32
    assert found["killed"] == 1
    assert found["steps"] == STEPS
    assert found["failed_steps"] == 0
    assert found["rows_without_survivors"] <= 0.02
    assert found["experts_per_row_after"] >= 0.9 * found["experts_per_row_before"]
    assert found["fewest_updates"] > 0
    assert found["accuracy_without_experts"] < 0.2
    assert found["accuracy"] > 0.8 > found["accuracy_frozen_experts"]
    assert abs(found["accuracy"] - found["accuracy_local"]) < 0.1
