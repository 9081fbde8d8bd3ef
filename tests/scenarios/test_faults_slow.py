"""One expert of four servers sleeps for 5 s whenever it is asked: what that costs the others."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.experts.messages import FORWARD
from p2pmoe.moe.params import GRACE
from tests.scenarios import conftest
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.faults import HIDDEN, Trainer, figures, say, wait_until
from tests.scenarios.observer import patience
from tests.scenarios.slow_expert import NAPS, SLEEP

pytestmark = pytest.mark.soak
CELLS, SERVERS = 16, 4
SECONDS = 60.0  # of training, once the expert is known to be slow
REST = 0.02  # seconds after each step
DROPPED = 'p2pmoe_parts_dropped_total{{when="{}"}}'
OPTIONS = ("--experts", str(CELLS // SERVERS))


@pytest.fixture(autouse=True)
def _servers_may_start_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "START_LIMIT", patience(60))


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def servers_of(launch: Launcher, naps: Path) -> list[Process]:
    """The first of them has the expert that sleeps."""
    kind = ("--expert-class", "tests.scenarios.slow_expert:Sleepy")
    grid = ("--new-swarm", "--grid", "ffn.[0:4].[0:4]", "--hidden-dim", str(HIDDEN), *kind)
    asleep = ("env", f"{NAPS}={naps}", f"PYTHONPATH={os.getcwd()}")  # noqa: PTH109  a path of words
    awake = asleep[:1] + asleep[2:]
    first = launch.node(*grid, *OPTIONS, prefix=asleep).wait_ready()
    join = ("--peer", first.address, *OPTIONS, *kind)
    rest = [launch.node(*join, prefix=awake) for _ in range(SERVERS - 1)]
    return [first, *(process.wait_ready() for process in rest)]


def status(launch: Launcher, server: Process) -> dict[str, Any]:
    said = launch.run("status", "--peer", server.address, "--over", "0s", "--json")
    assert not said.returncode, said.stderr
    return json.loads(said.stdout)


def test_one_expert_that_sleeps_slows_steps_until_it_is_known_and_never_its_neighbours(
    launch: Launcher, tmp_path: Path
) -> None:
    naps = tmp_path / "naps"
    naps.touch()
    slow, *_ = servers_of(launch, naps)
    with Trainer([slow.address], experts=CELLS, rest=REST) as trainer:
        trainer.wait_begun()
        known = wait_until(lambda: doubted(trainer) > 0, patience(60), "nobody is known to be slow")
        known_at = time.monotonic()
        pause(SECONDS)
        seen = figures(trainer.since(known_at))
        median = trainer.layer.waits[FORWARD].median
        told = status(launch, slow)
        ended_at = time.monotonic()
    most = GRACE + median + 2 * seen.p50
    say(f"known after {known:.1f} s; then {seen}; at most {most * 1e3:.0f} ms")
    mine = {str(uid) for uid in slow.ready["experts"]}  # type: ignore[attr-defined]  from JSON
    served = {uid for uid in mine if trainer.learned.get(uid, [(0.0, 0)])[-1][0] > ended_at - 10}
    queued, computed = (told["figures"][DROPPED.format(when)] for when in ("queued", "computed"))
    taken = len(naps.read_text())
    say(f"{taken} naps of {SLEEP:g} s; of cancelled parts {queued} never begun, {computed} run")
    say(f"of its server's {len(mine)} experts {len(served)} answer as ever")
    assert not figures(trainer.steps).failed
    assert seen.p99 <= most
    assert taken <= computed
    assert queued > 0
    assert len(served) == len(mine) - 1


def doubted(trainer: Trainer) -> int:
    """How many experts the trainer asks last."""
    assert trainer.swarm is not None
    return int(trainer.swarm.stats()["mixture.ffn"]["experts"]["doubted"])  # type: ignore[index]  a section
