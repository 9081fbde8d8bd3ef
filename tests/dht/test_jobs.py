"""Work that outlives the call which began it."""

from collections.abc import Callable
from functools import partial

import pytest
import trio

from p2pmoe.dht.jobs import MOST_WAITING, Flights, Jobs, Promise, together
from p2pmoe.errors import CallTimeout, NodeClosed, PeerBusy


async def test_a_promise_keeps_what_came_first(autojump_clock) -> None:
    promise = Promise[int]()
    promise.keep(1)
    promise.keep(2)
    promise.fail(NodeClosed())
    assert await promise.wait() == 1


async def test_who_wants_to_be_told_of_a_promise_is_told_once(autojump_clock) -> None:
    promise = Promise[int]()
    told: list[tuple[str, bool]] = []
    promise.then(lambda: told.append(("before", promise.over)))
    promise.keep(1)
    promise.keep(2)
    promise.then(lambda: told.append(("after", promise.over)))
    assert told == [("before", True), ("after", True)]


async def test_everybody_who_waits_gets_an_error_of_their_own(autojump_clock) -> None:
    promise = Promise[int]()
    promise.fail(CallTimeout("late"))
    errors = []
    for _ in range(2):
        with pytest.raises(CallTimeout, match="late") as caught:
            await promise.wait()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


async def test_jobs_run_beside_each_other_and_end_with_their_nursery(autojump_clock) -> None:
    jobs = Jobs()
    begun: list[int] = []

    async def job() -> None:
        begun.append(len(begun))
        await trio.sleep_forever()

    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        for _ in range(3):
            jobs.start(job, lambda: None)
        await trio.sleep(1)
        assert len(begun) == 3
        parts.cancel_scope.cancel()
    with pytest.raises(NodeClosed):
        jobs.start(job, lambda: None)


async def test_too_many_jobs_are_refused_and_those_never_begun_are_told(autojump_clock) -> None:
    jobs = Jobs()
    abandoned: list[int] = []

    async def job() -> None:
        raise AssertionError("it must not begin")

    for index in range(MOST_WAITING):
        jobs.start(job, lambda index=index: abandoned.append(index))
    with pytest.raises(PeerBusy):
        jobs.start(job, lambda: None)
    with trio.CancelScope() as scope:
        scope.cancel()
        await jobs.run()
    assert abandoned == list(range(MOST_WAITING))


async def test_no_more_jobs_run_at_once_than_are_allowed(
    autojump_clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pmoe.dht.jobs.MOST_RUNNING", 2)
    jobs = Jobs()
    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        for _ in range(2):
            jobs.start(partial(trio.sleep, 1), lambda: None)
        with pytest.raises(PeerBusy):
            jobs.start(partial(trio.sleep, 1), lambda: None)
        await trio.sleep(2)
        jobs.start(partial(trio.sleep, 1), lambda: None)
        parts.cancel_scope.cancel()


class Work:
    """Work without a task that notes how it ends."""

    def __init__(self, ends: list[tuple[str, float]]) -> None:
        self.ends = ends

    def late(self) -> None:
        self.ends.append(("late", trio.current_time()))

    def abandon(self) -> None:
        self.ends.append(("abandoned", trio.current_time()))


async def test_work_without_a_task_is_told_when_it_is_late_and_when_the_node_ends(
    autojump_clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs()
    ends: list[tuple[str, float]] = []
    begun = trio.current_time()
    jobs.watch(Work(ends), begun + 3)
    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        ended = Work(ends)
        jobs.watch(Work(ends), begun + 1)
        jobs.watch(ended, begun + 2)
        jobs.watch(Work(ends), begun + 9)
        jobs.forget(ended)
        await trio.sleep(5)
        monkeypatch.setattr("p2pmoe.dht.jobs.MOST_RUNNING", 1)
        with pytest.raises(PeerBusy):
            jobs.watch(Work(ends), begun + 6)
        parts.cancel_scope.cancel()
    assert ends == [("late", begun + 1), ("late", begun + 3), ("abandoned", begun + 5)]
    with pytest.raises(NodeClosed):
        jobs.watch(Work(ends), begun + 6)


async def test_equal_questions_are_asked_once_whoever_goes_away(autojump_clock) -> None:
    jobs = Jobs()
    flights: Flights[int] = Flights(jobs)
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await trio.sleep(1)
        return 7

    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        with trio.move_on_after(0.5):
            await flights.share("key", ask)
        answers = await together([lambda: flights.share("key", ask)] * 3)
        assert (answers, asked) == ([7, 7, 7], 1)
        assert await flights.share("key", ask) == 7
        assert asked == 2
        parts.cancel_scope.cancel()


async def test_a_shared_question_that_fails_fails_for_all(autojump_clock) -> None:
    jobs = Jobs()
    flights: Flights[int] = Flights(jobs)

    async def ask() -> int:
        await trio.sleep(1)
        raise CallTimeout("late")

    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        with pytest.raises(CallTimeout):
            await together([lambda: flights.share("key", ask)] * 2)
        parts.cancel_scope.cancel()


async def test_what_comes_at_once_needs_no_task_and_what_does_not_gets_one(autojump_clock) -> None:
    jobs = Jobs()
    flights: Flights[int] = Flights(jobs)
    tried: list[Promise[int | None]] = []

    def at_once() -> Promise[int | None]:
        tried.append(Promise())
        return tried[-1]

    async def ask() -> int:
        await trio.sleep(1)
        return 7

    async def wait(came: list[int | str]) -> None:
        try:
            came.append(await flights.share("key", ask, at_once))
        except CallTimeout as error:
            came.append(str(error))

    async def outcome(end: Callable[[Promise[int | None]], None]) -> list[int | str]:
        came: list[int | str] = []
        async with trio.open_nursery() as waiting:
            waiting.start_soon(wait, came)
            waiting.start_soon(wait, came)
            await trio.sleep(1)
            end(tried[-1])
        return came

    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        assert await outcome(lambda trying: trying.keep(1)) == [1, 1]
        assert await outcome(lambda trying: trying.keep(None)) == [7, 7]
        assert await outcome(lambda trying: trying.fail(CallTimeout("late"))) == ["late", "late"]
        assert len(tried) == 3
        parts.cancel_scope.cancel()


async def test_who_waits_when_the_node_ends_is_told(autojump_clock) -> None:
    jobs = Jobs()
    flights: Flights[int] = Flights(jobs)
    told: list[str] = []

    async def ask() -> int:
        await trio.sleep_forever()
        raise AssertionError

    async def wait(key: str) -> None:
        try:
            await flights.share(key, ask)
        except NodeClosed:
            told.append(key)

    async with trio.open_nursery() as waiting:
        scope = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await jobs.run(task_status=task_status)

        await waiting.start(run)
        waiting.start_soon(wait, "begun")
        await trio.sleep(1)
        scope.cancel()
        waiting.start_soon(wait, "waits to begin")
    assert sorted(told) == ["begun", "waits to begin"]


async def test_the_first_error_is_raised_alone_after_all_have_ended(autojump_clock) -> None:
    ended: list[str] = []

    async def fine() -> str:
        await trio.sleep(2)
        ended.append("fine")
        return "fine"

    async def fails() -> str:
        raise CallTimeout("late")

    with pytest.raises(CallTimeout):
        await together([fine, fails, fails])
    assert ended == ["fine"]
    assert await together([fine, fine]) == ["fine", "fine"]
    assert await together([]) == []
