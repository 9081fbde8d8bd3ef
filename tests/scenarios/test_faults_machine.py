"""What befalls machines: a net that parts, a narrow line, a full disk, a clock that jumps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.scenarios import conftest
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.faults import HIDDEN, Loyal, Trainer, figures, say, wait_until
from tests.scenarios.machines import Machines, machines
from tests.scenarios.observer import patience

pytestmark = pytest.mark.soak
GRID = "ffn.[0:2].[0:4]"
CELLS = 8
FIRST = ("--new-swarm", "--grid", GRID, "--hidden-dim", str(HIDDEN))
REST = 0.05  # seconds after each step: what is measured is not how busy the trainer keeps them
TTL = 30.0  # seconds that a lease lasts without renewal
NEW_OWNER = 45.0  # seconds from a loss until every expert is served again


@pytest.fixture(autouse=True)
def _servers_may_start_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "START_LIMIT", patience(60))


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def on(launch: Launcher, here: Machines, number: int, *options: str) -> Process:
    """A server on a machine."""
    listen = ("--listen", f"{here.address(number)}:4747")
    return launch.node(*listen, *options, prefix=here.inside(number)).wait_ready()


# ------------------------------------------------------------------ the network
def test_a_net_that_parts_and_heals_leaves_one_owner_of_each_expert(launch: Launcher) -> None:
    """Each half serves those who are in it; which of two owners is left is decided at the end."""
    with machines(6, left=4) as here:
        first = on(launch, here, 0, *FIRST, "--experts", "3")
        join = ("--peer", first.address)
        on(launch, here, 1, *join, "--experts", "3")
        alone = on(launch, here, 4, *join, "--experts", "2")
        on(launch, here, 2, *join, "--experts", "4")
        uids = {str(uid) for uid in alone.ready["experts"]}  # type: ignore[attr-defined]  from JSON
        assert len(uids) == 2
        with (
            Trainer([first.address], experts=CELLS, enter=lambda: here.enter(3)) as trainer,
            Trainer([alone.address], experts=CELLS, enter=lambda: here.enter(5)) as beyond,
        ):
            trainer.wait_begun()
            beyond.wait_begun()
            loyal = Loyal(beyond, str(alone.ready["peer"]), enter=lambda: here.enter(5))
            parted_at = time.monotonic()
            here.part()
            asking = threading.Thread(target=loyal.ask_for, args=(60 + TTL,))
            asking.start()
            owner = str(alone.ready["peer"])
            taken = wait_until(
                lambda: uids <= trainer.accepted.owned_by_others(owner),
                patience(NEW_OWNER),
                "nobody has taken the experts beyond the cut",
            )
            pause(max(0.0, parted_at + 60 - time.monotonic()))
            here.heal()
            healed_at = time.monotonic()
            asking.join()
        seen = figures(trainer.between(parted_at, healed_at))
        last = max(t for (_, _, peer), (_, t) in loyal.accepted.times.items() if peer == owner)
        say(f"parted for {healed_at - parted_at:.0f} s: {seen}")
        say(f"taken over after {taken:.1f} s; the old owner ended {last - healed_at:+.1f} s from")
        say(f"the end of the cut; those beyond it were told: {dict(loyal.outcomes)}")
        assert not seen.failed
        assert last - healed_at <= patience(TTL)
        assert not trainer.accepted.twice_owned()


def test_a_server_behind_1_mbit_does_not_hold_up_the_others(launch: Launcher) -> None:
    with machines(3, left=3) as here:
        first = on(launch, here, 0, *FIRST, "--experts", "4")
        on(launch, here, 1, "--peer", first.address, "--experts", "4")
        enter = partial(here.enter, 2)
        with Trainer([first.address], experts=CELLS, enter=enter, rest=REST) as trainer:
            trainer.wait_begun()
            pause(5)
            narrowed_at = time.monotonic()
            here.narrow(1, "1mbit")
            pause(20)
        clear = figures(trainer.between(0, narrowed_at)[5:])
        narrow = figures(trainer.between(narrowed_at + 5, time.monotonic()))
        say(f"clear:     {clear}")
        say(f"1 Mbit/s:  {narrow}")
        assert not clear.failed + narrow.failed
        assert narrow.bare <= 0.01


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft (nftables) is not installed")
def test_training_goes_on_while_every_machine_loses_one_packet_in_twenty(launch: Launcher) -> None:
    """What TCP sends again is late, by 200 ms at least: of some rows another expert's answer is."""
    with machines(3, left=3) as here:
        first = on(launch, here, 0, *FIRST, "--experts", "4")
        on(launch, here, 1, "--peer", first.address, "--experts", "4")
        with Trainer([first.address], experts=CELLS, enter=lambda: here.enter(2)) as trainer:
            trainer.wait_begun()
            pause(5)
            lossy_at = time.monotonic()
            for number in range(3):
                here.lose(number, one_in=20)
            pause(30)
        clear = figures(trainer.between(0, lossy_at)[5:])
        lossy = figures(trainer.between(lossy_at, time.monotonic()))
        say(f"clear:          {clear}")
        say(f"5 % of packets: {lossy}")
        assert lossy.steps
        assert not clear.failed + lossy.failed
        assert lossy.bare <= 0.01
        assert not trainer.accepted.twice_owned()


