"""Parts that threads ask for alone travel together, and each has its own answer, error and end."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from p2pmoe.bridge import Job
from p2pmoe.errors import (
    CallTimeout,
    ConnectionLost,
    LeaseLost,
    MalformedMessage,
    NodeClosed,
    NonFiniteError,
    P2PMoEError,
    PeerBusy,
    RemoteError,
)
from p2pmoe.experts.messages import (
    BACKWARD,
    FORWARD,
    MAX_PARTS,
    Answer,
    BackwardRequest,
    ForwardRequest,
    PartReply,
)
from p2pmoe.experts.tensors import rows_to_wire
from p2pmoe.identity import PeerId
from p2pmoe.moe.alone import Alone
from p2pmoe.moe.calls import Ask
from p2pmoe.moe.desk import JOINT_BYTES
from p2pmoe.moe.service import MixtureService
from p2pmoe.net.asking import NotBegun, OutgoingCall
from p2pmoe.net.calls import Part
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import Contact
from tests.moe.fakes import LEASE, Pool, Watch, done, peer
from tests.moe.test_service import MANIFEST, ROW, experts, leases, running

SECONDS = 30.0
UPDATE = bytes(16)


@dataclass
class Begun:
    """A call that was begun on an open connection, as its peer sees it."""

    to: PeerId
    method: str
    body: bytes
    payload: bytes
    budget: float
    cancelled: bool = False
    call: OutgoingCall = field(init=False)

    def __post_init__(self) -> None:
        self.call = OutgoingCall(self.method, lambda size: None, self._cancel)

    def _cancel(self) -> None:
        self.cancelled = True

    @property
    def request(self) -> Any:
        return schema.decode(
            self.body, ForwardRequest if self.method == FORWARD else BackwardRequest
        )

    def answer(self, parts: Sequence[PartReply], *rows: torch.Tensor, last: bool = False) -> None:
        """Answer these parts; those that went well have these rows."""
        described, views = rows_to_wire([rows]) if rows else ((), [])
        payload = memoryview(bytearray(b"".join(views)))
        self.call.arrived(
            Part(schema.encode(Answer(parts=tuple(parts), tensors=described)), payload)
        )
        if last:
            self.call.ended(None, "ok")


class OpenPool(Pool):
    """A pool with an open connection to everybody, but while it is `shut`."""

    def __init__(self) -> None:
        super().__init__(experts(), ((ROW,), (ROW,)))
        self.begun: list[Begun] = []
        self.shut = False
        self.full = False

    def open_connection(self, to: Contact, *, bulk: bool) -> Any:
        assert bulk
        return None if self.shut else SimpleNamespace(ask=partial(self._ask, to.peer))

    def _ask(self, to: PeerId, method: str, body: bytes, payload: Any, budget: float) -> Any:
        if self.full:
            raise PeerBusy("too many calls are in flight")
        self.begun.append(Begun(to, method, body, b"".join(payload), budget))
        return self.begun[-1].call


class Threads:
    """Jobs as threads hand them over, and those that the desk does not begin itself."""

    def __init__(self, service: MixtureService, pool: OpenPool) -> None:
        self.service, self.pool, self.desk = service, pool, service.desk
        self.otherwise: list[Job] = []

    def ask(self, *parts: Alone) -> list[Job]:
        """All in one pass of Trio's loop."""
        jobs = [Job(self.desk.ask, (part,), part.seconds, self.desk) for part in parts]
        self.desk.begin(jobs, self.otherwise.append)
        return jobs

    def figures(self, method: str = FORWARD) -> dict[str, int | str]:
        return self.service.describe()[method.rpartition(".")[2]]


@pytest.fixture
async def threads(autojump_clock) -> AsyncIterator[Threads]:
    pool, watch = OpenPool(), Watch()
    async with running(pool, watch) as service:
        watch.tell(MANIFEST, leases(pool))
        await service.manifest(5.0)
        yield Threads(service, pool)


def rows_of(value: float, rows: int = 1) -> torch.Tensor:
    return torch.full((rows, 3), value)


def part(
    value: float,
    uid: str = "ffn.1",
    *,
    rows: int = 1,
    seconds: float = SECONDS,
    update: bytes = b"",
) -> Alone:
    """A part with rows of this value for an expert, which `peer(1)` serves if it is odd."""
    x = rows_of(value, rows)
    grads = (x,) if update else ()
    ask = Ask(peer(int(uid[-1]) % 2), uid, LEASE, (x,), (ROW,), grads, update)
    return Alone(BACKWARD if update else FORWARD, ask, seconds)


def ended(job: Job) -> bool:
    """Whether the thread that waits for it may go on."""
    return job._open.acquire(blocking=False)


def failed(index: int, error: P2PMoEError) -> PartReply:
    return PartReply(index=index, step=0, code=error.code, detail=str(error))


async def test_parts_that_come_up_together_travel_in_one_call_and_each_gets_its_rows(
    threads: Threads, autojump_clock
) -> None:
    parts = [part(1.0), part(2.0, "ffn.3", rows=2), part(3.0)]
    jobs = threads.ask(*parts)
    [call] = threads.pool.begun
    assert [(one.uid, one.rows) for one in call.request.parts] == [
        ("ffn.1", 1),
        ("ffn.3", 2),
        ("ffn.1", 1),
    ]
    assert (
        call.payload == torch.cat([rows_of(1.0), rows_of(2.0, 2), rows_of(3.0)]).numpy().tobytes()
    )
    assert call.budget == pytest.approx(SECONDS)
    call.answer([done(2), done(0)], rows_of(-3.0), rows_of(-1.0))
    assert [ended(job) for job in jobs] == [True, False, True]
    call.answer([done(1)], rows_of(-2.0, 2), last=True)
    assert ended(jobs[1])
    for one, value in zip(parts, (-1.0, -2.0, -3.0), strict=True):
        assert torch.equal(one.tensors()[0], rows_of(value, one.rows))
    assert [job.error for job in jobs] == [None] * 3
    assert (threads.figures()["passes"], threads.figures()["answered"]) == (3, 4)
    assert not call.cancelled
    assert not threads.otherwise


async def test_tensors_of_joined_parts_begin_where_the_wire_wants_them(
    threads: Threads, autojump_clock
) -> None:
    threads.ask(part(1.0, update=UPDATE), part(2.0, update=UPDATE))
    [call] = threads.pool.begun
    both = torch.cat([rows_of(1.0), rows_of(2.0)]).numpy().tobytes()
    assert call.payload == both + bytes(64 - len(both)) + both
    assert [one.shape for one in (*call.request.inputs, *call.request.grads)] == [(2, 3)] * 2


async def test_only_parts_of_one_kind_travel_together_and_no_more_than_a_call_may_carry(
    threads: Threads, autojump_clock
) -> None:
    long = JOINT_BYTES // 12 // 2 + 1  # two of them are too long for one call
    wide = part(4.0)
    wide.kind = "other"
    parts = [part(1.0), part(1.0, update=UPDATE), part(1.0, "ffn.2"), wide]
    parts += [part(2.0, rows=long), part(3.0, rows=long)]
    jobs = threads.ask(*parts)
    assert sorted((call.method, len(call.request.parts)) for call in threads.pool.begun) == [
        (BACKWARD, 1),
        (FORWARD, 1),
        (FORWARD, 1),
        (FORWARD, 1),
        (FORWARD, 2),
    ]
    assert len(jobs) == 6
    threads.pool.begun.clear()
    threads.ask(*(part(1.0) for _ in range(MAX_PARTS + 1)))
    assert [len(call.request.parts) for call in threads.pool.begun] == [MAX_PARTS, 1]


async def test_who_gives_up_ends_nobody_elses_call_and_the_last_one_cancels_it(
    threads: Threads, autojump_clock
) -> None:
    parts = [part(1.0), part(2.0), part(3.0)]
    jobs = threads.ask(*parts)
    [call] = threads.pool.begun
    jobs[0].cancel()
    call.answer([done(0), done(1)], rows_of(-1.0), rows_of(-2.0))
    assert [ended(job) for job in jobs] == [False, True, False]
    assert torch.equal(parts[1].tensors()[0], rows_of(-2.0))
    assert not call.cancelled
    jobs[2].cancel()
    assert call.cancelled
    assert threads.figures()["passes"] == 1


async def test_who_gave_up_before_it_was_begun_is_not_begun(
    threads: Threads, autojump_clock
) -> None:
    job = Job(threads.desk.ask, (part(1.0),), SECONDS, threads.desk)
    job.cancel()
    threads.desk.begin([job], threads.otherwise.append)
    assert not threads.pool.begun
    assert not threads.otherwise


async def test_an_error_of_a_part_is_its_callers_and_an_error_of_the_call_reaches_each(
    threads: Threads, autojump_clock
) -> None:
    jobs = threads.ask(part(1.0), part(2.0, "ffn.3"), part(3.0))
    [call] = threads.pool.begun
    call.answer([failed(1, LeaseLost("gone"))])
    assert [ended(job) for job in jobs] == [False, True, False]
    assert isinstance(jobs[1].error, LeaseLost)
    assert (jobs[1].error.peer, jobs[1].error.expert) == (peer(1).short, "ffn.3")
    assert "ffn.3" not in threads.service.view.uids
    call.call.ended(RemoteError("it broke"), RemoteError.code)
    assert [ended(jobs[0]), ended(jobs[2])] == [True, True]
    assert [type(jobs[0].error), type(jobs[2].error)] == [RemoteError] * 2
    assert jobs[0].error is not jobs[2].error
    assert threads.figures()[f"missed.{RemoteError.code}"] == 2


async def test_each_has_its_own_deadline(threads: Threads, autojump_clock) -> None:
    parts = [part(1.0, seconds=9.0), part(2.0, seconds=2.0), part(3.0, seconds=5.0)]
    jobs = threads.ask(*parts)
    [call] = threads.pool.begun
    assert call.budget == pytest.approx(9.0)
    await trio.sleep(2.5)
    assert [ended(job) for job in jobs] == [False, True, False]
    assert isinstance(jobs[1].error, CallTimeout)
    call.answer([done(1), done(0)], rows_of(-2.0), rows_of(-1.0))
    assert ended(jobs[0])
    assert torch.equal(parts[0].tensors()[0], rows_of(-1.0))
    assert not call.cancelled
    await trio.sleep(2.0)
    assert not ended(jobs[2])
    await trio.sleep(1.0)
    assert isinstance(jobs[2].error, CallTimeout)
    assert call.cancelled  # nobody waits any more
    assert threads.figures()["missed.timeout"] == 2


async def test_a_later_call_with_less_time_ends_first(threads: Threads, autojump_clock) -> None:
    [slow] = threads.ask(part(1.0, seconds=20.0))
    await trio.sleep(1.0)
    [fast] = threads.ask(part(2.0, seconds=1.0))
    await trio.sleep(1.5)
    assert [ended(slow), ended(fast)] == [False, True]
    await trio.sleep(18.0)
    assert ended(slow)


async def test_a_peer_that_does_not_end_its_answer_is_cancelled_when_the_time_is_over(
    threads: Threads, autojump_clock
) -> None:
    threads.ask(part(1.0))
    [call] = threads.pool.begun
    call.answer([done(0)], rows_of(-1.0))
    await trio.sleep(SECONDS - 1.0)
    assert not call.cancelled
    await trio.sleep(2.0)
    assert call.cancelled


@pytest.mark.parametrize("index", [0, 5])
async def test_an_answer_that_nobody_asked_for_fails_who_waits(
    index: int, threads: Threads, autojump_clock
) -> None:
    jobs = threads.ask(part(1.0), part(2.0))
    [call] = threads.pool.begun
    call.answer([done(0)], rows_of(-1.0))
    call.answer([done(index)], rows_of(-1.0), last=True)
    assert [job.error and job.error.why for job in jobs] == [None, "answer.index"]
    assert call.cancelled


async def test_an_answer_that_ends_too_early_fails_who_waits(
    threads: Threads, autojump_clock
) -> None:
    [job] = threads.ask(part(1.0))
    threads.pool.begun[0].call.ended(None, "ok")
    assert "before this part" in str(job.error)


async def test_rows_that_are_not_what_was_asked_for_fail_where_they_are_read(
    threads: Threads, autojump_clock
) -> None:
    spoilt, good, shapeless = part(1.0), part(2.0), part(3.0)
    threads.ask(spoilt, good)
    threads.pool.begun[0].answer([done(0), done(1)], rows_of(torch.inf), rows_of(-2.0), last=True)
    assert torch.equal(good.tensors()[0], rows_of(-2.0))
    with pytest.raises(NonFiniteError, match=r"ffn\.1"):
        spoilt.tensors()
    threads.ask(shapeless)
    threads.pool.begun[1].answer([done(0)], rows_of(-1.0, 2), last=True)
    with pytest.raises(MalformedMessage) as caught:
        shapeless.tensors()
    await threads.desk.regret(shapeless, caught.value)
    assert (threads.figures()["rows_served"], threads.figures()["missed.malformed"]) == (2, 1)


@pytest.mark.parametrize("why", ["shut", "full"])
async def test_what_cannot_be_begun_at_once_goes_the_ordinary_way(
    why: str, threads: Threads, autojump_clock
) -> None:
    setattr(threads.pool, why, True)
    parts = [part(1.0), part(2.0)]
    jobs = threads.ask(*parts)
    assert threads.otherwise == jobs
    for one in parts:
        await threads.desk.ask(one)
        assert torch.equal(one.tensors()[0], rows_of(*one.ask.inputs[0][0, :1].tolist()))
    assert threads.figures()["passes"] == 2


