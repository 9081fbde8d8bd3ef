"""Every order in which two calls, their chunks, their cancels and all deliveries can happen.

Two cores, the two lines between them and what their programs know are one state. From each state
every step is tried that a program, a writer or the line could take next; a state that was seen
before is not gone into again. So nothing is left to chance: what is asserted holds in all runs of
these small cases. Windows are made a few bytes small, so that three chunks already need credit.

A core's step depends on that core alone. It is computed once, on a copy, and then looked up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import pytest

from p2pmoe.net import credit, own_calls
from p2pmoe.net.calls import CallArrived, CallCancelled, CallEnded, Effect, PartArrived
from p2pmoe.net.exchange import Exchange, ExchangeParams
from p2pmoe.net.messages import (
    Cancel,
    Chunk,
    Credit,
    End,
    Goodbye,
    Header,
    Reply,
    Request,
    decode_header,
)
from p2pmoe.net.quota import QuotaParams
from p2pmoe.wire.framing import Frame

CHUNK = 2  # bytes
WINDOW = 4  # bytes, at first: two chunks
LARGEST = 8
PAYLOAD = bytes(3 * CHUNK)

header_of = cache(decode_header)


class OnLine(NamedTuple):
    """A frame on its way; payloads are zeros. It `ends` an answer."""

    header: bytes
    size: int
    ends: bool


class Step(NamedTuple):
    """What happens next: at which core, and to which call."""

    what: str
    core: int
    call: int = 0


@dataclass(frozen=True)
class Case:
    """Who asks the two calls, and how many bytes go each way in each.

    There are at least `states`, and `room` for so many calls at a side at a time. Payloads of up
    to `inline` bytes stand in their messages' own frames. An answer's end may be known only some
    time after its part, `apart` from it.
    """

    askers: tuple[int, int]
    asked: int
    answered: int
    states: int
    room: int = 2
    inline: int = 0
    apart: bool = True

    @property
    def numbers(self) -> tuple[int, int]:
        return (1, 3) if self.askers == (0, 0) else (1, 2)


CASES = [
    Case((0, 0), 0, 3 * CHUNK, 50_000, apart=False),
    Case((0, 0), 3 * CHUNK, 0, 9_000),
    Case((0, 0), 3 * CHUNK, 0, 2_000, room=1),
    Case((0, 0), 3 * CHUNK, 3 * CHUNK, 1_000, inline=3 * CHUNK),
    Case((0, 1), 3 * CHUNK, 3 * CHUNK, 1_000, inline=3 * CHUNK),
    Case((0, 1), 3 * CHUNK, 0, 40_000),
    Case((0, 1), 0, 3 * CHUNK, 88_000, apart=False),
    Case((0, 0), 0, 2 * CHUNK, 100_000),
]


class Account:
    """A peer's account without rates; they would make states differ that do not."""

    params = QuotaParams()

    def __init__(self, room: int) -> None:
        self.calls = self.payload = 0
        self.room = room

    def begin_call(self, method: str, size: int, now: float) -> float:
        if self.calls == self.room:
            return 1.0
        self.calls += 1
        self.payload += size
        return 0.0

    def end_call(self) -> None:
        self.calls -= 1

    def reserve(self, size: int) -> bool:
        self.payload += size
        return True

    def release(self, size: int) -> None:
        self.payload -= size

    def count_frame(self, now: float) -> None: ...

    def count_cancel(self, now: float) -> None: ...


def allocate(size: int) -> memoryview:
    return memoryview(bytearray(size))


# ------------------------------------------------------------------ one core
LEAVES = {int, float, str, bool, bytes, memoryview, type(None), type(allocate)}
LEAVES |= {ExchangeParams, QuotaParams, Request, Reply, End, Cancel, Goodbye}
KINDS: dict[type, tuple[str, ...]] = {}  # the attributes of each class that was met


def attributes(value: object) -> tuple[str, ...]:
    kind = type(value)
    if kind not in KINDS:
        slots = [parent.__dict__.get("__slots__", ()) for parent in kind.__mro__]
        KINDS[kind] = tuple(name for names in slots for name in names) or tuple(vars(value))
    return KINDS[kind]


