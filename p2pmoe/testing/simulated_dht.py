"""Thousands of peers of the DHT in virtual time: the real cores, without Trio, sockets or keys.

A peer here is its contacts with their routing table, its record store, and the connections that it
has; `World` carries questions between peers and charges what the network would: a round trip, a
dial where no connection is up, a timeout where nobody answers. `Search` carries one lookup out as
`dht/search.py` does. Rules: signatures are not made (whoever calls `sign` is believed), sizes are
those of the real encodings, and all chance comes from the simulation's named dice.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from p2pmoe.dht.asks import ASK_LIMIT, PUT_LIMIT
from p2pmoe.dht.contacts import ContactParams, Contacts
from p2pmoe.dht.leases import RecordCopy, Vote
from p2pmoe.dht.packing import Packer
from p2pmoe.dht.reading import Answer, Question
from p2pmoe.dht.records import RecordParams, RecordStore
from p2pmoe.dht.region import NetworkSize
from p2pmoe.dht.routing import Insertion, PingOldest
from p2pmoe.dht.search import SearchParams
from p2pmoe.identity import PeerId, distance
from p2pmoe.testing.simulator import Latency, Simulation
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.schema import SignedPayload

T = TypeVar("T", bound=SignedPayload)

ID_BITS = 256
DIAL_TO_READ = 2  # round trips before a question that goes out behind one's own HELLO
DIAL_TO_WRITE = 3  # round trips before one that waits for the other's HELLO
DIAL_BYTES = 2600  # a handshake with both HELLOs, both ways; measured over TLS 1.3
FRAME_BYTES = 64  # around one call or answer: frame, header, TLS record; rounded up
ENVELOPE_BYTES = 115  # around a signed payload: key, signature, kind, lengths; measured
SURELY_FIT = 24  # records that fit one answer whatever their size; packing decides beyond
PORT = 4747


@dataclass(frozen=True, slots=True)
class Mend:
    """Others have more records of this kind under this key."""

    kind: Kind
    key: bytes


@dataclass(frozen=True, slots=True)
class Put:
    """A record for a holder; a lease with what its owner before signed, if it was handed over."""

    record: Signed[Any]
    transfer: Signed[Any] | None = None


Asked = bytes | Question | Put | Mend  # a place to find, a key to get, a record to put
Reply = Answer | Vote
Then = Callable[[Reply | None], None]


class Connections(Enum):
    """What a dial costs."""

    UP = "up"  # nothing: every connection that is needed is there
    POOL = "pool"  # a dial, but for the last 128 peers of each node
    COLD = "cold"  # a dial, for every peer that a search meets; between others they are up


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldParams:
    """What the peers are like. Seconds."""

    latency: Latency
    contacts: ContactParams = field(default_factory=ContactParams)
    records: RecordParams = field(default_factory=RecordParams)
    search: SearchParams = field(default_factory=SearchParams)
    connections: Connections = Connections.UP
    pooled: int = 128  # connections a node keeps; as `net.pool.PoolParams`


@dataclass(slots=True)
class Tally:
    """What was sent, by everybody."""

    calls: int = 0
    dials: int = 0
    bytes: int = 0
    timeouts: int = 0


class SimulatedPeer:
    """One peer: what the node of a real one keeps."""

    __slots__ = (
        "alive", "answers", "card", "contacts", "epoch", "id", "incarnation", "index", "links",
        "listed", "mended", "size", "store",
    )  # fmt: skip

    def __init__(self, index: int, identity: PeerId, card: Signed[PeerRecord]) -> None:
        self.index, self.id, self.card = index, identity, card
        self.contacts: Contacts | None = None  # made when somebody needs them
        self.store: RecordStore | None = None
        self.links: OrderedDict[PeerId, None] = OrderedDict()
        self.alive = self.listed = True  # unlisted: cannot be dialled, so it is in no table
        self.epoch, self.incarnation = 1, 0
        self.size = NetworkSize(0)  # set with its contacts
        self.mended: dict[tuple[PeerId, bytes], float] = {}  # whom it told lately
        self.answers: Callable[[SimulatedPeer, Asked], Reply | None] | None = None  # adversaries

    def version(self) -> tuple[int, int]:
        """The next (epoch, incarnation)."""
        self.incarnation += 1
        return self.epoch, self.incarnation


class World:
    """All peers, and what lies between them."""

    def __init__(self, simulation: Simulation, params: WorldParams) -> None:
        self.simulation, self.params = simulation, params
        self.peers: list[SimulatedPeer] = []
        self.by_id: dict[PeerId, SimulatedPeer] = {}
        self.tally = Tally()
        self.seeded = True  # whether tables fill themselves as in a swarm that has settled
        self.cold: SimulatedPeer | None = None  # who has to dial, where connections are COLD
        self._ids: list[int] = []  # of those that may stand in a table, in order
        self._dice = simulation.dice("latency")
        self._naming = simulation.dice("names")
        self.take: Callable[[SimulatedPeer, SimulatedPeer, Put | Mend, Then], None]

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.simulation.now

    # ------------------------------------------------------------------------------------ people
    def add(
        self, number: int | None = None, *, listed: bool = True, host: str = ""
    ) -> SimulatedPeer:
        """A new peer with this id or any; one that is not `listed` cannot be dialled."""
        raw = self._naming.randbytes(32) if number is None else number.to_bytes(32, "big")
        identity, index = PeerId(raw), len(self.peers)
        host = host or f"{20 + (index >> 16) % 100}.{index >> 8 & 255}.{index & 255}.1"
        record = PeerRecord(epoch=1, incarnation=1, addresses=(f"{host}:{PORT}",))
        peer = SimulatedPeer(index, identity, sign(identity, record, Kind.PEER))
        peer.listed = listed
        self.peers.append(peer)
        self.by_id[identity] = peer
        if listed:
            insort(self._ids, identity.number)
        return peer

    def populate(self, count: int) -> None:
        """That many peers, who know each other as in a swarm that has settled."""
        first = len(self.peers)
        for _ in range(count):
            self.add(listed=False).listed = True
        self._ids.extend(peer.id.number for peer in self.peers[first:])
        self._ids.sort()

    def contacts_of(self, peer: SimulatedPeer) -> Contacts:
        """Whom it knows. The first look fills the table of a peer in a settled swarm."""
        if peer.contacts is None:
            peer.contacts = Contacts(peer.id, self.params.contacts, self.now)
            peer.size = NetworkSize(self.params.search.lookup.k)
            if self.seeded:
                self._fill(peer.contacts, peer)
        return peer.contacts

    def store_of(self, peer: SimulatedPeer) -> RecordStore:
        """What it holds."""
        if peer.store is None:
            peer.store = RecordStore(self.params.records, started_at=self.now)
        return peer.store

    def introduce(self, knows: Contacts, other: SimulatedPeer) -> Insertion | None:
        """A connection to the other succeeded that this one began."""
        knows.learn(other.card)
        return knows.dialled(other.id, self.now)

    def closest(self, target: bytes, count: int) -> list[SimulatedPeer]:
        """The live peers closest to a place, by brute force over those that are near."""
        width = ID_BITS - max(0, len(self._ids) // (4 * count)).bit_length()
        number = int.from_bytes(target, "big")
        while True:
            low = number >> width << width
            at = bisect_left(self._ids, low), bisect_left(self._ids, low + (1 << width))
            near = [self.by_id[PeerId(each.to_bytes(32, "big"))] for each in self._ids[slice(*at)]]
            alive = [peer for peer in near if peer.alive]
            if len(alive) >= count or width >= ID_BITS:
                return sorted(alive, key=lambda peer: distance(peer.id.raw, target))[:count]
            width += 1

    def kill(self, peer: SimulatedPeer) -> None:
        """As a crash of its host does: from now on it is silent. What it held is lost."""
        peer.alive = False
        peer.contacts = peer.store = None
        number = peer.id.number
        at = bisect_left(self._ids, number)
        if at < len(self._ids) and self._ids[at] == number:
            del self._ids[at]
        self._disconnect(peer)

    def chill(self, peer: SimulatedPeer) -> None:
        """Nobody is connected to this one; where connections are COLD, all others have theirs."""
        self.cold = peer
        self._disconnect(peer)

    def _disconnect(self, peer: SimulatedPeer) -> None:
        for other in peer.links:
            self.by_id[other].links.pop(peer.id, None)
        peer.links.clear()

    def _fill(self, contacts: Contacts, peer: SimulatedPeer) -> None:
        """Of every bucket's range k peers, any of them as likely as the others."""
        own, k = peer.id.number, self.params.contacts.routing.k
        dice = self.simulation.dice(f"table of {peer.index}")
        for shared in range(ID_BITS):
            width = ID_BITS - shared - 1
            low = (own >> width ^ 1) << width
            start, end = bisect_left(self._ids, low), bisect_left(self._ids, low + (1 << width))
            for at in dice.sample(range(start, end), min(k, end - start)):
                number = self._ids[at]
                other = self.by_id[PeerId(number.to_bytes(32, "big"))]
                self.introduce(contacts, other)
                contacts.vouch(other.id, self.now)
            mine = own >> width << width
            if bisect_left(self._ids, mine + (1 << width)) - bisect_left(self._ids, mine) <= 1:
                break  # nobody else shares more

    # --------------------------------------------------------------------------------- questions
    def ask(self, source: SimulatedPeer, peer: PeerId, asked: Asked, then: Then) -> None:
        """Put a question to a peer; `then` gets the answer, or None when none came in time."""
        self.tally.calls += 1
        target = self.by_id[peer]
        limit = PUT_LIMIT if isinstance(asked, Put) else ASK_LIMIT
        dials = not self._connected(source, target)
        delay = self._one_way(source, target)
        if dials:
            self.tally.dials += 1
            self.tally.bytes += DIAL_BYTES
            trips = DIAL_TO_WRITE if isinstance(asked, Put) else DIAL_TO_READ
            delay += sum(self._one_way(source, target) for _ in range(2 * trips))
        self.tally.bytes += FRAME_BYTES + _request_bytes(asked)
        ends = self.now + limit
        self.simulation.after(delay, self._arrive, source, target, asked, then, (ends, dials))

    def _arrive(
        self, source: SimulatedPeer, target: SimulatedPeer, asked: Asked, then: Then, how: Any
    ) -> None:
        ends, dials = how
        if not target.alive:
            self._silent(source, target, then, ends)
            return
        if dials:
            self._connect(source, target)
            self._come(target, source)

        def send(reply: Reply | None) -> None:
            back = self._one_way(target, source)
            if reply is None or self.now + back >= ends:
                self._silent(source, target, then, ends)
            else:
                self.tally.bytes += FRAME_BYTES + self._reply_bytes(reply)
                self.simulation.after(back, self._heard, source, target, (reply, dials), then)

        if target.answers is not None:
            send(target.answers(source, asked))
        elif isinstance(asked, Put | Mend):
            self.take(target, source, asked, send)
        else:
            send(self.answer(target, source, asked))

    def _come(self, peer: SimulatedPeer, other: SimulatedPeer) -> None:
        """Somebody connected: dialled back once, at the address of its own record."""
        contacts = self.contacts_of(peer)
        contacts.learn(other.card)
        if other.listed and not contacts.was_dialled(other.id):
            self.tally.dials += 1
            self.tally.bytes += DIAL_BYTES
            trips = 2 * DIAL_TO_WRITE
            delay = sum(self._one_way(peer, other) for _ in range(trips))
            self.simulation.after(delay, self._dialled_back, peer, other)

    def _dialled_back(self, peer: SimulatedPeer, other: SimulatedPeer) -> None:
        if peer.alive and other.alive:
            outcome = self.introduce(self.contacts_of(peer), other)
            if isinstance(outcome, PingOldest):
                self.ask(peer, outcome.oldest, peer.id.raw, lambda _: None)

    def _heard(self, source: SimulatedPeer, target: SimulatedPeer, what: Any, then: Then) -> None:
        reply, dials = what
        if not source.alive:
            return
        contacts = self.contacts_of(source)
        outcome = self.introduce(contacts, target) if dials else None
        contacts.table.seen(target.id, self.now)
        if isinstance(outcome, PingOldest):
            self.ask(source, outcome.oldest, source.id.raw, lambda _: None)
        if isinstance(reply, Answer):
            for closer in reply.closer:
                contacts.named(target.id, self.by_id[closer].card, self.now)
        then(reply)

    def _silent(
        self, source: SimulatedPeer, target: SimulatedPeer, then: Then, ends: float
    ) -> None:
        def gave_up() -> None:
            self.tally.timeouts += 1
            if source.alive:
                self.contacts_of(source).failed(target.id, self.now)
                then(None)

        self.simulation.at(ends, gave_up)

    def answer(self, peer: SimulatedPeer, asker: SimulatedPeer, asked: bytes | Question) -> Answer:
        """What an honest peer says to a find or a get, as `dht/holder.py` does."""
        contacts, now = self.contacts_of(peer), self.now
        target = asked if isinstance(asked, bytes) else asked.key
        closer = contacts.table.closest(
            target,
            self.params.search.lookup.k,
            lambda other: other != asker.id and not contacts.avoided(other, now),
        )
        if peer.store is None or not isinstance(asked, Question):
            return Answer(tuple(closer))
        held = peer.store.get(asked.key, now, asked.after)
        more = False
        if len(held) > SURELY_FIT:
            packer = Packer(lambda other: self.by_id[other].card.raw, now)
            packer.add(closer, held)
            packed = packer.reply().answers[0]
            held, more = held[: len(packed.records)], packed.more
        copies = tuple(RecordCopy(each.signed, each.expires_at) for each in held)
        return Answer(tuple(closer), copies, peer.store.number(asked.key), more)

    def usable(self, peer: SimulatedPeer, other: PeerId) -> bool:
        """Whether this peer would ask that one now."""
        return not self.contacts_of(peer).avoided(other, self.now)

    # ------------------------------------------------------------------------------- connections
    def _one_way(self, source: SimulatedPeer, target: SimulatedPeer) -> float:
        return self.params.latency.one_way(source.index, target.index, self._dice)

    def _connected(self, source: SimulatedPeer, target: SimulatedPeer) -> bool:
        pooled = self.params.connections is Connections.POOL
        if not pooled and self.cold not in (source, target):
            return True
        if target.id not in source.links:
            return False
        source.links.move_to_end(target.id)
        return True

    def _connect(self, source: SimulatedPeer, target: SimulatedPeer) -> None:
        """Both have it now, and close the one that they used least lately."""
        for one, other in ((source, target), (target, source)):
            one.links[other.id] = None
            one.links.move_to_end(other.id)
            if len(one.links) > self.params.pooled:
                closed, _ = one.links.popitem(last=False)
                self.by_id[closed].links.pop(one.id, None)

    def _reply_bytes(self, reply: Reply) -> int:
        if isinstance(reply, Vote):
            return 32
        cards = {*reply.closer, *(copy.signed.signer for copy in reply.records)}
        records = sum(len(copy.signed.raw) + 16 for copy in reply.records)
        return records + sum(len(self.by_id[peer].card.raw) + 4 for peer in cards)


def _request_bytes(asked: Asked) -> int:
    if not isinstance(asked, Put):
        return 40  # a key and its name
    return 16 + len(asked.record.raw) + (len(asked.transfer.raw) if asked.transfer else 0)


def sign(signer: PeerId, body: T, kind: Kind) -> Signed[T]:
    """A record that everybody believes to be signed by `signer`, of a real one's length."""
    payload = schema.encode(body)
    return Signed(signer, signer.raw, kind, body, signer.raw + payload.ljust(len(payload) + 83))


def spread(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan
