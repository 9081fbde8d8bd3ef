"""Addresses whose peers broke the protocol: a few times is forgiven, then their strangers wait.

Rules: connections that are open stay open, and nobody is shut out for good. Strangers from such an
address have their handshakes one by one, slowly, whoever they are: who shares an address with an
attacker waits with it. The table has a limit; who has been good the longest is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict

from p2pmoe.net.quota import QuotaParams, TokenBucket, address_group


class _Record:
    """What is held against one address."""

    __slots__ = ("offences", "turns", "until")

    def __init__(self, params: QuotaParams, now: float) -> None:
        self.offences = TokenBucket(params.offences, now)
        self.turns = TokenBucket(params.handshakes_in_disgrace, now)
        self.until = now


class Offenders:
    """Who offended lately, by host; a global IPv6 site is one."""

    def __init__(self, params: QuotaParams) -> None:
        self._params = params
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def blame(self, host: str, now: float) -> None:
        """A peer from there broke the protocol."""
        name = _name(host)
        record = self._records.pop(name, None) or _Record(self._params, now)
        self._records[name] = record
        if record.offences.take(now):
            record.until = now + self._params.disgrace
        if len(self._records) > self._params.peers_remembered:
            self._records.popitem(last=False)

    def wait(self, host: str, now: float) -> float:
        """Seconds until a handshake from there may begin; 0 when one begins now."""
        record = self._records.get(_name(host))
        if record is None or now >= record.until:
            return 0.0
        return record.turns.take(now)


def _name(host: str) -> str:
    return address_group(host) or host