def copied(value: Any, done: dict[int, Any]) -> Any:
    """A deep copy; payloads are zeros wherever they are, so they are shared."""
    kind = type(value)
    if kind in LEAVES:
        return value
    if id(value) in done:
        return done[id(value)]
    copy: Any
    if kind is set:
        return set(value)
    if kind is dict:
        copy = done[id(value)] = {}
        copy.update((key, copied(each, done)) for key, each in value.items())
    elif kind is deque:
        copy = done[id(value)] = deque()
        copy.extend(copied(each, done) for each in value)
    else:
        copy = done[id(value)] = object.__new__(kind)
        for name in attributes(value):
            object.__setattr__(copy, name, copied(getattr(value, name), done))
    return copy


def shape(value: Any, seen: dict[int, int]) -> Any:
    """What makes a core the same as another: all values, and which objects are shared."""
    kind = type(value)
    if kind in LEAVES:
        return len(value) if kind is memoryview else value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    if kind is set:
        return frozenset(value)
    if kind is dict:
        return tuple((key, shape(each, seen)) for key, each in value.items())
    if kind is deque:
        return tuple(shape(each, seen) for each in value)
    return tuple(shape(getattr(value, name), seen) for name in attributes(value))


class Cores:
    """All states that one side's core was seen in, by number, and what leads from each to which."""

    def __init__(self, core: Exchange) -> None:
        self._numbers: dict[Any, int] = {}
        self.known: list[Exchange] = []
        self.first = self._number(core)
        self._steps: dict[Any, tuple[int, Any]] = {}

    def step(self, number: int, step: Step, frame: OnLine | None, answer: int) -> tuple[int, Any]:
        """The state after a step, and what came of it: a frame, or effects."""
        key = number, step.what, step.call, frame
        if key not in self._steps:
            core = copied(self.known[number], {})
            outcome = _do(core, step, frame, answer)
            self._steps[key] = self._number(core), outcome
        return self._steps[key]

    def _number(self, core: Exchange) -> int:
        number = self._numbers.setdefault(shape(core, {}), len(self.known))
        if number == len(self.known):
            self.known.append(core)
        return number


def _do(core: Exchange, step: Step, frame: OnLine | None, answer: int) -> Any:
    match step.what:
        case "send":
            out = core.next_frame()
            assert out is not None
            ends = bool(out.ends) or isinstance(header_of(out.header), End)
            return OnLine(out.header, out.size, ends)
        case "cancel":
            core.cancel(step.call)
        case "reply" | "answer":
            core.reply(step.call, b"", [PAYLOAD[:answer]])
            if step.what == "answer":
                core.end(step.call)
        case "end":
            core.end(step.call)
        case _:
            assert frame is not None
            whole = Frame(frame.header, memoryview(PAYLOAD)[: frame.size])
            effects = core.receive(whole, 0.0)
            core.heard(1, 0.0, inside_frame=False)
            for effect in effects:
                if isinstance(effect, PartArrived):
                    core.taken(effect.id, len(effect.part.payload))
            return effects
    return ()


# ------------------------------------------------------------------ two of them
@dataclass(frozen=True, slots=True)
class Call:
    """One call, as both programs see it, and what crossed the line for it."""

    asker: int
    number: int
    cancelled: bool = False
    arrived: bool = False
    told: bool = False  # the answering side was told that it is cancelled
    replied: bool = False  # by the program there
    answered: bool = False  # to the end
    parts: int = 0
    over: bool = False  # its caller knows the outcome
    requests: int = 0  # frames sent
    cancels: int = 0
    ends: int = 0
    heard_end: bool = False


class State(NamedTuple):
    """The numbers of two cores' states, what is on the line from each, and the calls."""

    cores: tuple[int, int]
    lines: tuple[tuple[OnLine, ...], tuple[OnLine, ...]]
    calls: tuple[Call, Call]


