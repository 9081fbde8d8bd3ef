"""The Trio shell of the membership: one loop with one timer around the machine.

Rules: the loop reads all that has come before it looks at the clock, and after a stall it lets
those read first that wait for their turn, so that a node that stood still accuses nobody who has
answered. It never waits for one peer: what it sends goes into bounded lines. Signatures are
checked a few at a time, by one call at a time. It decides nothing.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import trio

from p2pmoe import telemetry
from p2pmoe.errors import DuplicateIdentity, P2PMoEError
from p2pmoe.gossip.events import MemberEvent, event_of
from p2pmoe.gossip.lines import TELL, Lines
from p2pmoe.gossip.membership import (
    Changed,
    Dial,
    Effect,
    Equivocation,
    Membership,
    MembershipParams,
    Neighbours,
    Refute,
    Send,
    State,
)
from p2pmoe.gossip.messages import STEP, GossipMessage, Leave, News, Opening, Suspect
from p2pmoe.gossip.watching import WATCH, Watchers
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.incoming import IncomingCall, Prompt, Task
from p2pmoe.net.pool import DialFailed, PeerConnected, PeerLost, Pool, PoolEvent
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.peer_record import PeerRecord, contact_of, seal_record

AT_ONCE = 256  # messages between two looks at the clock
INBOX = 1024  # messages that wait for the loop; memberlist's queue a priority
BARE = 128  # bytes of a message, too few for an envelope, whose key and signature have 96
SLOW = 0.1  # seconds that the loop may be late; a guess, above what a busy training thread does
# to it (26 ms at the 99th percentile)
CATCH_UP = 0.25  # seconds that others may read after a stall, at most; a guess
DIALS = 16  # at once; a guess, all neighbours of a joiner
DIAL_LIMIT = 6.0  # seconds; a connection's limit and a greeting
MOST = 2**16 - 1  # that an answer to a probe can say
LEAVE_LIMIT = 1.0  # seconds in which others hear that this member leaves; serf's
REMEMBER_EVERY = 5.0  # seconds between two looks whether to write the live members down; a guess
MOST_REFUSED = 4096  # peers whose last failed dial is remembered; as many as back-offs

_NAMES: dict[State, Literal["alive", "suspect", "dead", "left"]] = {
    State.ALIVE: "alive",
    State.SUSPECT: "suspect",
    State.DEAD: "dead",
    State.LEFT: "left",
}
Step = Callable[[float], list[Effect]]  # something for the machine, at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Another peer, as this node sees it. `since`, `rtt` and `last_heard` are in seconds.

    `state` is alive, suspect, dead or left, and `since` says for how long. `load` is the share of
    its time that it computes, in thousandths; `last_heard` how long ago it answered a probe.
    """

    peer: PeerId
    state: Literal["self", "alive", "suspect", "dead", "left"]
    record: Signed[PeerRecord]
    since: float
    load: int = 0
    free_slots: int = 0
    rtt: float = 0.0
    last_heard: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipParts:
    """What the membership works with.

    `load` gives (thousandths, free slots) of this node; `adopt` takes its own record when it was
    signed anew; `remember` writes records of live members down, and may block.
    """

    pool: Pool
    keys: KeyPair
    network: bytes
    load: Callable[[], tuple[int, int]]
    adopt: Callable[[Signed[PeerRecord]], None]
    remember: Callable[[Sequence[bytes]], None] | None = None
    params: MembershipParams = field(default_factory=MembershipParams)


