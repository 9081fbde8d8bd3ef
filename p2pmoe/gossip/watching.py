"""How a peer that is no member learns of failures: it watches members (`gossip.watch`).

A watch is a call with many parts: first who is not well, then each change as it happens. It ends
after a while, and whoever still wants to know calls again. What a watched member says is a hint: a
client acts on it at once where that costs nothing, and looks for itself before it believes it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Annotated

import msgspec
import trio

from p2pmoe import telemetry
from p2pmoe.errors import P2PMoEError, PeerBusy
from p2pmoe.gossip.events import MemberEvent, MemberReturned, MemberSuspected, event_of
from p2pmoe.gossip.members import Member, State
from p2pmoe.gossip.messages import SealedRecord
from p2pmoe.identity import PeerId
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.pool import PeerConnected, PeerLost, Pool, PoolEvent
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Signed, VerifiedCache
from p2pmoe.wire.peer_record import PeerRecord, contact_of, open_record
from p2pmoe.wire.schema import Message

WATCH = "gossip.watch"
MOST_CHANGES = 64  # in one part: 40 KiB
MOST_PARTS = 200  # of one watch; an answer may have 256
MOST_WATCHERS = 256  # a member; a guess
UNREAD = 64  # changes that a watcher may have to read; then its watch ends. A guess
WATCH_FOR = 25.0  # seconds of one watch; below the 30 of a call without a deadline
WATCHED = 2  # members that a client watches, so that one of them may die or lie; a guess
LOOK_AGAIN = 1.0  # seconds until another member is looked for; a guess
KNOWN = 64  # members that a client remembers to watch; a guess
VERIFIED = 1024  # digests of records that a client remembers; a guess
CHECKED_AT_ONCE = 16  # signatures between two checkpoints: 4 ms


class WatchRequest(Message, frozen=True, kw_only=True):
    """Tell me who fails, leaves and returns."""


class Change(Message, frozen=True, kw_only=True):
    """The state that the member holds a peer for, with that peer's own record."""

    state: State
    record: SealedRecord


class WatchReply(Message, frozen=True, kw_only=True):
    """What has changed; in the first part, who is not alive."""

    changes: Annotated[tuple[Change, ...], msgspec.Meta(max_length=MOST_CHANGES)]


