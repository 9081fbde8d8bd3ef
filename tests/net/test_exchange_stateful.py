"""Two exchange cores and a line between them, in whatever order calls, bytes and time come.

The model knows what was asked, answered, failed and cancelled. Whatever happens, each call has one
outcome, its parts are those that were sent, and nothing that was reserved or lent is left behind.
The line delivers bytes, cut anywhere; it may break at any moment.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pmoe.net.calls import CallArrived, CallCancelled, CallEnded, CallLost, PartArrived
from p2pmoe.net.messages import INLINE_BYTES, Cancel, End, Request, decode_header
from p2pmoe.net.quota import QuotaParams
from p2pmoe.wire.framing import BULK_LIMITS, FrameReader, frame_prefix
from tests.net.sides import Side, pair

SIZES = [0, 1, INLINE_BYTES, INLINE_BYTES + 1, 70_000, 300_000, 1_200_000]
LIMITS = QuotaParams(calls_a_peer=6, payload_a_peer=8_000_000)
sides = st.sampled_from([0, 1])
sizes = st.sampled_from(SIZES)
ALL = 10**8  # bytes; more than are ever on the line
ZEROS = bytes(max(SIZES))


@dataclass
class Asked:
    """A call, as its caller sees it."""

    sizes: list[int] = field(default_factory=list)  # of the parts that came
    outcome: CallEnded | CallLost | None = None
    cancelled: bool = False
    begun: bool = False
    cancels: int = 0  # frames
    ends: int = 0


@dataclass
class Served:
    """The same call, as the other side sees it."""

    sizes: list[int] = field(default_factory=list)  # of the parts that were sent
    code: str | None = None  # once it has ended
    cancelled: bool = False


class TwoSides(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sides = pair(LIMITS, inline=INLINE_BYTES)
        self.lines: tuple[deque[memoryview], deque[memoryview]] = (deque(), deque())
        self.readers = FrameReader(BULK_LIMITS), FrameReader(BULK_LIMITS)
        self.untaken: tuple[deque[PartArrived], deque[PartArrived]] = (deque(), deque())
        self.last_ids = [0, 0]  # as each side's GOODBYE names them
        self.broken = False
        self.asked: tuple[dict[int, Asked], dict[int, Asked]] = ({}, {})
        self.served: tuple[dict[int, Served], dict[int, Served]] = ({}, {})
        self.now = 0.0

    # -------------------------------------------------------------- the program's commands
    @rule(who=sides, size=sizes, budget=st.sampled_from([1.0, 100.0]))
    def ask(self, who: int, size: int, budget: float) -> None:
        core = self.sides[who].core
        if core.open and core.calls[0] < LIMITS.calls_a_peer:
            call = core.ask("x", b"", [ZEROS[:size]], budget)
            self.asked[who][call] = Asked()

    @rule(who=sides, which=st.integers(0, 5))
    def cancel(self, who: int, which: int) -> None:
        waiting = [c for c, a in self.asked[who].items() if not (a.outcome or a.cancelled)]
        if waiting:
            call = waiting[which % len(waiting)]
            self.asked[who][call].cancelled = True
            self.sides[who].core.cancel(call)

    @rule(who=sides, which=st.integers(0, 5), size=sizes, last=st.booleans())
    def reply(self, who: int, which: int, size: int, last: bool) -> None:
        if (call := self._running(who, which)) is not None:
            self.served[who][call].sizes.append(size)
            self.sides[who].core.reply(call, b"", [ZEROS[:size]])
            if last:
                self.served[who][call].code = ""
                self.sides[who].core.end(call)

    @rule(who=sides, which=st.integers(0, 5), code=st.sampled_from(["", "internal"]))
    def end(self, who: int, which: int, code: str) -> None:
        if (call := self._running(who, which)) is not None:
            self.served[who][call].code = code
            self.sides[who].core.end(call, code)

    @rule(who=sides)
    def leave(self, who: int) -> None:
        if self._late and not self.broken:
            self._leave(who)

    @rule(who=sides, parts=st.integers(1, 5))
    def take(self, who: int, parts: int) -> None:
        for _ in range(min(parts, len(self.untaken[who]))):
            part = self.untaken[who].popleft()
            self.sides[who].core.taken(part.id, len(part.part.payload))

    # -------------------------------------------------------------- the line
    @rule(who=sides, frames=st.integers(1, 30))
    def send(self, who: int, frames: int) -> None:
        for _ in range(frames):
            if (out := self.sides[who].core.next_frame()) is None:
                return
            pieces = frame_prefix(len(out.header), out.size), out.header, *out.payload
            self.lines[who].append(memoryview(b"".join(pieces)))
            header = decode_header(out.header)
            if out.ends or isinstance(header, End):
                self.asked[1 - who][header.id].ends += 1
            if isinstance(header, Request):
                self.asked[who][header.id].begun = True
            elif isinstance(header, Cancel):
                self.asked[who][header.id].cancels += 1

    @rule(who=sides, size=st.sampled_from([1, 60, 5000, 400_000, ALL, ALL]) | st.integers(1, ALL))
    def deliver(self, who: int, size: int) -> None:
        receiver = self.sides[1 - who]
        while size and self.lines[who] and not self.broken:
            data = self.lines[who].popleft()
            if len(data) > size:
                self.lines[who].appendleft(data[size:])
                data = data[:size]
            size -= len(data)
            for frame in self.readers[1 - who].receive_data(bytes(data)):
                receiver.effects += receiver.core.receive(frame, self.now)
                self._see(1 - who)
            inside = self.readers[1 - who].inside_frame
            receiver.core.heard(len(data), self.now, inside_frame=inside)

    @rule(who=sides)
    def pass_on(self, who: int) -> None:
        self.send(who, 1000)
        self.deliver(who, ALL)

    @precondition(lambda self: self._late)
    @rule()
    def break_(self) -> None:
        if not self.broken:
            self.broken = True
            for who, side in enumerate(self.sides):
                self.lines[who].clear()
                side.effects += side.core.close()
                self._see(who)

    @rule()
    def time_passes(self) -> None:
        self.now += 0.7
        for side in self.sides:
            side.now = self.now
            if not self.broken:
                inside = self.readers[side is self.sides[1]].inside_frame
                side.core.heard(200_000, self.now, inside_frame=inside)
                side.core.tick(self.now)

    # -------------------------------------------------------------- what must hold
    @invariant()
    def calls_in_flight_are_bounded(self) -> None:
        for side in self.sides:
            ours, theirs = side.core.calls
            assert ours <= LIMITS.calls_a_peer
            assert theirs == side.account.calls <= LIMITS.calls_a_peer
            assert 0 <= side.account.payload <= LIMITS.payload_a_peer

    @invariant()
    def no_credit_is_forgotten(self) -> None:
        for side in self.sides:
            for call in side.core._own._calls.values():
                window = call.window
                given_back = window._freed + call.withheld
                assert call.cancelled or window._left + given_back == window._size

    @invariant()
    def an_end_comes_once(self) -> None:
        for calls in self.asked:
            assert all(call.ends <= 1 and call.cancels <= 1 for call in calls.values())

    @invariant()
    def the_deadline_is_not_before_now(self) -> None:
        if not self.broken:
            assert all(side.core.next_deadline() > self.now - 0.7 for side in self.sides)

    def teardown(self) -> None:
        if not self.broken:
            for who in (0, 1):
                self._leave(who)
            self._come_to_rest()
        for who, side in enumerate(self.sides):
            assert side.core.calls == (0, 0)
            assert side.account.calls == side.account.payload == 0
            for asked in self.asked[who].values():
                assert (asked.outcome is None) == asked.cancelled
            if not self.broken:
                self._check_rest(who)

    def _check_rest(self, who: int) -> None:
        core, other = self.sides[who].core, self.sides[1 - who].core
        assert core.finished
        assert core._outbox._credit.left == other._window._left
        assert core._window._left + core._window._freed == core._window._size
        for call, asked in self.asked[who].items():
            self._check(asked, self.served[1 - who].get(call))
            taken = asked.begun and call <= self.last_ids[1 - who]
            assert asked.ends == taken, "one END for each call that was taken"

    def _check(self, asked: Asked, served: Served | None) -> None:
        if asked.cancelled:
            assert asked.outcome is None
            return
        outcome = asked.outcome
        assert outcome is not None
        if isinstance(outcome, CallLost):
            assert not outcome.begun
            assert served is None
        elif outcome.code in {"", "internal"}:
            assert served is not None
            assert (outcome.code, asked.sizes) == (served.code, served.sizes)
        else:
            assert outcome.code in {"busy", "timeout"}

    def _come_to_rest(self) -> None:
        while not (all(side.core.finished for side in self.sides) and not any(self.lines)):
            for who in (0, 1):
                self.take(who, 1000)
                while (call := self._running(who, 0)) is not None:
                    self.served[who][call].code = ""
                    self.sides[who].core.end(call)
                self.send(who, 1000)
            assert any(self.lines), "nothing moves, and calls are left"
            for who in (0, 1):
                self.deliver(who, ALL)

    # -------------------------------------------------------------- the model
    @property
    def _late(self) -> bool:
        """Whether enough has happened that an end has something to end."""
        return len(self.asked[0]) + len(self.asked[1]) > 6

    def _leave(self, who: int) -> None:
        core = self.sides[who].core
        if not core.leaving:
            self.last_ids[who] = core.last_id
            core.leave()

    def _running(self, who: int, which: int) -> int | None:
        if self.broken:
            return None
        running = [c for c, s in self.served[who].items() if s.code is None]
        return running[which % len(running)] if running else None

    def _see(self, who: int) -> None:
        """Tell the model what happened on one side."""
        side: Side = self.sides[who]
        for effect in side.effects:
            match effect:
                case CallArrived():
                    assert effect.id not in self.served[who]
                    self.served[who][effect.id] = Served()
                case CallCancelled():
                    served = self.served[who][effect.id]
                    assert not served.cancelled
                    served.cancelled = True
                case PartArrived():
                    asked = self.asked[who][effect.id]
                    assert not asked.cancelled
                    assert asked.outcome is None
                    asked.sizes.append(len(effect.part.payload))
                    self.untaken[who].append(effect)
                case _:
                    asked = self.asked[who][effect.id]
                    assert asked.outcome is None
                    assert not asked.cancelled
                    asked.outcome = effect
        side.effects.clear()


TwoSides.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestTwoSides = TwoSides.TestCase