class World:
    """The rules by which one state follows another."""

    def __init__(self, case: Case) -> None:
        self.case = case
        cores = [
            Exchange(
                ExchangeParams(
                    dialler=not side,
                    chunk_bytes=CHUNK,
                    payload_bytes=len(PAYLOAD),
                    inline_bytes=case.inline,
                    ping_after=9.0,
                ),
                Account(case.room),  # type: ignore[arg-type]  # of the same shape
                allocate,
                0.0,
            )
            for side in (0, 1)
        ]
        for asker, number in zip(case.askers, case.numbers, strict=True):
            assert cores[asker].ask("x", b"", [PAYLOAD[: case.asked]], 30.0) == number
        self.sides = Cores(cores[0]), Cores(cores[1])
        one, two = map(Call, case.askers, case.numbers)
        self.first = State((self.sides[0].first, self.sides[1].first), ((), ()), (one, two))

    def core(self, state: State, side: int) -> Exchange:
        return self.sides[side].known[state.cores[side]]

    def steps(self, state: State) -> Iterator[Step]:
        for side in (0, 1):
            if self.core(state, side).sendable:
                yield Step("send", side)
            if state.lines[1 - side]:
                yield Step("deliver", side)
        for call in state.calls:
            if call.arrived and not call.answered:
                at_once = "reply" if self.case.apart else "answer"
                yield Step("end" if call.replied else at_once, 1 - call.asker, call.number)
            if not (call.over or call.cancelled):
                yield Step("cancel", call.asker, call.number)

    def after(self, state: State, step: Step) -> State:
        side = step.core
        lines, calls, frame = list(state.lines), {c.number: c for c in state.calls}, None
        if step.what == "deliver":
            frame, *rest = lines[1 - side]
            lines[1 - side] = tuple(rest)
        number, outcome = self.sides[side].step(state.cores[side], step, frame, self.case.answered)
        if step.what == "send":
            lines[side] += (outcome,)
            _sent(calls, header_of(outcome.header), ends=outcome.ends)
        elif frame is not None:
            _delivered(calls, side, frame, outcome)
        else:
            known = {"cancel": "cancelled", "reply": "replied"}.get(step.what, "answered")
            calls[step.call] = replace(calls[step.call], **{known: True})
        cores = (number, state.cores[1]) if side == 0 else (state.cores[0], number)
        one, two = calls.values()
        return State(cores, (lines[0], lines[1]), (one, two))

    # -------------------------------------------------------------- what holds always
    def check(self, state: State) -> None:
        for sender in (0, 1):
            self._check_credit(state, sender, None)
            for call in state.calls:
                if not call.cancelled:
                    self._check_credit(state, sender, call)
        for call in state.calls:
            assert call.cancels <= call.requests <= 1
            assert call.ends <= call.requests

    def _check_credit(self, state: State, sender: int, call: Call | None) -> None:
        """What a receiver may still get is what its sender may send, or is on its way as one of
        bytes and credit: nothing is lost, and nothing invented."""
        number = call.number if call else 0
        there, here = self.core(state, sender)._outbox, self.core(state, 1 - sender)
        spent = there._streams[number].credit if number in there._streams else there._credit
        window = _window(here, call, 1 - sender)
        if window is None or (call and number not in there._streams):
            return
        coming = sum(
            frame.size
            for frame in state.lines[sender]
            if isinstance(header := header_of(frame.header), Chunk) and number in {0, header.id}
        )
        granted = here._outbox._announced.get(number, 0) + sum(
            header.size
            for frame in state.lines[1 - sender]
            if isinstance(header := header_of(frame.header), Credit) and header.id == number
        )
        assert window._left == spent.left + coming + granted
        assert 0 <= window._left <= window._size <= LARGEST
        assert call or window._left + window._freed == window._size

    def check_rest(self, state: State) -> None:
        """Nothing can happen any more: so everything is over, and everything is back."""
        for side in (0, 1):
            core = self.core(state, side)
            assert core.calls == (0, 0)
            assert core._outbox.empty
            assert not core._outbox._streams
            assert core.unsent_bytes == 0
            assert core._quota.payload == core._quota.calls == 0
            window = self.core(state, 1 - side)._window
            assert core._outbox._credit.left == window._left
        for call in state.calls:
            assert call.over != call.cancelled
            assert call.requests == call.ends == call.heard_end, "one END for each call begun"
            assert call.requests or call.cancelled


