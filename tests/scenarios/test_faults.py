"""Servers as processes that die, stand still, and are reached over bad lines, while one trains.

Each test prints its figures with `-s`. What takes long, or wants a machine for itself, is in the
soak profile.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pmoe.testing.proxy import Fault, FaultProxy, open_proxy
from p2pmoe.wire.address import Address
from tests.scenarios import conftest
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.faults import HIDDEN, ROWS, K, Loyal, Trainer, figures, say, wait_until
from tests.scenarios.observer import patience
from tests.scenarios.patience import until

GRID = "ffn.[0:2].[0:4]"
CELLS = 8
TURN = 2.0  # seconds of training before the other one's
ADOPTED = 45.0  # seconds from SIGKILL
CLEAN_AFTER = 3.0  # seconds from SIGKILL, after which rows without any answer are rare
FIRST = ("--new-swarm", "--grid", GRID, "--hidden-dim", str(HIDDEN))
AT_LEAST = 3  # steps under each fault
NOWHERE = Address("127.0.0.1", 1)


def two_servers(launch: Launcher) -> list[Process]:
    """Each has half of the experts."""
    half = ("--experts", str(CELLS // 2))
    first = launch.node(*FIRST, *half).wait_ready()
    return [first, launch.node("--peer", first.address, *half).wait_ready()]


@pytest.fixture(autouse=True)
def _servers_may_start_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "START_LIMIT", patience(60))


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


# ------------------------------------------------------------------ a crash
@pytest.mark.parametrize(
    ("rounds", "least"), [(1, 0.5), pytest.param(8, 0.9, marks=pytest.mark.soak)]
)
def test_no_step_fails_when_one_of_two_servers_is_killed_and_the_rate_is_that_of_the_other(
    launch: Launcher, rounds: int, least: float
) -> None:
    """In turn with a trainer that has never known but the one server that is left."""
    servers = two_servers(launch)
    with Trainer([servers[0].address], experts=CELLS) as trainer:
        trainer.wait_begun()
        pause(TURN)
        killed_at = time.monotonic()
        servers[1].end(signal.SIGKILL)
        pause(CLEAN_AFTER)
        clean_at = time.monotonic()
        pause(TURN)
        trainer.going.clear()
        with Trainer([servers[0].address], experts=CELLS // 2) as alone:
            alone.wait_begun()
            alone.going.clear()
            turns = [(trainer.go_for(TURN), alone.go_for(TURN)) for _ in range(rounds)]
    before = figures(trainer.between(0, killed_at)[5:])
    during = figures(trainer.between(killed_at, clean_at))
    after = figures(trainer.since(clean_at))
    mine, one = (figures([step for turn in turns for step in turn[who]]) for who in (0, 1))
    say(f"before:       {before}")
    say(f"{CLEAN_AFTER:g} s after:    {during}")
    say(f"after that:   {after}")
    say(f"in turns:     {mine}")
    say(f"one server:   {one}; after the kill {mine.rate / one.rate:.2f} of it")
    assert not before.failed + during.failed + after.failed
    assert after.bare <= 0.01
    assert mine.rate >= least * one.rate
    assert not trainer.accepted.twice_owned()


@pytest.mark.soak
def test_a_new_server_adopts_the_experts_of_a_killed_one_and_rows_have_k_again(
    launch: Launcher,
) -> None:
    """Of six experts three are left, so that rows of four lack one until the others are adopted."""
    three = ("--experts", "3", "--save-every", "2s")
    grid = ("--new-swarm", "--grid", "ffn.[0:2].[0:3]", "--hidden-dim", str(HIDDEN))
    first = launch.node(*grid, *three).wait_ready()
    second = launch.node("--peer", first.address, *three).wait_ready()
    with Trainer([first.address], experts=6) as trainer:
        trainer.wait_begun()
        pause(5)
        killed_at = time.monotonic()
        second.end(signal.SIGKILL)
        launch.node("--peer", first.address, *three)
        lost = {uid for (uid, _, peer) in trainer.accepted.times if peer == second.ready["peer"]}
        took = wait_until(
            lambda: lost <= trainer.accepted.owned_by_others(str(second.ready["peer"])),
            patience(ADOPTED),
            "not every expert is served again",
        )
        pause(5)
        ended_at = time.monotonic()
    between = figures(trainer.between(killed_at + CLEAN_AFTER, killed_at + took))
    after = figures(trainer.between(killed_at + took + 1, ended_at))
    say(f"until they are adopted: {between}")
    say(f"{len(lost)} experts adopted {took:.1f} s after the kill; then {after}")
    assert len(lost) == 3
    assert not figures(trainer.steps).failed
    assert between.bare <= 0.01
    assert after.experts >= 0.95 * K
    assert took <= patience(ADOPTED)
    assert not trainer.accepted.twice_owned()


# ------------------------------------------------------------------ bad lines
@asynccontextmanager
async def behind_proxies(launch: Launcher) -> AsyncIterator[tuple[list[Process], list[FaultProxy]]]:
    """Two servers, each of which others reach through a proxy only."""
    async with open_proxy(NOWHERE) as first, open_proxy(NOWHERE) as second:
        servers = []
        for proxy, place in ((first, FIRST), (second, ("--peer", str(first.address)))):
            with trio.fail_after(1):
                proxy.target = await free_port()
            options = ("--listen", str(proxy.target), "--announce", str(proxy.address))
            process = launch.node(*place, *options, "--experts", str(CELLS // 2))
            servers.append(await trio.to_thread.run_sync(process.wait_ready))
            assert process.address == str(proxy.address)
        yield servers, [first, second]


async def free_port() -> Address:
    """One that nobody listens at now."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        return Address("127.0.0.1", listener.socket.getsockname()[1])