# ------------------------------------------------------------------ the disk
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("reason: mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_saved_and_says_so(
    launch: Launcher, small_disk: Path
) -> None:
    options = ("--experts", str(CELLS), "--save-every", "1s", "--keep", "50")
    server = launch.node(*FIRST, *options, "--state-dir", str(small_disk)).wait_ready()
    with Trainer([server.address], experts=CELLS) as trainer:
        trainer.wait_begun()
        took = wait_until(
            lambda: "full" in server.log.read_text() or "space" in server.log.read_text(),
            patience(90),
            "the disk is not full, or nobody says so",
        )
        full_at = time.monotonic()
        good = whole_files(small_disk)
        pause(5)
    assert good
    assert good <= whole_files(small_disk)
    after = figures(trainer.between(full_at, time.monotonic()))
    say(f"full after {took:.0f} s with {len(good)} whole files; then {after}")
    assert after.steps
    assert not after.failed
    assert server.popen.poll() is None
    said = [json.loads(line) for line in server.log.read_text().splitlines() if "pace" in line]
    assert any(line["level"] == "warning" and line.get("advice") for line in said)


def whole_files(folder: Path) -> set[str]:
    """What was saved and is what its name says: the hash of each file begins as its name does."""
    found = set()
    for path in folder.rglob("*.safetensors"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.with_suffix(".json").exists():
            assert path.stem.rpartition("-")[2] == digest[:8], path
            found.add(str(path))
    return found


# ------------------------------------------------------------------ the clock
SHIFTED = """
import os, pathlib, time
from_real, from_real_ns = time.time, time.time_ns
def shift():
    return float(pathlib.Path(os.environ["CLOCK_SHIFT"]).read_text())
time.time = lambda: from_real() + shift()
time.time_ns = lambda: from_real_ns() + int(shift() * 1e9)
"""


def test_a_clock_that_is_wrong_or_jumps_changes_nothing(launch: Launcher, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHIFTED)
    shift = tmp_path / "shift"
    shift.write_text("7200")  # seconds
    shifted = ("env", f"PYTHONPATH={tmp_path}{os.pathsep}{os.getcwd()}", f"CLOCK_SHIFT={shift}")  # noqa: PTH109  a path of words
    first = launch.node(*FIRST, "--experts", "4").wait_ready()
    join = ("--peer", first.address, "--experts", "4")
    other = launch.node(*join, prefix=shifted, home="shifted").wait_ready()
    with Trainer([first.address], experts=CELLS, rest=REST) as trainer:
        trainer.wait_begun()
        for jump in (7200.0, -86_400.0, 86_400.0):
            began = time.monotonic()
            shift.write_text(str(jump))
            pause(12)  # more than one renewal of each lease
            seen = figures(trainer.between(began, time.monotonic()))
            say(f"clock {jump:+g} s: {seen}")
            assert not seen.failed
            assert seen.bare == 0
        assert other.end() == 0
        shift.write_text("-86400")  # before the last start: an epoch may not go back
        again = launch.node(*join, prefix=shifted, home="shifted").wait_ready()
        assert again.ready["peer"] == other.ready["peer"]
        wait_until(
            lambda: str(other.ready["peer"]) in trainer.accepted.since(time.monotonic() - 1),
            patience(60),
            "the server with the wrong clock is not asked again",
        )
    assert not trainer.accepted.twice_owned()
