"""Thousands of members in virtual time: the real membership cores, without Trio, sockets or keys.

A `SimulatedMember` is the shell of one core, by the shell's own rules: a process that was stopped
first reads all that waits, then looks at its clock; what the core wants sent is handed over and
forgotten. `SimulatedSwarm` has the members, the links between them and the truth about who lives,
with which it compares what members believe. Signatures are not made: whoever calls `sign` is
believed; sizes are those of the real encodings.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from p2pmoe.gossip.membership import (
    Changed,
    Dial,
    Equivocation,
    Membership,
    MembershipParams,
    Neighbours,
    Refute,
    Send,
    State,
)
from p2pmoe.gossip.messages import GossipMessage, Leave, Suspect, encode_message
from p2pmoe.identity import PeerId
from p2pmoe.testing.links import Host, LinkParams, Links
from p2pmoe.testing.simulator import Simulation
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.schema import SignedPayload

T = TypeVar("T", bound=SignedPayload)

CALL_BYTES = 94  # around a message: TLS record, frame, header of the call; measured
ANSWER_BYTES = 75  # the empty answer to that call; measured
SEAL_BYTES = 83  # signature, kind, lengths of an envelope, without its 32-byte key; measured
STALL = 0.2  # seconds that a shell may be late before it tells its core; as `gossip/service.py`
MOST_WAITING = 10_000  # messages that a stopped process' kernel keeps; beyond, senders wait
KINDS = {PeerRecord: Kind.PEER, Suspect: Kind.SUSPECT, Leave: Kind.LEAVE}


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmParams:
    """What members and links are like."""

    links: LinkParams
    membership: MembershipParams = field(default_factory=MembershipParams)


@dataclass(frozen=True, slots=True)
class Seen:
    """One member changed its mind about another."""

    when: float
    observer: int
    subject: int
    was: State | None
    state: State
    wrong: bool  # whether a live one was taken for suspect, dead or gone


@dataclass(frozen=True, slots=True)
class Starved:
    """Who reads what came in only now and then, while its timers run. Mean seconds, exponential."""

    deaf: float = 4.0
    reads: float = 0.5


class SimulatedMember:
    """One process: its core, its inbox, its clock."""

    def __init__(self, swarm: SimulatedSwarm, index: int, peer: PeerId) -> None:
        self.swarm, self.index, self.peer = swarm, index, peer
        self.host = Host.REFUSING
        self.core: Membership | None = None
        self.epoch = 0
        self.skew = 0.0  # seconds that its clock is ahead
        self.card: Signed[PeerRecord] | None = None
        self.inbox: deque[tuple[str, int, Any]] = deque()
        self.left = self.deaf = False
        self.neighbours: dict[int, None] = {}
        self._wakes = math.inf  # when, on the simulation's clock

    @property
    def now(self) -> float:
        """What its clock says."""
        return self.swarm.simulation.now + self.skew

    def sign(self, body: T) -> Signed[T]:
        """An envelope that everybody believes to be this member's."""
        return sign(self.peer, body)

    def new_card(self) -> Signed[PeerRecord]:
        """The record of a new process, with a higher epoch than the last one had."""
        self.epoch = max(self.epoch + 1, 1 + int(1000 * self.now))
        host = f"10.{self.index >> 16 & 255}.{self.index >> 8 & 255}.{self.index & 255}"
        record = PeerRecord(epoch=self.epoch, incarnation=1, addresses=(f"{host}:4747",))
        self.card = self.sign(record)
        return self.card

    def start(
        self, contacts: Sequence[Signed[PeerRecord]], settled: Iterable[Signed[PeerRecord]] = ()
    ) -> None:
        """Its process begins, with the newest card; what is settled is no news to anybody."""
        assert self.card is not None
        self.left = self.deaf = False
        self._set(Host.UP)
        dice = self.swarm.simulation.dice(f"member {self.index} {self.epoch}")
        params = self.swarm.params.membership
        self.core = Membership(self.card, self.sign, params, dice, self.now)
        self.inbox.clear()
        self.neighbours.clear()
        self._wakes = math.inf
        for record in settled:
            if record is not self.card:
                self.core._roster.record(record, self.now)
                self.core._roster.broadcasts.forget(record.signer)
        self._do(self.core.join(contacts, self.now) if contacts else self.core.tick(self.now))
        self._look()

    def _keep(self, number: int) -> None:
        """Dial a neighbour that there is no connection to."""
        links = self.swarm.links
        if self.host is Host.UP and number in self.neighbours:
            if wait := links.backoff(self.index, number):
                self.swarm.simulation.after(wait, self._keep, number)
            elif not links.is_connected(self.index, number):
                links.dial(self.index, number)

    # -------------------------------------------------------------------- what the network says
    def arrived(self, source: int, message: Any) -> None:
        """A message came in."""
        self._take(("message", source, message))

    def connected(self, peer: int) -> None:
        """A control connection is up."""
        self._take(("connected", peer, None))

    def unreachable(self, peer: int, *, refused: bool) -> None:
        """A control connection broke, or a dial failed."""
        self._take(("unreachable", peer, refused))

    def _take(self, what: tuple[str, int, Any]) -> None:
        if self.host is Host.FROZEN or self.deaf:
            if len(self.inbox) < MOST_WAITING:
                self.inbox.append(what)
        elif self.host is Host.UP:
            self._read(what)
            self._look()

    def _read(self, what: tuple[str, int, Any]) -> None:
        kind, other, content = what
        assert self.core is not None
        peer = self.swarm.members[other].peer
        if kind == "message":
            self._do(self.core.receive(peer, content, self.now))
            if self.swarm.after_reading:
                self.swarm.after_reading(self.index)
        elif kind == "connected":
            self._do(self.core.connected(peer, self.now))
        else:
            self._do(self.core.unreachable(peer, self.now, refused=content))
            self._keep(other)

    # ------------------------------------------------------------------------------- its clock
    def _look(self) -> None:
        """Do what is due, and wake up for what will be."""
        assert self.core is not None
        if self.now >= self.core.next_deadline():
            self._do(self.core.tick(self.now))
        wakes = self.core.next_deadline() - self.skew
        if wakes < self._wakes:
            self._wakes = wakes
            self.swarm.simulation.at(wakes, self._wake, wakes)

    def _wake(self, when: float) -> None:
        if when == self._wakes and self.host is Host.UP:
            self._wakes = math.inf
            self._look()

    def stop(self) -> None:
        """As SIGSTOP does: its kernel goes on."""
        if self.host is Host.UP:
            self._set(Host.FROZEN)

    def resume(self) -> None:
        """As SIGCONT does: it reads what waits, and then looks at its clock."""
        if self.host is not Host.FROZEN:
            return
        assert self.core is not None
        self._set(Host.UP)
        late = self.now - self.core.next_deadline()
        if late > STALL:
            self.core.slow(late)
        self._wakes = math.inf
        self.hear()

    def hear(self) -> None:
        """It reads again: all that waits."""
        self.deaf = False
        while self.inbox and self.host is Host.UP:
            self._read(self.inbox.popleft())
        if self.host is Host.UP:
            self._look()

    def end(self, silent: bool = False) -> None:
        """As SIGKILL does, or as a cut cable."""
        self._set(Host.SILENT if silent else Host.REFUSING)
        self.core = None

    def leave(self) -> None:
        """Say that it leaves; the process ends a little later."""
        assert self.core is not None
        self.left = True
        self._do(self.core.leave(self.now))
        self._look()

    def renew(self) -> tuple[int, int]:
        """Sign its record anew, as after a change of what it serves; the new order."""
        assert self.card is not None
        assert self.core is not None
        body = self.card.body
        self.card = self.sign(msgspec.structs.replace(body, incarnation=body.incarnation + 1))
        self._do(self.core.own_record(self.card, self.now))
        self._look()
        return self.card.body.order

    def jump(self, seconds: float) -> None:
        """Its clock leaps forward."""
        assert self.core is not None
        self.skew += seconds
        if self.host is Host.UP:
            self._look()

    def _set(self, host: Host) -> None:
        self.host = host
        self.swarm.links.set_host(self.index, host)

    # ------------------------------------------------------------------------ what its core wants
    def _do(self, effects: Iterable[Any]) -> None:
        swarm = self.swarm
        for effect in effects:
            match effect:
                case Send(to=to, message=message):
                    swarm.send(self.index, to, message)
                case Neighbours(peers=peers):
                    self.neighbours = {swarm.index[peer]: None for peer in peers}
                    for number in self.neighbours:
                        self._keep(number)
                case Dial(peer=peer):
                    swarm.links.dial(self.index, swarm.index[peer])
                case Changed(peer=peer, was=was, state=state):
                    swarm.note(self.index, swarm.index[peer], was, state)
                case Refute(record=record):
                    assert self.card is None or record.body.order > self.card.body.order
                    self.card = record
                case Equivocation():
                    swarm.equivocations += 1
                case other:
                    raise AssertionError(f"an effect nobody carries out: {other!r}")