FAR = Fault(delay=0.1)  # each way: 200 ms there and back
FAULTS = {
    "200 ms round trip": (FAR, FAR),
    "jitter up to 100 ms": (Fault(jitter=0.1), Fault(jitter=0.1)),
    "1 Mbit/s": (Fault(bandwidth=125_000), Fault(bandwidth=125_000)),
    "half-open": (Fault(), Fault(stalled=True)),
    "cut every 20 kB": (Fault(cut_after=20_000), Fault()),
    "garbage in one piece of 20": (Fault(), Fault(garbage=0.05)),
}


@pytest.mark.parametrize(
    ("seconds", "names"),
    [
        (1.0, ["200 ms round trip", "half-open", "garbage in one piece of 20"]),
        pytest.param(10.0, list(FAULTS), marks=pytest.mark.soak),
    ],
)
async def test_training_goes_on_while_the_line_to_one_server_is_bad(
    launch: Launcher, seconds: float, names: list[str]
) -> None:
    async with behind_proxies(launch) as (_, proxies):
        trainer = Trainer([str(proxies[0].address)], experts=CELLS)
        trainer.start()
        try:
            await trio.to_thread.run_sync(trainer.wait_begun)
            for name in ["clear", *names]:
                began, faults = time.monotonic(), FAULTS.get(name, (Fault(), Fault()))
                proxies[1].set(there=faults[0], back=faults[1])
                await trio.to_thread.run_sync(pause, seconds)
                with trio.fail_after(patience(60)):
                    await until(lambda began=began: len(trainer.since(began)) >= AT_LEAST)
                seen = figures(trainer.since(began))
                say(f"{name:28}{seen}")
                assert not seen.failed
            proxies[1].set()
            mended = time.monotonic()
            with trio.fail_after(patience(45)):  # a back-off lasts 30 s at most
                await until(lambda: _all_answer(trainer))
            say(f"all experts answer {time.monotonic() - mended:.1f} s after the last fault")
        finally:
            trainer.ending.set()
            await trio.to_thread.run_sync(trainer.join)
    assert not trainer.accepted.twice_owned()


def _all_answer(trainer: Trainer) -> bool:
    """Whether nothing was missed lately, and nobody was left out."""
    last = trainer.steps[-10:]
    return sum(step.answered for step in last) == 10 * K * ROWS


# ------------------------------------------------------------------ a server that stands still
@pytest.mark.soak
@pytest.mark.parametrize("seconds", [3.0, 12.0, 20.0, 40.0])
def test_a_server_that_wakes_answers_under_no_lease_that_another_has_taken(
    launch: Launcher, seconds: float
) -> None:
    servers = two_servers(launch)
    heir = launch.node("--peer", servers[0].address, "--experts", str(CELLS // 2)).wait_ready()
    assert not heir.ready["experts"]
    asleep = servers[1]
    with Trainer([servers[0].address], experts=CELLS) as trainer:
        trainer.wait_begun()
        loyal = Loyal(trainer, str(asleep.ready["peer"]))
        os.kill(asleep.popen.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        pause(seconds)
        os.kill(asleep.popen.pid, signal.SIGCONT)
        loyal.ask_for(10.0)
        pause(5)
    seen = figures(trainer.between(stopped_at, time.monotonic()))
    say(f"asleep for {seconds:g} s: {seen}; what it is asked then: {dict(loyal.outcomes)}")
    assert not seen.failed
    assert not trainer.accepted.twice_owned()
