"""A swarm is called from any thread: answers, errors, deadlines and interrupts cross the bridge."""

import copy
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from p2pmoe.bridge import Job
from p2pmoe.errors import (
    CallTimeout,
    ConfigurationError,
    ExpertUnavailable,
    ForkedProcessError,
    LocalProtocolError,
    NodeClosed,
    PeerUnreachable,
)
from p2pmoe.identity import PeerId
from p2pmoe.swarm import Swarm, connect, start_swarm


class Node:
    """As much of a node as a swarm uses."""

    def __init__(self, parts: trio.Nursery) -> None:
        self.start = parts.start
        self.closed = False

    def figures(self) -> dict[str, int]:
        return {"p2pmoe_peers_connected": 2}

    def sections(self) -> dict[str, Any]:
        return {"mixture.ffn": [SimpleNamespace(name="forward", values={"rows": 3})]}


@asynccontextmanager
async def open_fake() -> AsyncIterator[Any]:
    async with trio.open_nursery() as parts:
        node = Node(parts)
        try:
            yield node
        finally:
            node.closed = True
            parts.cancel_scope.cancel()


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with start_swarm(open_fake) as swarm:
        yield swarm


class Sleeper:
    """Sleeps for ever, and remembers how that ended."""

    def __init__(self) -> None:
        self.asleep, self.cancelled = threading.Event(), threading.Event()

    async def __call__(self) -> None:
        self.asleep.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


async def double(x: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * x


async def boom() -> None:
    raise ValueError("as it was raised")


# ------------------------------------------------------------------ the bridge
def test_answers_and_errors_come_back_as_they_are(swarm: Swarm) -> None:
    assert swarm.call(double, 21) == 42
    with pytest.raises(ValueError, match="as it was raised"):
        swarm.call(boom)


def test_calls_of_many_threads_overlap(swarm: Swarm) -> None:
    together = trio.Event()
    waiting = []

    async def meet() -> None:
        waiting.append(1)
        if len(waiting) == 16:
            together.set()
        await together.wait()

    threads = [threading.Thread(target=swarm.call, args=(meet,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(waiting) == 16


def test_jobs_that_come_before_trio_looks_are_taken_together(swarm: Swarm, monkeypatch) -> None:
    held, taken, wakes = threading.Event(), threading.Event(), []
    bridge = swarm._bridge
    soon = bridge._soon

    def hold() -> None:
        taken.set()
        held.wait(10)

    def count(function, *args) -> None:
        wakes.append(function)
        soon(function, *args)

    soon(hold)
    assert taken.wait(10)
    monkeypatch.setattr(bridge, "_soon", count)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(swarm.call(double, n))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    while len(bridge._jobs) < len(threads):
        threads[0].join(0.001)
    held.set()
    for thread in threads:
        thread.join(10)
    assert sorted(found) == [2 * n for n in range(8)]
    assert len(wakes) == 1


def test_a_job_that_relied_on_a_wake_that_failed_is_told_so(swarm: Swarm, monkeypatch) -> None:
    bridge = swarm._bridge
    late = Job(double, (1,), 1.0, ended=lambda job: None)  # no pass lets anybody go any more

    def fail(function, *args) -> None:
        bridge._jobs.append(late)  # of another thread, which sees that somebody wakes Trio
        raise NodeClosed("it has ended")

    with monkeypatch.context() as patched:
        patched.setattr(bridge, "_soon", fail)
        with pytest.raises(NodeClosed):
            swarm.call(double, 1)
    late.wait(1)
    assert isinstance(late.error, NodeClosed)
    assert swarm.call(double, 1) == 2


def test_an_interrupt_of_who_wakes_trio_ends_no_other_threads_job(
    swarm: Swarm, monkeypatch
) -> None:
    bridge, other = swarm._bridge, Job(double, (21,), 1.0)
    soon, interrupted = bridge._soon, []

    def interrupt(function, *args) -> None:
        if not interrupted:
            bridge._jobs.append(other)  # of another thread, which sees that somebody wakes Trio
            interrupted.append(True)
            raise KeyboardInterrupt
        soon(function, *args)

    with monkeypatch.context() as patched:
        patched.setattr(bridge, "_soon", interrupt)
        with pytest.raises(KeyboardInterrupt):
            swarm.call(double, 1)
    other.wait(5)
    assert other.answer == 42
    assert swarm.call(double, 1) == 2


class Desk:
    """Answers even numbers, and has odd ones called otherwise; may keep all of them waiting."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.keeps = keeps
        self.kept: list[Job] = []
        self.asked = threading.Event()
        self.forgotten = threading.Event()

    def begin(self, jobs: Sequence[Job], otherwise: Callable[[Job], None]) -> None:
        self.asked.set()
        for job in jobs:
            if self.keeps:
                self.kept.append(job)
            elif job.args[0] % 2:
                otherwise(job)
            else:
                job.end("even")

    def forget(self, job: Job) -> None:
        assert [job] == self.kept
        self.forgotten.set()

    def close(self) -> None:
        for job in self.kept:
            job.end(None, NodeClosed("it is over"))


def test_a_desk_does_what_it_can_without_a_task_of_its_own(swarm: Swarm) -> None:
    desk = Desk()
    assert [swarm.call(double, n, desk=desk) for n in range(4)] == ["even", 2, "even", 6]


def test_a_desk_is_told_that_nobody_waits_any_more(swarm: Swarm, monkeypatch) -> None:
    monkeypatch.setattr("p2pmoe.bridge.SLACK", 0.05)
    desk = Desk(keeps=True)
    with pytest.raises(CallTimeout):
        swarm.call(double, 1, timeout=0.05, desk=desk)
    assert desk.forgotten.wait(10)


def test_a_desk_is_closed_with_the_swarm() -> None:
    desk, swarm, found = Desk(keeps=True), start_swarm(open_fake), []

    def wait() -> None:
        with pytest.raises(NodeClosed, match="it is over"):
            swarm.call(double, 1, desk=desk)
        found.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    assert desk.asked.wait(10)
    swarm.close()
    thread.join(10)
    assert found
    with pytest.raises(NodeClosed):
        swarm.call(double, 1, desk=desk)


def test_a_call_ends_at_its_deadline_on_both_sides(swarm: Swarm) -> None:
    sleeper = Sleeper()
    with pytest.raises(CallTimeout, match=r"no answer after 0\.05 s") as caught:
        swarm.call(sleeper, timeout=0.05)
    assert caught.value.elapsed == 0.05
    assert sleeper.cancelled.is_set()


def test_a_thread_that_never_yields_does_not_hold_its_caller(swarm: Swarm, monkeypatch) -> None:
    monkeypatch.setattr("p2pmoe.bridge.SLACK", 0.05)
    free = threading.Event()

    async def hog() -> None:
        free.wait(10)

    with pytest.raises(CallTimeout):
        swarm.call(hog, timeout=0.05)
    free.set()
    assert swarm.call(double, 1) == 2


def test_an_interrupt_reaches_the_waiting_call_at_once_and_the_swarm_stays_usable(
    swarm: Swarm,
) -> None:
    sleeper, sent = Sleeper(), []

    def interrupt() -> None:
        sleeper.asleep.wait(10)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        swarm.call(sleeper)
    assert time.monotonic() - sent[0] < 1  # at most 0.1 s on a machine that is not busy
    thread.join()
    assert sleeper.cancelled.wait(10)
    assert swarm.call(double, 3) == 6


def test_the_swarms_own_thread_may_not_wait_for_itself(swarm: Swarm) -> None:
    async def inside() -> None:
        swarm.call(double, 1)

    with pytest.raises(LocalProtocolError, match="any thread but its own"):
        swarm.call(inside)


def test_closing_ends_the_calls_that_run_and_those_that_come(swarm: Swarm) -> None:
    sleeper, seen = Sleeper(), []

    def wait() -> None:
        with pytest.raises(NodeClosed) as caught:
            swarm.call(sleeper)
        seen.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    assert sleeper.asleep.wait(10)
    node = swarm.node
    swarm.close()
    thread.join(10)
    assert seen
    assert node.closed
    swarm.close()
    with pytest.raises(NodeClosed, match="connect again"):
        swarm.call(double, 1)


def test_a_call_that_comes_while_the_node_says_goodbye_is_refused() -> None:
    leaving, leave = threading.Event(), trio.Event()

    @asynccontextmanager
    async def open_slow_to_leave() -> AsyncIterator[Any]:
        async with open_fake() as node:
            try:
                yield node
            finally:
                with trio.CancelScope(shield=True):
                    leaving.set()
                    await leave.wait()

    swarm = start_swarm(open_slow_to_leave)
    token = swarm.call(_token)
    thread = threading.Thread(target=swarm.close)
    thread.start()
    assert leaving.wait(10)
    with pytest.raises(NodeClosed, match="connect again"):
        swarm.call(double, 1)
    token.run_sync_soon(leave.set)
    thread.join(10)


async def _token() -> trio.lowlevel.TrioToken:
    return trio.lowlevel.current_trio_token()


def test_a_part_that_crashes_ends_the_swarm_and_its_thread_says_why(
    swarm: Swarm, monkeypatch
) -> None:
    crashes, crash = [], trio.Event()
    crashed = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: (crashes.append(args), crashed.set()))

    class Part:
        async def run(self, *, task_status: Any) -> None:
            task_status.started()
            await crash.wait()
            raise ZeroDivisionError("a bug")

    swarm.keep("part", lambda node: Part())
    with pytest.raises(NodeClosed):
        swarm.call(_set_and_sleep, crash)
    assert crashed.wait(10)
    assert "a bug" in str(crashes[0].exc_value.exceptions)
    with pytest.raises(NodeClosed):
        swarm.call(double, 1)


async def _set_and_sleep(event: trio.Event) -> None:
    event.set()
    await trio.sleep_forever()


def test_a_swarm_may_be_dropped_in_its_own_thread(swarm: Swarm) -> None:
    async def drop() -> None:
        swarm.close()
        await trio.sleep_forever()

    with pytest.raises(NodeClosed):
        swarm.call(drop)


def test_a_swarm_that_nobody_holds_is_closed() -> None:
    swarm = start_swarm(open_fake)
    node = swarm.node
    del swarm
    gc.collect()
    assert node.closed


def test_what_fails_to_open_raises_its_error_here() -> None:
    @asynccontextmanager
    async def open_nothing() -> AsyncIterator[Any]:
        raise PeerUnreachable("no peer answered", stage="connect")
        yield

    threads = threading.active_count()
    with pytest.raises(PeerUnreachable, match="no peer answered"):
        start_swarm(open_nothing)
    assert threading.active_count() == threads


# ------------------------------------------------------------------ the handle
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons advise against it
def test_a_forked_child_is_told_to_connect_again(swarm: Swarm) -> None:
    child = os.fork()
    if not child:
        try:
            swarm.close()
            swarm.call(double, 1)
        except ForkedProcessError as error:
            os._exit(7 if "connect again" in str(error) else 1)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert swarm.call(double, 2) == 4


def test_a_copy_is_the_swarm_itself_and_a_pickle_says_what_to_do_instead(swarm: Swarm) -> None:
    assert copy.deepcopy([swarm])[0] is swarm
    assert copy.copy(swarm) is swarm
    with pytest.raises(TypeError, match=r"state_dict.*p2pmoe\.connect"):
        pickle.dumps(swarm)


def test_a_part_is_made_once_and_runs_as_long_as_the_swarm(swarm: Swarm) -> None:
    made = []

    class Part:
        def __init__(self, node: Any) -> None:
            made.append(self)
            self.running, self.node = False, node

        async def run(self, *, task_status: Any) -> None:
            self.running = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self.running = False

    part = swarm.keep("part", Part)
    assert swarm.keep("part", Part) is part
    assert part.running
    assert part.node is swarm.node
    assert made == [part]
    swarm.close()
    assert not part.running


def test_a_part_that_does_not_start_is_not_kept(swarm: Swarm) -> None:
    class Part:
        async def run(self, *, task_status: Any) -> None:
            raise ConfigurationError("not like this")

    for _ in range(2):
        with pytest.raises(ConfigurationError):
            swarm.keep("part", lambda node: Part())


def test_every_update_has_an_id_of_its_own(swarm: Swarm) -> None:
    ids = [swarm.next_update() for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(len(one) == 16 and one[:8] == ids[0][:8] for one in ids)


def test_the_statistics_hold_counters_and_what_the_layers_say(swarm: Swarm) -> None:
    assert swarm.stats() == {
        "p2pmoe_peers_connected": 2,
        "mixture.ffn": {"forward": {"rows": 3}},
    }


# ------------------------------------------------------------------ waiting for experts
class Watch:
    """A watch that is told what there is."""

    def __init__(self) -> None:
        self.current: Any = None
        self.event = trio.Event()

    async def run(self, *, task_status: Any) -> None:
        task_status.started()

    def poke(self) -> None:
        pass

    async def changed(self) -> None:
        await self.event.wait()

    async def tell(self, *uids: str) -> None:
        leases = {uid: SimpleNamespace(peer=PeerId(bytes(32))) for uid in uids}
        self.current = SimpleNamespace(cells=leases)
        self.event.set()
        self.event = trio.Event()


@pytest.fixture
def watch(swarm: Swarm) -> Watch:
    watch = Watch()
    swarm.keep(("watch", "ffn"), lambda node: watch)
    return watch


def test_the_experts_are_waited_for(swarm: Swarm, watch: Watch) -> None:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(swarm.wait_for("ffn", experts=2)))
    thread.start()
    swarm.call(watch.tell, "ffn.0")
    swarm.call(watch.tell, "ffn.0", "ffn.1", "ffn.2")
    thread.join(10)
    assert seen == [3]
    assert swarm.wait_for("ffn") == 3


def test_too_few_experts_are_an_error_that_says_what_was_seen(swarm: Swarm, watch: Watch) -> None:
    with pytest.raises(ExpertUnavailable, match=r"0 of 4 experts of ffn after .* nobody knows"):
        swarm.wait_for("ffn", experts=4, timeout=0.05)
    swarm.call(watch.tell)
    with pytest.raises(ExpertUnavailable, match="nobody serves a cell"):
        swarm.wait_for("ffn", experts=4, timeout=0.05)
    swarm.call(watch.tell, "ffn.1", "ffn.0")
    with pytest.raises(ExpertUnavailable, match=r"2 of 4 .* saw ffn\.0, ffn\.1 on 1 peers"):
        swarm.wait_for("ffn", experts=4, timeout=0.05)
    swarm.call(watch.tell, *(f"ffn.{i}" for i in range(9)))
    with pytest.raises(ExpertUnavailable, match=r"ffn\.7, \.\.\. on"):
        swarm.wait_for("ffn", experts=10, timeout=0.05)


# ------------------------------------------------------------------ connecting
def test_peers_must_be_addresses() -> None:
    with pytest.raises(ConfigurationError, match="name at least one peer"):
        connect([])
    with pytest.raises(ConfigurationError, match="expected HOST:PORT"):
        connect("nowhere:port")


def test_nobody_who_answers_is_an_error_that_says_where_and_why() -> None:
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:1\b.*refused"):
        connect("127.0.0.1:1", timeout=5)


def test_of_several_addresses_that_do_not_answer_each_is_named() -> None:
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:1\b.*; 127\.0\.0\.1:2\b") as caught:
        connect(["127.0.0.1:1", "127.0.0.1:2"], timeout=5)
    assert caught.value.stage == "connect"