class GossipService:
    """One member. Made inside Trio, with the record of its first signing."""

    def __init__(self, parts: GossipParts, own: Signed[PeerRecord], rng: random.Random) -> None:
        self.observers: list[Callable[[MemberEvent], None]] = []  # told between awaits
        self._parts, self._lines = parts, Lines(parts.pool)
        sign = partial(_sign, parts.keys, parts.network)
        self._core = Membership(own, sign, parts.params, rng, trio.current_time())
        self._inbox: deque[Step] = deque()
        self._mail = trio.Event()
        self._said_all = trio.Event()
        self._waiting = 0  # messages in the inbox; what else is there is bounded by connections
        self._turn = trio.Lock()  # to check signatures
        self._room = STEP  # of signatures that are checked as they come, until the loop's next turn
        self._watchers = Watchers()
        self._met: dict[PeerId, Signed[PeerRecord]] = {}  # connected now, with their records
        self._dialling: set[PeerId] = set()
        self._refused: dict[PeerId, bool] = {}  # how the last dial of a peer failed
        self._dials = trio.CapacityLimiter(DIALS)
        self._neighbours: frozenset[PeerId] = frozenset()
        self._disk = trio.CapacityLimiter(1)
        parts.pool.handlers[TELL] = Prompt(self._hear)
        parts.pool.handlers[WATCH] = self._watch
        parts.pool.observers.append(self._observe)

    def _load(self) -> tuple[int, int]:
        load, free_slots = self._parts.load()
        return min(load, MOST), min(free_slots, MOST)

    # ------------------------------------------------------------------------------------ looking
    def members(self) -> list[Member]:
        """The others that are known, the dead and those that left included."""
        now = trio.current_time()
        return [
            Member(
                peer=peer,
                state=_NAMES[one.state],
                record=one.record,
                since=now - one.since,
                load=one.load,
                free_slots=one.free_slots,
                rtt=one.rtt,
                last_heard=None if one.last_heard is None else now - one.last_heard,
            )
            for peer, one in self._core.members().items()
        ]

    def section(self) -> Mapping[str, Mapping[str, int | str]]:
        """How many members there are in each state, and this node's own figures."""
        states = Counter(one.state for one in self._core.members().values())
        load, free_slots = self._load()
        return {
            "members": {state.value: states[state] for state in State},
            "own": {
                "load": load,
                "free_slots": free_slots,
                "epoch": self._core.own.body.epoch,
                "incarnation": self._core.own.body.incarnation,
                "neighbours": len(self._neighbours),
            },
        }

    # ----------------------------------------------------------------------------------- commands
    def join(self, known: Iterable[Signed[PeerRecord]]) -> None:
        """Find the swarm by these, and by those that are connected already."""
        records = [*self._met.values(), *known]
        self._step(lambda now: self._core.join(records, now))

    def own_record(self, record: Signed[PeerRecord]) -> None:
        """This node has signed its record anew: tell everybody."""
        self._inbox.appendleft(partial(self._core.own_record, record))  # before any refutation
        self._mail.set()

    async def leave(self) -> None:
        """Say that this member leaves, and wait a moment until others have heard it."""

        def leave(now: float) -> list[Effect]:
            self._said_all.set()
            return self._core.leave(now)

        self._step(leave)
        with trio.move_on_after(LEAVE_LIMIT):
            await self._said_all.wait()
            await trio.lowlevel.checkpoint()  # the loop hands over what it has to say
            await self._lines.empty()
        self._watchers.close()

    # --------------------------------------------------------------------------------------- life
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be a member until cancelled. Raises `DuplicateIdentity`."""
        async with trio.open_nursery() as senders:
            if self._parts.remember is not None:
                senders.start_soon(self._remember, self._parts.remember)
            task_status.started()
            try:
                while True:
                    await self._turn_over(senders)
            finally:
                self._said_all.set()  # whoever waits to leave, waits in vain

    async def _turn_over(self, senders: trio.Nursery) -> None:
        """Wait for news or for the timer, and work off what there is."""
        due = self._core.next_deadline()
        with trio.move_on_at(due):
            await self._mail.wait()
        if (late := trio.current_time() - due) > SLOW:
            telemetry.count("p2pmoe_gossip_stalls_total")
            await trio.sleep(min(late, CATCH_UP))  # the machine sees by itself that it is late
        self._mail, self._room = trio.Event(), STEP
        now = trio.current_time()
        self._core.load = self._load()
        for _ in range(min(AT_ONCE, len(self._inbox))):
            self._perform(senders, self._inbox.popleft()(now))
        if self._inbox:
            self._mail.set()
        self._perform(senders, self._core.tick(now))
        await trio.lowlevel.checkpoint()

    async def _remember(self, remember: Callable[[Sequence[bytes]], None]) -> None:
        """Write down who is alive when that has changed; never that nobody is."""
        written: set[bytes] = set()
        while True:
            await trio.sleep(REMEMBER_EVERY)
            if (alive := self._alive()) and written != set(alive):
                await trio.to_thread.run_sync(remember, alive, limiter=self._disk)
                written = set(alive)

    def _alive(self) -> list[bytes]:
        """The records of members that were heard of last, first."""
        alive = [one for one in self._core.members().values() if one.state is State.ALIVE]
        alive.sort(key=lambda one: one.last_heard or -math.inf, reverse=True)
        return [one.record.raw for one in alive]

    # ----------------------------------------------------------------------------- what comes in
    def _step(self, step: Step) -> None:
        self._inbox.append(step)
        self._mail.set()

    def _hear(self, call: IncomingCall) -> Task | None:
        """A message; what has many signatures, or comes after many, is opened in a task."""
        if self._waiting >= INBOX:
            telemetry.count("p2pmoe_gossip_dropped_total", why="inbox")
            call.finish()
            return None
        opening = Opening(call.body, self._parts.network, self._parts.pool.verified)
        if len(call.body) > BARE and (self._turn.locked() or not self._room):
            return partial(self._open, opening)
        if opening.step(self._room or STEP):
            self._room = 0
            return partial(self._open, opening)
        self._room -= min(self._room, len(opening.message.claims))
        self._opened(opening, call)
        call.finish()
        return None

    async def _open(self, opening: Opening, call: IncomingCall) -> None:
        self._waiting += 1
        try:
            more = True
            while more:
                async with self._turn:
                    more = opening.step()
        finally:
            self._waiting -= 1
        self._opened(opening, call)

    def _opened(self, opening: Opening, call: IncomingCall) -> None:
        self._waiting += 1
        self._step(partial(self._received, call.peer, opening.message))

    def _received(self, sender: PeerId, message: GossipMessage, now: float) -> list[Effect]:
        self._waiting -= 1
        return self._core.receive(sender, message, now)

    async def _watch(self, call: IncomingCall) -> None:
        await self._watchers.answer(call, self._core.members())

    def _observe(self, event: PoolEvent) -> None:
        """What the pool sees of peers; of clients, nothing."""
        peer = event.peer
        match event:
            case PeerConnected(record=Signed() as record):
                self._met[peer] = record
                self._refused.pop(peer, None)
                self._step(partial(self._core.learn, record))
                self._step(partial(self._core.connected, peer))
            case PeerLost() if self._met.pop(peer, None) is None:
                pass
            case PeerLost(error=None):
                self._step(partial(self._closed, peer))
            case PeerLost(error=P2PMoEError() as error):
                self._unreachable(peer, refused=_is_refusal(error))
            case DialFailed(error=error):
                self._failed(peer, error)

    def _closed(self, peer: PeerId, now: float) -> list[Effect]:  # noqa: ARG002  a `Step`
        """In order: it was idle, or the peer said goodbye."""
        return self._core.closed(peer)

    def _failed(self, peer: PeerId, error: P2PMoEError) -> None:
        """Somebody's dial failed; those of this service are reported where they are made."""
        if self._core.member(peer) is None:
            return
        if len(self._refused) >= MOST_REFUSED:
            self._refused.clear()
        self._refused[peer] = _is_refusal(error)
        if peer not in self._dialling:
            self._unreachable(peer, refused=self._refused[peer])

    def _unreachable(self, peer: PeerId, *, refused: bool) -> None:
        self._step(lambda now: self._core.unreachable(peer, now, refused=refused))

    # --------------------------------------------------------------------------- what is to be done
    def _perform(self, senders: trio.Nursery, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to=peer, message=message):
                    if (record := self._met.get(peer)) is not None:
                        self._lines.put(contact_of(record), message)
                case Dial(peer=peer, record=record):
                    self._dial(senders, peer, record)
                case Neighbours(peers=peers):
                    before, self._neighbours = self._neighbours, frozenset(peers)
                    self._keep(senders, self._neighbours - before)
                case Refute(record=record):
                    self._parts.adopt(record)
                case Changed():
                    self._tell(effect)
                case Equivocation():
                    self._report(effect)

    def _keep(self, senders: trio.Nursery, fresh: frozenset[PeerId]) -> None:
        """Connect to those who are neighbours now; what becomes of the others, probes find out."""
        for peer in fresh - self._met.keys():
            if (member := self._core.member(peer)) is not None:
                self._dial(senders, peer, member.record)

    def _dial(self, senders: trio.Nursery, peer: PeerId, record: Signed[PeerRecord]) -> None:
        if peer in self._met:
            self._step(partial(self._core.connected, peer))
        elif peer not in self._dialling:
            self._dialling.add(peer)
            senders.start_soon(self._reach, record)

    async def _reach(self, record: Signed[PeerRecord]) -> None:
        """Open a connection, by telling nothing on it; the pool's event says that it is there."""
        peer = record.signer
        try:
            async with self._dials:
                with trio.fail_after(DIAL_LIMIT):
                    await self._lines.tell(contact_of(record), GossipMessage(News()))
        except (P2PMoEError, trio.TooSlowError) as error:
            telemetry.emit("gossip.dial.failed", peer=peer, error=error)
            self._unreachable(peer, refused=self._refused.get(peer, False))
        finally:
            self._dialling.discard(peer)

    def _tell(self, changed: Changed) -> None:
        """Those that listen: here, and clients elsewhere."""
        event = event_of(changed.was, changed.state, changed.record)
        telemetry.count("p2pmoe_gossip_changes_total", state=changed.state.value)
        telemetry.emit("gossip.member", peer=changed.peer, state=changed.state.value)
        for observer in self.observers:
            observer(event)
        self._watchers.tell(changed.state, changed.record)

    def _report(self, found: Equivocation) -> None:
        """Two records of one order, by one key."""
        telemetry.count("p2pmoe_gossip_equivocations_total")
        if found.peer == self._parts.keys.peer_id:
            raise DuplicateIdentity(
                f"another process uses the key of this node, {found.peer}: stop one of them, or"
                " give it a state folder of its own",
                peer=found.peer.short,
            )
        advice = "its key is used by two processes: its operator should stop one of them"
        telemetry.complain(
            found.peer.hex, "gossip.equivocation", level="warning", peer=found.peer, advice=advice
        )


def _is_refusal(error: P2PMoEError) -> bool:
    """Whether a machine is there that says that nothing listens; each transport says it so."""
    text = str(error)
    return "connection refused" in text and "no answer within" not in text


def _sign(keys: KeyPair, network: bytes, body: PeerRecord | Suspect | Leave) -> Signed[Any]:
    if isinstance(body, PeerRecord):
        return seal_record(keys, body, network)
    kind = Kind.SUSPECT if isinstance(body, Suspect) else Kind.LEAVE
    return seal(keys, body, kind=kind, network=network)