class SimulatedSwarm:
    """The members by number, the links between them, and the truth."""

    def __init__(self, seed: int, params: SwarmParams, size: int) -> None:
        self.simulation, self.params = Simulation(seed), params
        naming = self.simulation.dice("names")
        self.members = [
            SimulatedMember(self, number, PeerId(naming.randbytes(32))) for number in range(size)
        ]
        self.index = {member.peer: member.index for member in self.members}
        self.links = Links(self.simulation, params.links, self.members)
        for member in self.members:
            self.links.set_host(member.index, member.host)
        self.dice = self.simulation.dice("faults")
        self.seen: list[Seen] = []
        self.equivocations = 0
        self.after_reading: Callable[[int], None] | None = None  # called with the member's number
        self._trace = hashlib.sha256()

    # --------------------------------------------------------------------------------- the course
    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.simulation.now

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        self.simulation.run(self.now + seconds)

    def start_settled(self, count: int | None = None) -> None:
        """The first so many at once, each knowing all, as in a swarm that has been up for long."""
        members = self.members[:count]
        cards = [member.new_card() for member in members]
        for member in members:
            member.start((), cards)

    def start_joining(self, apart: float = 0.1) -> None:
        """One after the other; each knows the first one."""
        for member in self.members:
            self.simulation.at(member.index * apart, self.join, member.index)

    def join(self, number: int, via: int = 0) -> None:
        """A member starts, or starts anew, and knows one other."""
        card = self.members[via].card
        self.members[number].new_card()
        self.members[number].start([] if card is None or number == via else [card])

    def restart(self, number: int) -> None:
        """A member starts anew with those it knew: its peers cache."""
        member = self.members[number]
        cards = [other.card for other in self.members if other.card and other is not member]
        member.new_card()
        member.start(cards)

    def pause(self, number: int, seconds: float) -> None:
        """A process stops for so long, and goes on."""
        self.members[number].stop()
        self.simulation.after(seconds, self.members[number].resume)

    def starve(self, number: int, starved: Starved, until: float) -> None:
        """From now on a member reads now and then only."""
        if self.now >= until:
            return
        member = self.members[number]
        member.deaf = True
        deaf = self.dice.expovariate(1 / starved.deaf)
        reads = self.dice.expovariate(1 / starved.reads)
        self.simulation.after(deaf, member.hear)
        self.simulation.after(deaf + reads, self.starve, number, starved, until)

    # ---------------------------------------------------------------------------------- the truth
    def alive(self, number: int) -> bool:
        """Whether the process runs or is stopped, and has not left."""
        member = self.members[number]
        return member.host in {Host.UP, Host.FROZEN} and not member.left

    @property
    def living(self) -> list[SimulatedMember]:
        """All that are alive."""
        return [member for member in self.members if self.alive(member.index)]

    def false_deaths(self) -> list[Seen]:
        """When somebody took a live member for dead."""
        return [each for each in self.seen if each.state is State.DEAD and each.wrong]

    def disagreements(self) -> list[tuple[int, int, State | None]]:
        """(observer, subject, what it believes) wherever that is not so."""
        wrong = []
        for observer in self.living:
            assert observer.core is not None
            for subject in self.members:
                if subject is observer:
                    continue
                entry = observer.core.member(subject.peer)
                state = entry.state if entry else None
                if (state is State.ALIVE) != self.alive(subject.index):
                    wrong.append((observer.index, subject.index, state))
        return wrong

    # --------------------------------------------------------------------------------- what happens
    def send(self, source: int, to: PeerId, message: GossipMessage) -> None:
        """Hand a message to the links, with its size."""
        self.links.send(source, self.index[to], message, size_of(message))

    def note(self, observer: int, subject: int, was: State | None, state: State) -> None:
        """A member changed its mind."""
        wrong = state is not State.ALIVE and self.alive(subject)
        seen = Seen(self.now, observer, subject, was, state, wrong)
        self.seen.append(seen)
        self._trace.update(repr(seen).encode())  # names and numbers: no hash, no address

    def digest(self) -> str:
        """Of all that was seen and sent: equal for equal runs."""
        tally, trace = self.links.tally, self._trace.copy()
        trace.update(repr((tally, self.simulation.events, self.now)).encode())
        return trace.hexdigest()


def sign(signer: PeerId, body: T) -> Signed[T]:
    """An envelope of a real one's length, by a key that nobody checks."""
    payload = schema.encode(body)
    raw = signer.raw + payload.ljust(len(payload) + SEAL_BYTES)
    return Signed(signer, signer.raw, KINDS[type(body)], body, raw)


def size_of(message: GossipMessage) -> int:
    """Bytes of a message on its connection, and of the empty answer."""
    return CALL_BYTES + ANSWER_BYTES + len(encode_message(message))
