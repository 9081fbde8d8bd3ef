"""What each client has asked of a server's experts, and how often each may teach them. A core.

A client may bring so many updates a second: a token bucket. Each update is clipped to the server's
clip norm, so its gradients add up to no more than so many times that norm, however large they are.
An update that finds the bucket empty is refused, with the time after which it would not be. A
client whose calls fit no expert, or hold what is no number, again and again is not heard for a
while: to look at them costs as much as to answer good ones.

Rules: a bounded table, in which the client that has been silent longest is forgotten; a bucket that
is forgotten is full again, so the table is large. `now` comes in.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from p2pmoe.errors import PeerBusy
from p2pmoe.net.quota import Rate, TokenBucket

TEACHING = 600.0  # seconds for which a client that brought an update counts as training here


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountParams:
    """What one client may do."""

    updates: float = 20_000.0  # a second in the long run; a guess: more than a core computes
    burst: float = 4.0  # seconds' worth of them at once; a guess
    faults: Rate = Rate(2, 32)  # noqa: RUF009  calls a second that were no good, forgiven; a guess
    disgrace: float = 5.0  # s from a fault beyond these in which no call is looked at; a guess
    most: int = 4096  # clients in the table; a guess, eight times the connections


@dataclass(slots=True)
class Account:
    """One client's. `parts` are counted by the code of their error, or `ok`."""

    left: float  # updates
    at: float  # when so many were left
    faults: TokenBucket
    heard_from: float = -math.inf  # when its calls are looked at again
    taught_at: float = -math.inf
    parts: Counter[str] = field(default_factory=Counter)
    rows: int = 0


class Accounts:
    """The clients of one server."""

    def __init__(self, params: AccountParams) -> None:
        self.params = params
        self._accounts: OrderedDict[Hashable, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def admit_updates(self, client: Hashable, count: int, now: float) -> None:
        """A client brings so many; `PeerBusy` with a time when it may not yet.

        A call may overdraw the bucket, and then waits for longer.
        """
        account = self._account(client, now)
        rate, full = self.params.updates, self.params.updates * self.params.burst
        account.left = min(full, account.left + max(0.0, now - account.at) * rate)
        account.at = now
        if account.left < 1:
            busy = PeerBusy("this client brings more updates a second than one may here")
            busy.retry_after = (1 - account.left) / rate
            raise busy
        account.left -= count
        account.taught_at = now

    def admit(self, client: Hashable, now: float) -> None:
        """A client calls; `PeerBusy` with a time while too many of its calls were no good."""
        account = self._accounts.get(client)
        if account is not None and now < account.heard_from:
            busy = PeerBusy("too many of this client's calls were no good: see why they failed")
            busy.retry_after = account.heard_from - now
            raise busy

    def faulty(self, client: Hashable, now: float) -> None:
        """A call of this client's was no good: its tensors fit no expert, or are no numbers."""
        account = self._account(client, now)
        if account.faults.take(now):
            account.heard_from = now + self.params.disgrace

    def answered(self, client: Hashable, code: str, rows: int, now: float) -> None:
        """A part of this client's got its answer: `ok`, or the code of an error."""
        account = self._account(client, now)
        account.parts[code] += 1
        account.rows += rows

    def teachers(self, but: Hashable, now: float) -> int:
        """How many other clients train here."""
        return sum(
            client != but and now - one.taught_at < TEACHING
            for client, one in self._accounts.items()
        )

    def busiest(self, count: int) -> list[tuple[Hashable, Account]]:
        """The clients that had most rows computed, for people."""
        ordered = sorted(self._accounts.items(), key=lambda pair: -pair[1].rows)
        return ordered[:count]

    def _account(self, client: Hashable, now: float) -> Account:
        account = self._accounts.get(client)
        if account is None:
            full = self.params.updates * self.params.burst
            account = self._accounts[client] = Account(
                full, now, TokenBucket(self.params.faults, now)
            )
            if len(self._accounts) > self.params.most:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(client)
        return account