def _window(core: Exchange, call: Call | None, side: int) -> credit.Window | None:
    if call is None:
        return core._window
    calls = core._own._calls if call.asker == side else core._theirs._calls
    return calls[call.number].window if call.number in calls else None


def _sent(calls: dict[int, Call], header: Header, *, ends: bool) -> None:
    if ends:
        assert isinstance(header, Reply | Chunk | End)
        calls[header.id] = replace(calls[header.id], ends=calls[header.id].ends + 1)
    match header:
        case Request(id=number):
            calls[number] = replace(calls[number], requests=calls[number].requests + 1)
        case Cancel(id=number):
            calls[number] = replace(calls[number], cancels=calls[number].cancels + 1)
        case _:
            pass


def _delivered(calls: dict[int, Call], to: int, frame: OnLine, effects: list[Effect]) -> None:
    header = header_of(frame.header)
    if isinstance(header, Reply | End | Chunk):
        call = calls[header.id]
        assert call.asker != to or not call.heard_end, "nothing comes after the END"
        if frame.ends:
            calls[header.id] = replace(call, heard_end=True)
    for effect in effects:
        call = calls[effect.id]
        match effect:
            case CallArrived():
                assert not call.arrived
                calls[effect.id] = replace(call, arrived=True)
            case CallCancelled():
                assert call.cancels == 1
                assert not call.told
                calls[effect.id] = replace(call, told=True)
            case PartArrived():
                assert not call.over
                assert not call.cancelled
                calls[effect.id] = replace(call, parts=call.parts + 1)
            case _:
                assert isinstance(effect, CallEnded)
                assert not call.over
                assert not call.cancelled
                assert (effect.code, call.parts) in {("", 1), ("busy", 0)}
                calls[effect.id] = replace(call, over=True)


# ------------------------------------------------------------------ the search
def reduced(state: State, steps: list[Step]) -> list[Step]:
    """Enough steps to see every run up to the order of what two sides do without knowing it.

    While a frame is on its way to a side, the other one neither adds to what that side may do next
    nor takes from it; so its own steps can go first.
    """
    for side in (0, 1):
        if state.lines[1 - side]:
            return [step for step in steps if step.core == side]
    return steps


def explore(case: Case, *, every_order: bool) -> tuple[int, set[State]]:
    """Visit all states; how many there are, and those at which nothing more happens."""
    world = World(case)
    seen, todo, edges, ends = {world.first}, [world.first], 0, set()
    while todo:
        state = todo.pop()
        steps = list(world.steps(state))
        if not steps:
            world.check_rest(state)
            ends.add(state)
        for step in steps if every_order else reduced(state, steps):
            following = world.after(state, step)
            edges += 1
            if following not in seen:
                world.check(following)
                seen.add(following)
                todo.append(following)
    print(f"{case}: {len(seen)} states, {edges} steps, {len(ends)} ends")  # noqa: T201  the figures
    return len(seen), ends


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, size in [
        (credit, "FIRST_WINDOW_BYTES", WINDOW),
        (credit, "MAX_WINDOW_BYTES", LARGEST),
        (own_calls, "HELD_BYTES", WINDOW),
    ]:
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("case", CASES[:5])
def test_whatever_the_order_calls_end_once_and_all_credit_comes_back(case: Case) -> None:
    states, ends = explore(case, every_order=False)
    assert states >= case.states / 4
    assert len(ends) > (50 if case.apart else 35)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_the_order_of_what_the_two_sides_do_apart_makes_no_difference(case: Case) -> None:
    states, ends = explore(case, every_order=True)
    assert states >= case.states
    assert len(ends) == len(explore(case, every_order=False)[1])
