"""Two exchange cores and a line between them, in whatever order calls, frames and time come.

The model knows what was asked, answered, failed and cancelled. Whatever happens, each call has one
outcome, its parts are those that were sent, and nothing that was reserved or lent is left behind.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pmoe.net.calls import CallArrived, CallCancelled, CallEnded, CallLost, PartArrived
from p2pmoe.net.outbox import OutFrame
from p2pmoe.net.quota import QuotaParams
from tests.net.sides import Side, pair

SIZES = [0, 1, 70_000, 300_000, 1_200_000]
LIMITS = QuotaParams(calls_a_peer=6, payload_a_peer=8_000_000)
sides = st.sampled_from([0, 1])
sizes = st.sampled_from(SIZES)
ZEROS = bytes(max(SIZES))


@dataclass
class Asked:
    """A call, as its caller sees it."""

    sizes: list[int] = field(default_factory=list)  # of the parts that came
    outcome: CallEnded | CallLost | None = None
    cancelled: bool = False


@dataclass
class Served:
    """The same call, as the other side sees it."""

    sizes: list[int] = field(default_factory=list)  # of the parts that were sent
    code: str | None = None  # once it has ended
    cancelled: bool = False


class TwoSides(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sides = pair(LIMITS)
        self.lines: tuple[deque[OutFrame], deque[OutFrame]] = (deque(), deque())
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

    @rule(who=sides, which=st.integers(0, 5), size=sizes)
    def reply(self, who: int, which: int, size: int) -> None:
        if (call := self._running(who, which)) is not None:
            self.served[who][call].sizes.append(size)
            self.sides[who].core.reply(call, b"", [ZEROS[:size]])

    @rule(who=sides, which=st.integers(0, 5), code=st.sampled_from(["", "internal"]))
    def end(self, who: int, which: int, code: str) -> None:
        if (call := self._running(who, which)) is not None:
            self.served[who][call].code = code
            self.sides[who].core.end(call, code)

    @rule(who=sides)
    def leave(self, who: int) -> None:
        if len(self.asked[0]) + len(self.asked[1]) > 8:  # late, or there is nothing to see
            self.sides[who].core.leave()

    # -------------------------------------------------------------- the line
    @rule(who=sides, frames=st.integers(1, 30))
    def send(self, who: int, frames: int) -> None:
        for _ in range(frames):
            if (out := self.sides[who].core.next_frame()) is None:
                return
            self.lines[who].append(out)

    @rule(who=sides, frames=st.integers(1, 30))
    def deliver(self, who: int, frames: int) -> None:
        receiver = self.sides[1 - who]
        for _ in range(min(frames, len(self.lines[who]))):
            receiver.deliver(self.lines[who].popleft())
            self._see(1 - who)

    @rule()
    def time_passes(self) -> None:
        self.now += 0.7
        for side in self.sides:
            side.now = self.now
            side.core.heard(1, self.now, inside_frame=False)
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
    def the_deadline_is_not_before_now(self) -> None:
        assert all(side.core.next_deadline() > self.now - 0.7 for side in self.sides)

    def teardown(self) -> None:
        for who in (0, 1):
            self.sides[who].core.leave()
        self._come_to_rest()
        for who, side in enumerate(self.sides):
            other = self.sides[1 - who]
            assert side.core.finished
            assert side.core.calls == (0, 0)
            assert side.account.calls == side.account.payload == 0
            assert side.core._outbox._credit.left == other.core._window._left
            for call, asked in self.asked[who].items():
                self._check(asked, self.served[1 - who].get(call))

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
            before = [len(side.effects) for side in self.sides]
            for who in (0, 1):
                while (call := self._running(who, 0)) is not None:
                    self.served[who][call].code = ""
                    self.sides[who].core.end(call)
                self.send(who, 1000)
            moved = any(self.lines) or before != [len(side.effects) for side in self.sides]
            for who in (0, 1):
                self.deliver(who, 1000)
            assert moved, "nothing moves, and calls are left"

    # -------------------------------------------------------------- the model
    def _running(self, who: int, which: int) -> int | None:
        running = [c for c, s in self.served[who].items() if s.code is None]
        return running[which % len(running)] if running else None

    def _see(self, who: int) -> None:
        """Tell the model what happened on one side; its caller takes parts at once."""
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
                    side.core.taken(effect.id, len(effect.part.payload))
                case _:
                    asked = self.asked[who][effect.id]
                    assert asked.outcome is None
                    assert not asked.cancelled
                    asked.outcome = effect
        side.effects.clear()


TwoSides.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestTwoSides = TwoSides.TestCase