class Watchers:
    """The clients that watch this member."""

    def __init__(self) -> None:
        self._watching: set[trio.MemorySendChannel[Change]] = set()

    def tell(self, state: State, record: Signed[PeerRecord]) -> None:
        """A member's state is another. Who has not read for long is told to begin anew."""
        change = Change(state=state, record=record.raw)
        for watcher in list(self._watching):
            try:
                watcher.send_nowait(change)
            except trio.WouldBlock:
                self._watching.discard(watcher)
                watcher.close()

    def close(self) -> None:
        """Answer nobody any more: this member leaves, and its end waits for calls in flight."""
        for watcher in self._watching:
            watcher.close()

    async def answer(self, call: IncomingCall, members: Mapping[PeerId, Member]) -> None:
        """Answer a watch until its time is over."""
        schema.decode(call.body, WatchRequest)
        if len(self._watching) >= MOST_WATCHERS:
            raise PeerBusy(f"{MOST_WATCHERS} clients watch this member: watch another one")
        unwell = [
            Change(state=one.state, record=one.record.raw)
            for one in members.values()
            if one.state is not State.ALIVE
        ]
        send, receive = trio.open_memory_channel[Change](UNREAD)
        self._watching.add(send)
        try:
            with send, receive, trio.move_on_after(WATCH_FOR):
                for at in range(0, max(1, len(unwell)), MOST_CHANGES):
                    await _send(call, unwell[at : at + MOST_CHANGES])
                for _ in range(MOST_PARTS - len(unwell) // MOST_CHANGES):
                    await _send(call, [await receive.receive(), *_at_hand(receive)])
        except trio.EndOfChannel:  # it reads too slowly
            telemetry.count("p2pmoe_gossip_watches_cut_total")
        finally:
            self._watching.discard(send)


def _at_hand(receive: trio.MemoryReceiveChannel[Change]) -> Iterable[Change]:
    """What else fits in the same part."""
    for _ in range(min(MOST_CHANGES - 1, receive.statistics().current_buffer_used)):
        yield receive.receive_nowait()


async def _send(call: IncomingCall, changes: list[Change]) -> None:
    await call.send(schema.encode(WatchReply(changes=tuple(changes))))


class Watching:
    """A client's watches, over members that it is connected to. `run` must be running.

    `look(peer)` finds out for itself whether a peer answers, `concerned(peer)` says whether this
    client may want to ask it. Observers are told what turned out to be true, and at once, that a
    peer is suspected.
    """

    def __init__(
        self,
        pool: Pool,
        network: bytes,
        look: Callable[[PeerId], Awaitable[bool]],
        concerned: Callable[[PeerId], bool],
        rng: random.Random,
    ) -> None:
        self.observers: list[Callable[[MemberEvent], None]] = []  # told between awaits
        self._pool, self._network, self._rng = pool, network, rng
        self._look, self._concerned = look, concerned
        self._members: dict[PeerId, Signed[PeerRecord]] = {}
        self._watched: set[PeerId] = set()
        self._verified = VerifiedCache(VERIFIED)
        self._said: dict[PeerId, State] = {}  # what was said last of peers that are not alive
        self._looking: set[PeerId] = set()
        pool.observers.append(self._observe)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as watches:
            for _ in range(WATCHED):
                watches.start_soon(self._watch_on, watches)
            task_status.started()

    async def _watch_on(self, looks: trio.Nursery) -> None:
        while True:
            free = [peer for peer in self._members if peer not in self._watched]
            if free := [peer for peer in free if self._pool.usable(peer)]:
                await self._watch(looks, self._rng.choice(free))
            await trio.sleep(LOOK_AGAIN)

    async def _watch(self, looks: trio.Nursery, peer: PeerId) -> None:
        """Watch one member until the watch ends."""
        self._watched.add(peer)
        contact = contact_of(self._members[peer])
        asked = schema.encode(WatchRequest())
        try:
            with trio.move_on_after(2 * WATCH_FOR):
                async with self._pool.open_call(contact, WATCH, asked) as parts:
                    async for part in parts:
                        await self._read(looks, schema.decode(part.body, WatchReply))
        except P2PMoEError as error:
            telemetry.emit("gossip.watch.failed", peer=peer, error=error)
            self._members.pop(peer, None)  # until it is connected again
        finally:
            self._watched.discard(peer)

    async def _read(self, looks: trio.Nursery, reply: WatchReply) -> None:
        for at, change in enumerate(reply.changes, 1):
            record = open_record(change.record, self._network, self._verified)
            peer, was = record.signer, self._said.get(record.signer, State.ALIVE)
            if change.state is not was and self._concerned(peer):
                self._note(peer, change.state)
                self._hear(looks, change.state, record)
            if at % CHECKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    def _note(self, peer: PeerId, state: State) -> None:
        if state is State.ALIVE:
            self._said.pop(peer, None)
        elif len(self._said) < VERIFIED:
            self._said[peer] = state

    def _hear(self, looks: trio.Nursery, state: State, record: Signed[PeerRecord]) -> None:
        """Somebody says that a peer is in this state now."""
        if state is not State.ALIVE:
            self._tell(MemberSuspected(record.signer, record))
        if state is not State.SUSPECT and record.signer not in self._looking:
            self._looking.add(record.signer)
            looks.start_soon(self._see, state, record)

    async def _see(self, said: State, record: Signed[PeerRecord]) -> None:
        """Look whether it is so."""
        try:
            there = await self._look(record.signer)
        finally:
            self._looking.discard(record.signer)
        if there:
            self._said.pop(record.signer, None)
            self._tell(MemberReturned(record.signer, record))
        elif said is not State.ALIVE:
            self._tell(event_of(State.SUSPECT, said, record))

    def _tell(self, event: MemberEvent) -> None:
        for observer in self.observers:
            observer(event)

    def _observe(self, event: PoolEvent) -> None:
        match event:
            case PeerConnected(record=Signed() as record):
                if len(self._members) < KNOWN or event.peer in self._members:
                    self._members[event.peer] = record
            case PeerLost():
                self._members.pop(event.peer, None)
            case _:
                pass