async def test_what_was_not_begun_is_asked_again_in_the_time_that_is_left(
    threads: Threads, autojump_clock
) -> None:
    threads.pool.experts["ffn.1"].delay = 60.0
    jobs = threads.ask(part(1.0), part(2.0))
    await trio.sleep(20.0)
    threads.pool.begun[0].call.ended(NotBegun("it said goodbye"), "lost")
    assert threads.otherwise == jobs
    began = trio.current_time()
    with pytest.raises(CallTimeout):
        await threads.desk.ask(*jobs[0].args)
    assert trio.current_time() - began == pytest.approx(SECONDS - 20.0)
    assert threads.figures()["passes"] == 1


class Losses:
    """The ordinary way, on which the first few answers are lost with their connections."""

    def __init__(self, pool: OpenPool, count: int) -> None:
        self.left, self.asked, self._open_call = count, 0, pool.open_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        if self.asked <= self.left:
            raise ConnectionLost("cut")
        return self._open_call(*args, **kwargs)


async def test_a_backward_answer_that_is_lost_is_asked_for_once_more_and_no_other_is(
    threads: Threads, monkeypatch, autojump_clock
) -> None:
    back = threads.ask(part(1.0, update=UPDATE), part(2.0, update=UPDATE))
    [forth] = threads.ask(part(3.0))
    for call in threads.pool.begun:
        call.call.ended(ConnectionLost("cut"), ConnectionLost.code)
    assert threads.otherwise == back
    assert isinstance(forth.error, ConnectionLost)
    await threads.desk.ask(*back[0].args)
    assert threads.pool.experts["ffn.1"].updates == [UPDATE]
    losses = Losses(threads.pool, 1)
    monkeypatch.setattr(threads.pool, "open_call", losses)
    with pytest.raises(ConnectionLost):
        await threads.desk.ask(*back[1].args)
    assert losses.asked == 1


@pytest.mark.parametrize(("update", "asked"), [(UPDATE, 2), (b"", 1)])
async def test_the_same_on_the_ordinary_way(
    update: bytes, asked: int, threads: Threads, monkeypatch, autojump_clock
) -> None:
    losses = Losses(threads.pool, 2)
    monkeypatch.setattr(threads.pool, "open_call", losses)
    with pytest.raises(ConnectionLost):
        await threads.desk.ask(part(1.0, update=update))
    assert losses.asked == asked


async def test_what_is_asked_once_more_is_late_at_the_same_time(
    threads: Threads, monkeypatch, autojump_clock
) -> None:
    monkeypatch.setattr(threads.pool, "open_call", Losses(threads.pool, 1))
    threads.pool.experts["ffn.1"].delay = 60.0
    began = trio.current_time()
    with pytest.raises(CallTimeout):
        await threads.desk.ask(part(1.0, update=UPDATE))
    assert trio.current_time() - began == pytest.approx(SECONDS)


async def test_who_gave_up_may_write_to_its_tensors_while_others_wait(
    threads: Threads, autojump_clock
) -> None:
    first, second = part(1.0), part(2.0)
    _, [alone] = Alone.request([first])
    _, [joint] = Alone.request([first, second])
    first.ask.inputs[0].fill_(9.0)
    assert bytes(alone) == rows_of(9.0).numpy().tobytes()
    assert bytes(joint) == torch.cat([rows_of(1.0), rows_of(2.0)]).numpy().tobytes()


async def test_the_end_of_a_connection_is_nothing_to_who_was_answered(
    threads: Threads, autojump_clock
) -> None:
    [job] = threads.ask(part(1.0))
    [call] = threads.pool.begun
    call.answer([done(0)], rows_of(-1.0))
    call.call.ended(ConnectionLost("cut"), ConnectionLost.code)
    assert job.error is None
    assert "ffn.1" in threads.service.view.uids


async def test_an_answer_without_parts_is_none_on_the_ordinary_way(
    threads: Threads, autojump_clock
) -> None:
    threads.pool.silent = {"ffn.1"}
    with pytest.raises(RemoteError, match="before this part"):
        await threads.desk.ask(part(1.0))


async def test_when_the_swarm_is_closed_everybody_is_told_and_the_far_side_too(
    threads: Threads, autojump_clock
) -> None:
    jobs = threads.ask(part(1.0), part(2.0))
    threads.desk.close()
    assert [type(job.error) for job in jobs] == [NodeClosed] * 2
    assert threads.pool.begun[0].cancelled
