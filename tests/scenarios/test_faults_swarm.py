"""What befalls a swarm: two that want one cell, all gone at once, and a server lost every 20 s."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest

from p2pmoe.state import PEERS_FILE
from tests.scenarios import conftest
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.faults import HIDDEN, K, Trainer, figures, say, wait_until
from tests.scenarios.observer import patience

pytestmark = pytest.mark.soak
GRID = "ffn.[0:2].[0:4]"
CELLS = 8
FIRST = ("--new-swarm", "--grid", GRID, "--hidden-dim", str(HIDDEN))
SERVED_AGAIN = 45.0  # seconds from a kill
SAVE_EVERY = 5.0  # seconds
SECONDS = float(os.environ.get("FAULT_SECONDS", "300"))  # that one is killed every KILL_EVERY
KILL_EVERY = 20.0
REST = 0.1  # seconds after each step: new servers have to start beside it
SERVERS = 8


@pytest.fixture(autouse=True)
def _servers_may_start_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "START_LIMIT", patience(90))


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


# ------------------------------------------------------------------ two for one cell
def test_of_servers_that_want_one_cell_one_gets_it(launch: Launcher) -> None:
    first = launch.node(*FIRST).wait_ready()
    rivals = [launch.node("--peer", first.address, "--expert", "ffn.1.3") for _ in range(4)]
    served = [process.wait_ready().ready["experts"] for process in rivals]
    say(f"four wanted ffn.1.3: {served}")
    owners = [process for process in rivals if process.ready["experts"]]
    assert len(owners) == 1
    with Trainer([first.address], experts=1) as trainer:
        trainer.wait_begun()
        owners[0].end(signal.SIGKILL)
        took = wait_until(
            lambda: len(trainer.accepted.times) > 1, patience(SERVED_AGAIN), "it is lost"
        )
        pause(10)
    say(f"its owner was killed: served again after {took:.1f} s")
    assert took <= patience(SERVED_AGAIN)
    assert len(trainer.accepted.times) == 2  # by one of the three that were left
    assert not trainer.accepted.twice_owned()


# ------------------------------------------------------------------ all at once
def test_a_swarm_that_was_killed_whole_goes_on_from_its_disks(launch: Launcher) -> None:
    """Those who held leases grant none for 30 s: they may have forgotten which ones."""
    half = ("--experts", str(CELLS // 2), "--save-every", "2s")
    first = launch.node(*FIRST, *half, home="one").wait_ready()
    second = launch.node("--peer", first.address, *half, home="two").wait_ready()
    with Trainer([first.address], experts=CELLS) as trainer:
        trainer.wait_begun()
        wait_until(
            lambda: sum(step > 1 for step in saved(launch).values()) == CELLS,
            patience(60),
            "not everything is saved",
        )
        homes = [launch.folder / home / "state" / PEERS_FILE for home in ("one", "two")]
        wait_until(lambda: all(home.exists() for home in homes), patience(60), "nobody is known")
        before = saved(launch)
        for process in (first, second):
            process.end(signal.SIGKILL)
        killed_at = time.monotonic()
    again = [
        launch.node("--listen", server.address, *half, home=home)
        for server, home in ((first, "one"), (second, "two"))
    ]
    for process, old in zip(again, (first, second), strict=True):
        process.wait_ready()
        assert process.ready["peer"] == old.ready["peer"]
    took = time.monotonic() - killed_at
    with Trainer([first.address], experts=CELLS) as after:
        after.wait_begun()
        pause(3)
    now = {uid: seen[0][1] for uid, seen in after.learned.items()}
    say(f"served again after {took:.1f} s; updates then, of those before: {compared(before, now)}")
    assert now.keys() >= before.keys()
    assert all(now[uid] >= step for uid, step in before.items())
    assert not figures(after.steps).failed


def saved(launch: Launcher) -> dict[str, int]:
    """How many updates each expert has had, by what lies on disk."""
    known: dict[str, int] = {}
    for path in launch.folder.rglob("snapshots/*/*/*.json"):
        uid, step = path.parent.name, int(path.stem.partition("-")[0])
        known[uid] = max(known.get(uid, 0), step)
    return known


def compared(before: dict[str, int], now: dict[str, int]) -> str:
    return ", ".join(f"{uid} {now.get(uid, 0)}/{step}" for uid, step in sorted(before.items()))


# ------------------------------------------------------------------ one every twenty seconds
class Village:
    """Eight servers with an expert each; the dead are followed by new ones with room for two."""

    def __init__(self, launch: Launcher) -> None:
        self.launch, self.dice = launch, random.Random(0)
        options = ("--save-every", f"{SAVE_EVERY:g}s")
        self.options = ("--experts", "2", *options)
        self.first = launch.node(*FIRST, "--experts", "1", *options).wait_ready()
        rest = [self._new("1") for _ in range(SERVERS - 1)]
        self.others = [process.wait_ready() for process in rest]

    def _new(self, experts: str) -> Process:
        room = ("--experts", experts, *self.options[2:])
        return self.launch.node("--peer", self.first.address, *room)

    def replace_one(self, owners: set[str]) -> Process:
        """Kill one of those that serve something, and begin another, which has room for two."""
        serving = [one for one in self.others if _peer(one) in owners] or self.others
        victim = self.dice.choice(serving)
        self.others.remove(victim)
        victim.end(signal.SIGKILL)
        self.others.append(self._new("2"))
        threading.Thread(target=_hear, args=(self.others[-1],), daemon=True).start()
        return victim


def test_training_goes_on_while_one_of_eight_servers_is_killed_every_20_s(
    launch: Launcher,
) -> None:
    village = Village(launch)
    lost: list[float] = []  # seconds for which an expert was served by nobody
    stale: list[float] = []  # seconds of training that a loss has undone
    with Trainer([village.first.address], experts=CELLS, rest=REST) as trainer:
        trainer.wait_begun()
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            killed_at = time.monotonic()
            owned = owners(trainer)
            victim = _peer(village.replace_one(set(owned.values())))
            gone = [uid for uid, peer in owned.items() if peer == victim]
            for uid in gone:
                wait_until(
                    lambda uid=uid, victim=victim: owners(trainer).get(uid) not in {None, victim},
                    patience(SERVED_AGAIN),
                    f"{uid} is not served again",
                )
                lost.append(time.monotonic() - killed_at)
                stale.append(undone(trainer.learned[uid], killed_at))
            pause(max(0.0, killed_at + KILL_EVERY - time.monotonic()))
    seen = figures(trainer.steps)
    tenth = len(trainer.steps) // 10
    losses = [
        statistics.fmean(step.loss for step in trainer.steps[part * tenth : (part + 1) * tenth])
        for part in range(10)
    ]
    say(f"{SECONDS:g} s: {seen}")
    say(f"loss by tenths: {' '.join(f'{loss:.3f}' for loss in losses)}")
    say(f"{len(lost)} experts lost, served again after {shown(lost)} s; undone {shown(stale)} s")
    say(f"errors: {Counter(seen.failed)}")
    assert not seen.failed
    assert not trainer.accepted.twice_owned()
    assert lost
    assert max(lost) <= patience(SERVED_AGAIN)
    assert max(stale) <= patience(SAVE_EVERY + 2)
    assert losses[-1] < losses[0]
    assert seen.experts > 0.9 * K


def _hear(process: Process) -> None:
    """Wait until it says who it is, if it lives so long."""
    with suppress(AssertionError):
        process.wait_ready()


def _peer(process: Process) -> str:
    """The id of a process, once it has said it."""
    return str(process.ready.get("peer", ""))


def owners(trainer: Trainer) -> dict[str, str]:
    """Who answered last for each expert."""
    latest: dict[str, tuple[float, str]] = {}
    for (uid, _, peer), (_, at) in list(trainer.accepted.times.items()):
        latest[uid] = max(latest.get(uid, (0.0, "")), (at, peer))
    return {uid: peer for uid, (_, peer) in latest.items()}


def undone(seen: list[tuple[float, int]], killed_at: float) -> float:
    """How old the weights were that an expert came back with, in seconds before the kill."""
    came_back = next((step for at, step in seen if at > killed_at + 1), 0)
    older = [at for at, step in seen if at <= killed_at and step <= came_back]
    return killed_at - max(older) if older else killed_at - seen[0][0]


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} (median), {max(values):.1f} (most)"
