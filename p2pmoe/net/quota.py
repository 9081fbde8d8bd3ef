"""What one peer may ask of this one: connections, calls, bytes, requests a second, and time.

All limits stand in `QuotaParams`. What is over a limit is answered `busy` with a hint when to come
again; a peer that goes on regardless breaks the protocol and loses its connection.

Memory is reserved here before anything is allocated. A peer's account outlives its connections,
so that coming back does not fill its buckets; accounts that hold nothing are dropped oldest first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from p2pmoe.errors import MalformedMessage, PeerBusy
from p2pmoe.identity import PeerId

KIB, MIB = 2**10, 2**20
FOREVER = math.inf


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: so many a second in the long run, so many at once."""

    per_second: float
    burst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaParams:
    """The table of limits. Seconds and bytes."""

    # connections
    connections: int = 1024  # in all; the usual descriptor limit of a process
    connections_a_peer: int = 2  # of each class: one, and one more while two dials cross
    hello: float = 5.0  # s, from the handshake to the other side's HELLO; as long as TLS gets
    # calls
    calls_a_peer: int = 256  # in flight; yamux's backlog of streams
    call_seconds: float = 300.0  # s, the longest deadline that a call may have here; a guess
    payload_a_peer: int = 256 * MIB  # bytes in flight; four of the largest tensors
    payload_in_all: int = 1024 * MIB  # bytes in flight of all peers; a guess
    come_again: float = 0.1  # s, the hint where nothing better is known; a guess
    # requests a second, by the start of a method's name; others are bounded by their bytes
    rates: tuple[tuple[str, Rate], ...] = (
        ("dht.", Rate(200, 1000)),  # a guess; in a swarm of few, every lookup asks the same ones
        ("gossip.", Rate(100, 200)),  # a guess
    )
    cancels: Rate = Rate(500, 2000)  # a guess; HTTP/2's rapid resets came by the 10,000
    refusals: Rate = Rate(200, 1000)  # `busy` answers before a peer counts as abusive; a guess
    # progress of a frame or payload that has begun, and of one that is being sent
    grace: float = 10.0  # s without progress; as the header timeouts of web servers
    least_rate: float = 16 * KIB  # bytes a second after the grace; a guess, a tenth of a slow line
    # signs of life
    ping_control: float = 10.0  # s without a byte received; a guess
    ping_bulk: float = 30.0  # s; a slow line may be busy with one chunk for long; a guess
    pings: int = 2  # unanswered before the peer counts as gone; one, and one after a suspension
    # memory
    peers_remembered: int = 4096  # accounts; a guess, about 2 MB


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

    Bytes earn time by `least_rate`, and never more than `grace` is in hand. A first miss buys one
    more second: what came while this process was stopped is read before the peer is blamed.
    """

    LAST_CHANCE = 1.0  # s; a guess

    __slots__ = ("_due", "_last_chance", "_params")

    def __init__(self, params: QuotaParams) -> None:
        self._params = params
        self._due = self._last_chance = FOREVER

    @property
    def deadline(self) -> float:
        """When to ask whether it is `too_slow`."""
        return self._due if self._last_chance == FOREVER else self._last_chance

    def moved(self, size: int, now: float) -> None:
        """`size` more bytes of it have come; the first time, it has begun."""
        earned = self._due + size / self._params.least_rate
        self._due = min(earned, now + self._params.grace)
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
            self._last_chance = now + self.LAST_CHANCE
        return now >= self._last_chance


class Quota:
    """What all peers together may use, and an account for each."""

    def __init__(self, params: QuotaParams) -> None:
        self.params = params
        self.connections = 0
        self.payload_bytes = 0
        self._accounts: OrderedDict[PeerId, PeerQuota] = OrderedDict()

    def connect(self, peer: PeerId, *, bulk: bool, now: float) -> PeerQuota:
        """Count a connection and return the peer's account; `PeerBusy` when there is no room."""
        if self.connections >= self.params.connections:
            raise PeerBusy(f"{self.connections} connections are open")
        account = self._account(peer, now)
        if account.connections[bulk] >= self.params.connections_a_peer:
            raise PeerBusy(f"{account.connections[bulk]} such connections of this peer are open")
        account.connections[bulk] += 1
        self.connections += 1
        return account

    def disconnect(self, account: PeerQuota, *, bulk: bool) -> None:
        """A connection that was counted has ended."""
        account.connections[bulk] -= 1
        self.connections -= 1

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

    __slots__ = ("_buckets", "_cancels", "_quota", "_refusals", "calls", "connections", "payload")

    def __init__(self, quota: Quota, now: float) -> None:
        params = quota.params
        self._quota = quota
        self._buckets = [(prefix, TokenBucket(rate, now)) for prefix, rate in params.rates]
        self._cancels = TokenBucket(params.cancels, now)
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
        if self.payload + size > params.payload_a_peer:
            return False
        if quota.payload_bytes + size > params.payload_in_all:
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
        if self._cancels.take(now):
            raise MalformedMessage("quota.cancels_too_often")
