"""What one peer may ask of this one: connections, calls, bytes, requests a second, and time.

All limits stand in `QuotaParams`. What is over a limit is answered `busy` with a hint when to come
again; a peer that goes on regardless breaks the protocol and loses its connection.

Memory is reserved here before anything is allocated. A peer's account outlives its connections,
so that coming back does not fill its buckets; accounts that hold nothing are dropped oldest first.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass

from p2pmoe.errors import MalformedMessage, PeerBusy
from p2pmoe.identity import PeerId

KIB, MIB = 2**10, 2**20
FOREVER = math.inf
SITE_BITS = 64  # of an IPv6 address: what one site has for itself; RFC 6177


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: so many a second in the long run, so many at once."""

    per_second: float
    burst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaParams:
    """The table of limits, of the floor below too. Seconds and bytes.

    Each has a test at its edge, in `tests/net/test_edges_*.py`. Limits an address hold for global
    addresses only: a home or a cluster may stand behind one that is not. They are for networks that
    anybody may enter; where each member was admitted, set them as high as those in all.
    """

    # strangers: connections that came in and have not proven a key
    strangers: int = 128  # at once; then others wait to be accepted; a guess
    strangers_stay: float = 1.0  # s, then one goes if others wait; a guess, a far peer's handshake
    strangers_an_address: int = 8  # at once from one global address; a guess
    handshake: float = 5.0  # s, until both keys are proven; a guess, as long as the greeting gets
    handshakes: Rate = Rate(200, 5)  # begun a second, others wait; a guess, a third of one core
    accepts: Rate = Rate(500, 100)  # connections taken in a second; a guess, a fifth of one core
    backlog: int = 512  # that the system keeps meanwhile; others try again, after a second with TCP
    linger: float = 0.5  # s in which a refused client may read why; a guess
    linger_bytes: int = 64 * KIB  # what a refused client may still have under way; a guess
    accept_pause: float = 0.1  # s without accepting when descriptors have run out; as trio does
    connect: float = 5.0  # s for a name and a connection: two repeated SYNs; RFC 6298, section 2
    # guests: they have proven a key and have not said HELLO
    guests: int = 128  # at once; then the one that has been here longest goes; a guess
    hello: float = 5.0  # s, from the handshake to the other side's HELLO; as long as TLS gets
    refuse: float = 0.2  # s in which a REFUSE may get out; a guess, a far peer's round trip
    # connections after their greeting; with those above, fewer than 1,024 descriptors, the usual
    connections: int = 512  # in all; a guess
    connections_in: int = 384  # that others dialled, so that oneself can always dial; a guess
    connections_an_address: int = 64  # that one global address dialled; a guess
    connections_a_peer: int = 2  # of each class: one, and one more while two dials cross
    # addresses whose peers broke the protocol, those that are not global, too
    offences: Rate = Rate(0.1, 5)  # forgiven; a guess, an honest peer commits none
    disgrace: float = 60.0  # s from an offence beyond these; a guess
    handshakes_in_disgrace: Rate = Rate(1, 1)  # begun a second, for all from there; a guess
    # calls
    calls_a_peer: int = 256  # in flight; yamux's backlog of streams
    call_seconds: float = 300.0  # s, the longest deadline that a call may have here; a guess
    payload_a_peer: int = 256 * MIB  # bytes in flight; four of the largest tensors
    payload_in_all: int = 1024 * MIB  # bytes in flight; no peer has more than is left; a guess
    come_again: float = 0.1  # s, the hint where nothing better is known; a guess
    # what may come a second; beyond it a request is refused, and the rest ends the connection
    rates: tuple[tuple[str, Rate], ...] = (  # requests, by the start of a method's name
        ("dht.", Rate(200, 1000)),  # a guess; in a swarm of few, every lookup asks the same ones
        ("gossip.", Rate(100, 200)),  # a guess
        ("node.", Rate(20, 100)),  # a guess; for operators
    )  # others are bounded by their bytes
    refusals: Rate = Rate(200, 1000)  # `busy` answers before a peer counts as abusive; a guess
    faults: Rate = Rate(1, 50)  # calls with a malformed body; a guess, an honest peer has none
    cancels: Rate = Rate(500, 1000)  # a guess; HTTP/2's rapid resets came by the 10,000
    pings_heard: Rate = Rate(10, 100)  # a guess; this package sends one in ten seconds
    frames: Rate = Rate(30_000, 60_000)  # of all kinds; a guess, twice what Python can answer
    # what waits to be sent
    small_frames: int = 512  # answers and the like; twice the calls in flight
    # progress of a frame or payload that has begun, and of one that is being sent
    grace: float = 10.0  # s without progress; as the header timeouts of web servers
    last_chance: float = 1.0  # s more after a first miss; a guess
    least_rate: float = 16 * KIB  # bytes a second after the grace; a guess, a tenth of a slow line
    # signs of life
    ping_control: float = 10.0  # s without a byte received, then a ping; a guess
    ping_bulk: float = 30.0  # s; a slow line may be busy with one chunk for long; a guess
    pings: int = 2  # unanswered before the peer is gone; one, and one after a suspension
    user_timeout_control: float = 5.0  # s that sent bytes may stay unacknowledged; a guess
    user_timeout_bulk: float = 30.0  # s; a guess
    # the end
    goodbye: float = 0.2  # s for the last words of a connection that is cut; a guess
    closing: float = 1.0  # s for the other side to close after a goodbye; a guess
    # memory
    peers_remembered: int = 4096  # accounts, and back-offs; a guess, 7 MB as measured
    records_remembered: int = 16384  # verified, and claims; a guess, 16 times a swarm of 1,000


