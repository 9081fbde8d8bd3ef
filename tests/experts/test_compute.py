"""The compute thread: results come back to Trio, work is dropped in time, and a late batch is
worked around. Threads are held by events, never by waiting for time to pass."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio
import trio.testing

from p2pmoe.errors import ExpertPaused, LeaseLost, P2PMoEError, PeerBusy, RemoteError
from p2pmoe.experts import compute as compute_module
from p2pmoe.experts.batching import BatchingParams, Kind, Waiting
from p2pmoe.experts.compute import Compute, ComputeParams

PATIENCE = 10.0  # real seconds after which a test has failed


def job(number: int, uid: str = "ffn.0", client: object = "a", **changes: object) -> Waiting:
    return Waiting(
        number=number,
        uid=uid,
        kind=Kind.FORWARD,
        schema=None,
        rows=1,
        client=client,
        arrived=0.0,
        **changes,
    )


class Device:
    """A device whose batches wait for the test where it says so."""

    def __init__(self, **params: object) -> None:
        batching = BatchingParams(max_batch=4, max_waiting=8)
        chosen = ComputeParams(**{"batching": batching, "batch_limit": 60.0, **params})  # type: ignore[arg-type]  # of several types
        self.compute: Compute[Waiting, str] = Compute(self.execute, self.deliver, chosen)
        self.ran: list[list[int]] = []
        self.begun, self.gates = threading.Semaphore(0), dict[str, threading.Event]()
        self.threads: set[int] = set()
        self.answers: dict[int, str | P2PMoEError] = {}
        self._came = trio.Event()

    def execute(self, batch: list[Waiting], now: float) -> list[str]:
        self.ran.append([one.number for one in batch])
        self.threads.add(threading.get_ident())
        self.begun.release()
        if batch[0].uid in self.gates:
            self.gates[batch[0].uid].wait(PATIENCE)
        if batch[0].uid == "bad":
            raise ZeroDivisionError("of the device")
        return [f"done {one.number}" for one in batch]

    def deliver(self, finished: list[tuple[Waiting, str | P2PMoEError]]) -> None:
        trio.lowlevel.current_task()  # fails outside of Trio's thread
        self.answers |= {one.number: answer for one, answer in finished}
        self._came.set()

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():
                await self._came.wait()
                self._came = trio.Event()

    async def until_one_thread_is_left(self) -> None:
        while len(self.compute._workers) > 1:
            await trio.testing.wait_all_tasks_blocked()

    async def until_begun(self) -> None:
        await trio.to_thread.run_sync(self.begun.acquire, True, PATIENCE)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as parts:
            await parts.start(self.compute.run)
            yield
            parts.cancel_scope.cancel()

    @contextmanager
    def held(self, uid: str) -> Iterator[threading.Event]:
        self.gates[uid] = threading.Event()
        try:
            yield self.gates[uid]
        finally:
            self.gates[uid].set()


async def test_results_come_back_to_trio_from_a_thread_of_their_own() -> None:
    device = Device()
    async with device.running():
        for number in range(5):
            device.compute.submit([job(number)])
            await device.until(lambda number=number: number in device.answers)
    assert device.answers == {number: f"done {number}" for number in range(5)}
    assert len(device.threads) == 1
    assert threading.get_ident() not in device.threads


async def test_what_comes_while_a_batch_runs_is_merged_into_the_next() -> None:
    device = Device()
    with device.held("ffn.0") as gate:
        async with device.running():
            device.compute.submit([job(0)])
            await device.until_begun()
            for number in range(1, 7):
                device.compute.submit([job(number, client=number)])
            assert len(device.compute) == 6
            gate.set()
            await device.until(lambda: len(device.answers) == 7)
    assert device.ran == [[0], [1, 2, 3, 4], [5, 6]]


async def test_a_cancelled_request_is_never_computed() -> None:
    device = Device()
    with device.held("ffn.0") as gate:
        async with device.running():
            device.compute.submit([job(0)])
            await device.until_begun()
            device.compute.submit([job(1), job(2)])
            assert device.compute.cancel([0, 1]) == 1
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
            await device.until(lambda: 2 in device.answers)
    assert device.ran == [[0], [2]]
    assert set(device.answers) == {2}, "what ran for nobody is answered to nobody"


async def test_an_expired_request_is_never_computed() -> None:
    device = Device()
    device.compute.submit([job(0, deadline=trio.current_time()), job(1)])
    async with device.running():
        await device.until(lambda: device.answers)
    assert device.ran == [[1]]


async def test_a_full_queue_answers_busy_at_once() -> None:
    device = Device()
    device.compute.submit([job(number) for number in range(9)])
    assert isinstance(device.answers[8], PeerBusy)
    assert device.answers[8].retry_after == compute_module.SOON
    async with device.running():
        await device.until(lambda: len(device.answers) == 9)
    assert sum(map(len, device.ran)) == 8


async def test_a_full_queue_says_when_half_of_it_will_be_done(
    mock_clock: trio.testing.MockClock,
) -> None:
    device = Device()
    with device.held("slow") as gate:
        async with device.running():
            device.compute.submit([job(0, "slow")])
            await device.until_begun()
            mock_clock.jump(8.0)
            gate.set()
            await device.until(lambda: 0 in device.answers)
            with device.held("ffn.0"):
                device.compute.submit([job(number) for number in range(1, 14)])
                busy = device.answers[13]
                assert isinstance(busy, PeerBusy)
                assert busy.retry_after == pytest.approx(8.0 / 8 * 8 / 2, rel=0.2)
                device.gates["ffn.0"].set()


async def test_a_devices_own_error_fails_its_batch_and_the_thread_goes_on() -> None:
    device = Device()
    async with device.running():
        device.compute.submit([job(0, "bad"), job(1, "bad"), job(2, "good")])
        await device.until(lambda: len(device.answers) == 3)
    assert isinstance(device.answers[0], RemoteError)
    assert isinstance(device.answers[0].__cause__, ZeroDivisionError)
    assert device.answers[2] == "done 2"


async def test_what_waits_for_an_expert_that_is_given_up_is_told() -> None:
    device = Device()
    device.compute.submit([job(0, "ffn.0"), job(1, "ffn.1"), job(2, "ffn.0")])
    device.compute.refuse("ffn.0", LeaseLost("gone"))
    assert set(device.answers) == {0, 2}
    async with device.running():
        await device.until(lambda: len(device.answers) == 3)
    assert device.ran == [[1]]


async def test_when_the_callers_of_a_batch_have_left_the_other_experts_go_on_at_once() -> None:
    device = Device()
    with device.held("slow") as gate:
        async with device.running():
            device.compute.submit([job(0, "slow"), job(1, "slow")])
            await device.until_begun()
            device.compute.submit([job(2, "slow"), job(3, "quick")])
            device.compute.cancel([0])
            await trio.testing.wait_all_tasks_blocked()
            assert device.ran == [[0, 1]], "one caller is left"
            device.compute.cancel([1])
            await device.until(lambda: 3 in device.answers)
            assert len(device.compute) == 1, "the expert itself is busy"
            gate.set()
            await device.until(lambda: 2 in device.answers)
            await device.until_one_thread_is_left()
    assert device.answers == {2: "done 2", 3: "done 3"}
    assert device.ran == [[0, 1], [3], [2]]
    assert len(device.threads) == 2


async def test_a_second_batch_that_is_deserted_waits_for_the_first() -> None:
    device = Device()
    with device.held("slow") as gate, device.held("slower") as second_gate:
        async with device.running():
            for number, uid in enumerate(["slow", "slower"]):
                device.compute.submit([job(number, uid)])
                await device.until_begun()
                device.compute.cancel([number])
            device.compute.submit([job(2, "quick")])
            await trio.testing.wait_all_tasks_blocked()
            assert device.ran == [[0], [1]], "there is one spare thread"
            gate.set()
            await device.until(lambda: 2 in device.answers)
            second_gate.set()
            await device.until_one_thread_is_left()
    assert device.answers == {2: "done 2"}


async def test_a_deserted_batch_that_takes_too_long_takes_its_expert_out(
    mock_clock: trio.testing.MockClock,
) -> None:
    device = Device(batch_limit=3.0)
    with device.held("slow") as gate:
        async with device.running():
            device.compute.submit([job(0, "slow")])
            await device.until_begun()
            device.compute.cancel([0])
            device.compute.submit([job(1, "slow")])
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(5.0)
            await device.until(lambda: 1 in device.answers)
            device.compute.submit([job(2, "slow"), job(3, "quick")])
            await device.until(lambda: 3 in device.answers)
            assert isinstance(device.answers[1], PeerBusy)
            assert isinstance(device.answers[2], PeerBusy)
            gate.set()
            await device.until_one_thread_is_left()
            mock_clock.jump(50.0)
            device.compute.submit([job(4, "slow")])
            await device.until(lambda: 4 in device.answers)
    assert device.answers[4] == "done 4"


async def test_a_late_batch_takes_its_expert_out_and_the_others_go_on(
    mock_clock: trio.testing.MockClock,
) -> None:
    device = Device(batch_limit=3.0)
    with device.held("slow") as gate:
        async with device.running():
            device.compute.submit([job(0, "slow")])
            await device.until_begun()
            device.compute.submit([job(1, "slow"), job(2, "quick")])
            mock_clock.jump(3.0)
            await trio.testing.wait_all_tasks_blocked()
            assert device.answers == {}
            mock_clock.jump(2.0)
            await device.until(lambda: len(device.answers) == 3)
            assert isinstance(device.answers[0], ExpertPaused)
            assert isinstance(device.answers[1], ExpertPaused)
            assert device.answers[1].retry_after == 3.0, "nobody knows how long it still takes"
            assert device.answers[2] == "done 2"
            device.compute.submit([job(3, "slow")])
            assert isinstance(device.answers[3], PeerBusy)
            gate.set()
            await device.until_one_thread_is_left()
            mock_clock.jump(9.0)
            device.compute.submit([job(4, "slow")])
            assert isinstance(device.answers[4], ExpertPaused), "2 x 5 seconds have not passed"
            assert device.answers[4].retry_after == pytest.approx(1.0)
            mock_clock.jump(1.0)
            device.compute.submit([job(5, "slow")])
            await device.until(lambda: 5 in device.answers)
    assert device.answers[5] == "done 5"
    assert isinstance(device.answers[0], PeerBusy), "the late result was dropped"
    assert len(device.threads) == 2


async def test_experts_of_a_late_wave_come_back_when_it_has_ended(
    mock_clock: trio.testing.MockClock,
) -> None:
    device = Device(batch_limit=3.0)
    wave = [job(0, "slow", family="f"), job(1, "other", family="f")]
    with device.held("slow") as gate:
        async with device.running():
            device.compute.submit(wave)
            await device.until_begun()
            mock_clock.jump(5.0)
            await device.until(lambda: len(device.answers) == 2)
            assert all(isinstance(one, PeerBusy) for one in device.answers.values())
            device.compute.submit([job(2, "other")])
            assert isinstance(device.answers[2], PeerBusy)
            gate.set()
            await device.until_one_thread_is_left()
            device.compute.submit([job(3, "slow"), job(4, "other")])
            await device.until(lambda: {3, 4} <= set(device.answers))
    assert device.ran[0] == [0, 1]
    assert (device.answers[3], device.answers[4]) == ("done 3", "done 4")


async def test_a_second_late_batch_gets_no_third_thread(
    mock_clock: trio.testing.MockClock,
) -> None:
    device = Device(batch_limit=3.0)
    with device.held("slow"), device.held("slower") as gate:
        async with device.running():
            for number, uid in enumerate(["slow", "slower"]):
                device.compute.submit([job(number, uid)])
                await device.until_begun()
                mock_clock.jump(5.0)
                await trio.testing.wait_all_tasks_blocked()
            device.compute.submit([job(2, "quick")])
            mock_clock.jump(5.0)
            await trio.testing.wait_all_tasks_blocked()
            assert set(device.answers) == {0}
            gate.set()
            await device.until(lambda: len(device.answers) == 3)
            assert device.answers[1] == "done 1"
            device.gates["slow"].set()
    assert len(device.threads) == 2


async def test_closing_waits_for_the_batch_under_way_and_begins_no_other() -> None:
    device, ended = Device(), []

    class UntilClosing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            with device.compute._changed:
                ended.append(device.compute._changed.wait_for(lambda: device.compute._closing, 9))
            return True

    device.gates["ffn.0"] = UntilClosing()
    async with device.running():
        device.compute.submit([job(0), job(1, "ffn.1")])
        await device.until_begun()
    assert ended == [True]
    assert device.ran == [[0]]


async def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "STOP_LIMIT", 0.05)
    device = Device()
    with device.held("ffn.0"):
        with trio.fail_after(PATIENCE):
            async with device.running():
                device.compute.submit([job(0)])
                await device.until_begun()
        assert 0 not in device.answers


async def test_without_a_thread_batches_run_in_trios_own(autojump_clock: object) -> None:
    device = Device(threaded=False)
    async with device.running():
        device.compute.submit([job(0), job(1, "ffn.1"), job(2, deadline=trio.current_time())])
        await device.until(lambda: len(device.answers) == 2)
        device.compute.submit([job(3)])
        await device.until(lambda: len(device.answers) == 3)
        assert trio.current_time() == 0.0
    assert device.ran == [[0], [1], [3]]
    assert device.threads == {threading.get_ident()}
