"""Two live pools on a network in memory, and whatever may happen to them.

Connections are cut at any byte, peers stop hearing each other or die, lines pause, one side lies or
says goodbye, callers leave, and Trio takes tasks that are ready in any order. Each call ends with
its answer, with a typed error, or because its caller left; and in the end nothing is left: no task,
no call, no byte reserved, no credit astray. Under a virtual clock this takes no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.errors import P2PMoEError, PeerBusy
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.messages import Pong
from p2pmoe.testing.memory import Line
from tests.net.pools import Peer, World, host, world

KIB, MIB = 2**10, 2**20
SETTLED = 43.7  # virtual seconds until all has come to rest; no multiple of a ping
HELD = ("p2pmoe_calls_in_flight", "p2pmoe_payload_bytes")
SOAK_EXAMPLES = 20_000

sides = st.sampled_from([0, 1])
moments = st.floats(0.0, 5.0)
sizes = st.sampled_from([0, 1, 1000, 60 * KIB, 300 * KIB, 2 * MIB])


@dataclass(frozen=True)
class Ask:
    """A call: by whom and when, for how long, and what is answered."""

    who: int
    at: float
    patience: float
    bulk: bool
    size: int
    parts: tuple[int, ...]
    thinks: float  # seconds before each part
    fails: bool
    slow_reader: bool


@dataclass(frozen=True)
class Trouble:
    """What happens to the network or to a peer."""

    what: str
    at: float
    lasts: float
    who: int


@dataclass(frozen=True)
class Story:
    """All that happens, and in which order Trio takes tasks."""

    seed: int
    line: Line
    break_after: tuple[int, int] | None  # who sends, and after how many bytes its line breaks
    asks: tuple[Ask, ...]
    troubles: tuple[Trouble, ...]


lines = st.builds(
    Line,
    latency=st.sampled_from([0.0, 0.05]),
    jitter=st.sampled_from([0.0, 0.02]),
    bandwidth=st.sampled_from([math.inf, 1e6]),
)
asks = st.builds(
    Ask,
    who=sides,
    at=moments,
    patience=st.sampled_from([0.01, 0.3, 3.0, 60.0]),
    bulk=st.booleans(),
    size=sizes,
    parts=st.lists(sizes, max_size=3).map(tuple),
    thinks=st.sampled_from([0.0, 0.1, 2.0]),
    fails=st.booleans(),
    slow_reader=st.booleans(),
)
troubles = st.builds(
    Trouble,
    what=st.sampled_from(["cut", "part", "kill", "goodbye", "drop", "lie"]),
    at=moments,
    lasts=st.sampled_from([0.1, 3.0, 200.0]),
    who=sides,
)
cuts = st.one_of(st.integers(0, 2000), st.integers(0, 3 * MIB))
stories = st.builds(
    Story,
    seed=st.integers(0, 2**32),
    line=lines,
    break_after=st.none() | st.tuples(sides, cuts),
    asks=st.lists(asks, min_size=1, max_size=6).map(tuple),
    troubles=st.lists(troubles, max_size=3).map(tuple),
)


@dataclass
class Run:
    """One story as it goes."""

    story: Story
    world: World
    peers: list[Peer]
    outcomes: list[str] = field(default_factory=list)

    async def answer(self, call: IncomingCall) -> None:
        ask = self.story.asks[int.from_bytes(call.body, "big")]
        assert call.payload == bytes(ask.size)
        for number, size in enumerate(ask.parts):
            await trio.sleep(ask.thinks)
            await call.send(bytes([number]), [bytes(size)])
        if ask.fails:
            raise PeerBusy("as the story goes")

    async def ask(self, number: int) -> None:
        ask = self.story.asks[number]
        pool, to = self.peers[ask.who].pool, self.peers[1 - ask.who].contact
        await trio.sleep(ask.at)
        parts: list[int] = []
        outcome = "left"
        with trio.move_on_after(ask.patience):
            try:
                async with pool.open_call(
                    to, "answer", number.to_bytes(1, "big"), [bytes(ask.size)], bulk=ask.bulk
                ) as answer:
                    async for part in answer:
                        assert part.body == bytes([len(parts)])
                        parts.append(len(part.payload))
                        await trio.sleep(1.0 if ask.slow_reader else 0.0)
                outcome = "answered"
            except P2PMoEError as error:
                outcome = error.code
        assert tuple(parts) == ask.parts[: len(parts)]
        if outcome == "answered":
            assert tuple(parts) == ask.parts
            assert not ask.fails
        self.outcomes.append(outcome)

    async def trouble(self, trouble: Trouble) -> None:
        await trio.sleep(trouble.at)
        network, peer = self.world.network, self.peers[trouble.who]
        match trouble.what:
            case "cut":
                network.cut(host(0), host(1))
            case "part":
                network.partition([host(0)], [host(1)])
                await trio.sleep(trouble.lasts)
                network.heal()
            case "kill":
                network.kill(host(trouble.who))
            case "drop":
                peer.pool.forget(self.peers[1 - trouble.who].keys.peer_id)
            case "lie":  # it answers a ping that was never sent
                for connection in peer.pool._connections():
                    connection._core._outbox.put(Pong(n=2**40))
                    connection._changed()
            case _:
                with trio.move_on_after(trouble.lasts):
                    await peer.pool.drain()

    async def go(self) -> None:
        for peer in self.peers:
            peer.pool.handlers["answer"] = self.answer
        tasks = count_tasks()
        async with trio.open_nursery() as happenings:
            for number in range(len(self.story.asks)):
                happenings.start_soon(self.ask, number)
            for trouble in self.story.troubles:
                happenings.start_soon(self.trouble, trouble)
        assert len(self.outcomes) == len(self.story.asks)
        await trio.sleep(SETTLED)
        await trio.testing.wait_all_tasks_blocked()
        self.check_rest()
        with trio.fail_after(SETTLED):
            for peer in self.peers:
                await peer.pool.drain()
        await trio.testing.wait_all_tasks_blocked()
        assert count_tasks() <= tasks

    def check_rest(self) -> None:
        lent, owned = [], []
        for peer in self.peers:
            for name, value in peer.pool.stats().items():
                assert not value or not name.startswith(HELD), name
            cores = [connection._core for connection in peer.pool._connections()]
            assert all(core._outbox.empty for core in cores)
            assert all(c._window._left + c._window._freed == c._window._size for c in cores)
            lent.append(sorted(core._outbox._credit.left for core in cores))
            owned.append(sorted(core._window._left for core in cores))
        assert lent == owned[::-1]


def count_tasks() -> int:
    def below(task: trio.lowlevel.Task) -> int:
        nurseries = task.child_nurseries
        return 1 + sum(below(child) for each in nurseries for child in each.child_tasks)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    return below(root)


async def _tell(story: Story) -> list[str]:
    async with world(story.seed) as w:
        w.network.set_line(host(0), host(1), story.line)
        if story.break_after is not None:
            who, size = story.break_after
            w.network.break_after(host(who), host(1 - who), size)
        run = Run(story, w, [await w.peer(0), await w.peer(1)])
        await run.go()
        return run.outcomes


def tell(story: Story) -> list[str]:
    """Let a story happen; how its calls ended."""
    trio._core._run._r.seed(story.seed)
    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(_tell, story, clock=clock)


@pytest.fixture
def _any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A story's seed says in which order tasks are taken that are ready at once."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)


@pytest.mark.usefixtures("_any_order")
@given(stories)
@settings(max_examples=100)
def test_whatever_happens_every_call_ends_and_nothing_is_left_behind(story: Story) -> None:
    tell(story)


@pytest.mark.soak
@pytest.mark.usefixtures("_any_order")
def test_twenty_thousand_stories_leave_nothing_behind() -> None:
    outcomes: dict[str, int] = {}

    @given(stories)
    @settings(max_examples=SOAK_EXAMPLES)
    def each(story: Story) -> None:
        for outcome in tell(story):
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    each()
    print(outcomes)  # noqa: T201  the figures
    assert len(outcomes) > 4