class TokenBucket:
    """Counts events against a rate. Full at first."""

    __slots__ = ("_at", "_rate", "_tokens")

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate, self._tokens, self._at = rate, rate.burst, now

    def take(self, now: float) -> float:
        """Seconds until the bucket has a token; 0 when one was taken now."""
        gained = (now - self._at) * self._rate.per_second
        self._tokens = min(self._rate.burst, self._tokens + gained)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate.per_second
        self._tokens -= 1
        return 0.0


class Progress:
    """Whether something that has begun moves fast enough; at rest it may take for ever.

    Bytes earn time by `least_rate`, and never more than `grace` is in hand. A first miss buys a
    `last_chance`: what came while this process was stopped is read before the peer is blamed. What
    is told of by the `piece` of so many bytes has the time of one piece besides.
    """

    __slots__ = ("_due", "_grace", "_last_chance", "_params")

    def __init__(self, params: QuotaParams, *, piece: int = 0) -> None:
        self._params = params
        self._grace = params.grace + piece / params.least_rate
        self._due = self._last_chance = FOREVER

    @property
    def deadline(self) -> float:
        """When to ask whether it is `too_slow`."""
        return self._due if self._last_chance == FOREVER else self._last_chance

    def watch(self, begun: bool, size: int, now: float) -> None:
        """It has begun and not ended, and `size` more bytes of it have come; or it is at rest."""
        if begun:
            self.moved(size, now)
        else:
            self.rest()

    def moved(self, size: int, now: float) -> None:
        """`size` more bytes of it have come; the first time, it has begun."""
        earned = self._due + size / self._params.least_rate
        self._due = min(earned, now + self._grace)
        if self._due > now:
            self._last_chance = FOREVER

    def rest(self) -> None:
        """Nothing is incomplete now."""
        self._due = self._last_chance = FOREVER

    def too_slow(self, now: float) -> bool:
        """Whether the peer had its last chance."""
        if now < self._due:
            return False
        if self._last_chance == FOREVER:
            self._last_chance = now + self._params.last_chance
        return now >= self._last_chance


class Quota:
    """What all peers together may use, and an account for each."""

    def __init__(self, params: QuotaParams) -> None:
        self.params = params
        self.connections = 0
        self.payload_bytes = 0
        self._inside: Counter[str] = Counter()  # connections that came in, by `address_group`
        self._accounts: OrderedDict[PeerId, PeerQuota] = OrderedDict()

    def connect(
        self, peer: PeerId, *, bulk: bool, now: float, came_from: str | None = None
    ) -> PeerQuota:
        """Count a connection and return the peer's account; `PeerBusy` when there is no room.

        `came_from` is the host that dialled, `None` if this side did.
        """
        if self.connections >= self.params.connections:
            raise PeerBusy(f"{self.connections} connections are open")
        if came_from is not None:
            self._check_room(address_group(came_from))
        account = self._account(peer, now)
        if account.connections[bulk] >= self.params.connections_a_peer:
            raise PeerBusy(f"{account.connections[bulk]} such connections of this peer are open")
        account.connections[bulk] += 1
        self.connections += 1
        if came_from is not None:
            self._inside[address_group(came_from)] += 1
        return account

    def _check_room(self, group: str) -> None:
        if (inside := self._inside.total()) >= self.params.connections_in:
            raise PeerBusy(f"{inside} connections that came in are open")
        if group and self._inside[group] >= self.params.connections_an_address:
            raise PeerBusy(f"{self._inside[group]} connections from {group} are open")

    def disconnect(self, account: PeerQuota, *, bulk: bool, came_from: str | None = None) -> None:
        """A connection that was counted has ended."""
        account.connections[bulk] -= 1
        self.connections -= 1
        if came_from is not None:
            group = address_group(came_from)
            self._inside[group] -= 1
            if not self._inside[group]:
                del self._inside[group]

    def _account(self, peer: PeerId, now: float) -> PeerQuota:
        if peer not in self._accounts:
            if len(self._accounts) >= self.params.peers_remembered:
                self._forget_one()
            self._accounts[peer] = PeerQuota(self, now)
        self._accounts.move_to_end(peer)
        return self._accounts[peer]

    def _forget_one(self) -> None:
        """Drop the oldest account that holds nothing, if there is one."""
        idle = (peer for peer, account in self._accounts.items() if account.idle)
        if (oldest := next(idle, None)) is not None:
            del self._accounts[oldest]

    def __len__(self) -> int:
        return len(self._accounts)


class PeerQuota:
    """One peer's account, shared by all its connections."""

    __slots__ = (
        *("_buckets", "_cancels", "_faults", "_frames", "_pings", "_quota", "_refusals"),
        *("calls", "connections", "payload"),
    )

    def __init__(self, quota: Quota, now: float) -> None:
        params = quota.params
        self._quota = quota
        self._buckets = [(prefix, TokenBucket(rate, now)) for prefix, rate in params.rates]
        self._cancels = TokenBucket(params.cancels, now)
        self._faults = TokenBucket(params.faults, now)
        self._frames = TokenBucket(params.frames, now)
        self._pings = TokenBucket(params.pings_heard, now)
        self._refusals = TokenBucket(params.refusals, now)
        self.calls = 0
        self.payload = 0
        self.connections = {False: 0, True: 0}

    @property
    def params(self) -> QuotaParams:
        """The table of limits."""
        return self._quota.params

    @property
    def idle(self) -> bool:
        """Whether the account holds nothing: no connection, and so no call and no byte."""
        return not any(self.connections.values())

    def begin_call(self, method: str, size: int, now: float) -> float:
        """Count a call and reserve its payload of `size` bytes: 0, or seconds to come again.

        Raises `MalformedMessage` when the peer was told so too often.
        """
        wait = self._wait(method, size, now)
        if wait:
            if self._refusals.take(now):
                raise MalformedMessage("quota.refused_too_often")
            return wait
        self.calls += 1
        return 0.0

    def _wait(self, method: str, size: int, now: float) -> float:
        if self.calls >= self.params.calls_a_peer:
            return self.params.come_again
        for prefix, bucket in self._buckets:
            if method.startswith(prefix) and (wait := bucket.take(now)):
                return wait
        return 0.0 if self.reserve(size) else self.params.come_again

    def end_call(self) -> None:
        """A call that was begun has been answered; its payload is released apart."""
        self.calls -= 1

    def reserve(self, size: int) -> bool:
        """Set `size` bytes aside, before they are allocated; False when there is no room."""
        quota, params = self._quota, self.params
        free = params.payload_in_all - quota.payload_bytes
        if self.payload + size > min(params.payload_a_peer, free):  # as much as is left for others
            return False
        self.payload += size
        quota.payload_bytes += size
        return True

    def release(self, size: int) -> None:
        """Give back bytes that were reserved."""
        self.payload -= size
        self._quota.payload_bytes -= size

    def count_cancel(self, now: float) -> None:
        """The peer cancelled a call; `MalformedMessage` when it does nothing else."""
        _spend(self._cancels, "cancels", now)

    def count_fault(self, now: float) -> None:
        """A call of the peer made no sense; `MalformedMessage` when its calls seldom do."""
        _spend(self._faults, "faults", now)

    def count_frame(self, now: float) -> None:
        """A frame of any kind has come; `MalformedMessage` in a flood of them."""
        _spend(self._frames, "frames", now)

    def count_ping(self, now: float) -> None:
        """The peer wants a sign of life; `MalformedMessage` when it wants nothing else."""
        _spend(self._pings, "pings", now)


def _spend(bucket: TokenBucket, what: str, now: float) -> None:
    if bucket.take(now):
        raise MalformedMessage(f"quota.{what}_too_often")


def address_group(host: str) -> str:
    """What counts as one address: a host, or an IPv6 site; empty if the address is not global."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # a name of the network in memory
        return ""
    if not ip.is_global:
        return ""
    bits = SITE_BITS if ip.version == 6 else 32
    return str(ipaddress.ip_network((ip, bits), strict=False))
