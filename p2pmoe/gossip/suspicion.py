"""How long an accused member may still refute, and how far one's own senses are to be trusted.

A suspicion starts long and ends early when others confirm it (Lifeguard, section IV-B): each
distinct live accuser counts once, hearsay never. Who refuted of late is slow rather than dead, and
gets more time. Local health (section IV-A) is a score that rises when one's own probes and relays
are late, and stretches one's own probe times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2pmoe.gossip.messages import Evidence, Suspect
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed

MAX_ACCUSERS = 64  # that are remembered of one suspicion; four times what has a meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspicionParams:
    """Times in seconds. `protocols/gossip/spec.md`, section 6, says why these."""

    mult: float = 2.0  # of log10(n) intervals; memberlist has 4 for datagrams that get lost
    max_mult: float = 6.0  # longest over shortest; memberlist
    confirmations: int = 3  # K; Lifeguard, section IV-B
    refusals: int = 3  # distinct members whose fresh dial was refused: the accuser and 2 relays
    interval: float = 1.0  # a protocol period
    refutation: float = 2.0  # shortest times that are added for one wrong suspicion; a guess
    most_refuted: float = 7.0  # of them together: as local health's score; a guess
    refuted_for: float = 15.0  # seconds of quiet until one of them is taken off; a guess
    lifeguard: bool = True


def shortest(params: SuspicionParams, n: int) -> float:
    """Tmin for n members, seconds."""
    return params.mult * max(1.0, math.log10(max(1, n))) * params.interval


def timeout(confirmations: int, wanted: int, low: float, high: float) -> float:
    """Lifeguard's formula: from `high` down to `low` as confirmations come."""
    if wanted < 1:
        return low
    done = math.log(confirmations + 1) / math.log(wanted + 1)
    return max(low, high - (high - low) * done)


class Suspicion:
    """One version of one member under suspicion."""

    __slots__ = (
        "_accusers", "_high", "_low", "_params", "_refusals", "_wanted",
        "claim", "deadline", "start",
    )  # fmt: skip

    def __init__(
        self, params: SuspicionParams, claim: Signed[Suspect], n: int, refuted: float, now: float
    ) -> None:
        """Among `n` members, oneself and the accused included; `refuted` as its member has it."""
        self.claim = claim  # the first that was heard, for the accused to see
        self.start = now
        self._params = params
        self._accusers: dict[PeerId, Evidence] = {}
        self._low = shortest(params, n) * (1 + refuted if params.lifeguard else 1)
        self._high = self._low * params.max_mult if params.lifeguard else self._low
        wanted = params.confirmations if params.lifeguard else 0
        self._wanted = wanted if n - 2 >= wanted else 0
        self._refusals = max(1, min(params.refusals, n - 1))
        self._set_deadline()

    @property
    def accusers(self) -> dict[PeerId, Evidence]:
        """Who found it out first hand, and how."""
        return self._accusers

    def accuse(self, accuser: PeerId, evidence: Evidence) -> bool:
        """Count an accuser that is live; whether that says something new to others too."""
        if evidence == "hearsay" or self._accusers.get(accuser) in (evidence, "refused"):
            return False
        before = self._counts()
        if accuser in self._accusers or len(self._accusers) < MAX_ACCUSERS:
            self._accusers[accuser] = evidence
        self._set_deadline()
        return self._counts() != before

    def _counts(self) -> tuple[int, int]:
        """Confirmations and refusals, as far as they have a meaning."""
        refused = sum(evidence == "refused" for evidence in self._accusers.values())
        first_too = self._params.confirmations + 1
        if refused >= self._refusals:  # then it lasts one period, whoever else there is
            return first_too, self._refusals
        return min(len(self._accusers), first_too), refused

    def _set_deadline(self) -> None:
        """When the accused is dead, if it did not refute. Seconds."""
        accusers, refused = self._counts()
        lasts = timeout(max(0, accusers - 1), self._wanted, self._low, self._high)
        self.deadline = self.start + (self._params.interval if refused >= self._refusals else lasts)

    def delay(self, by: float) -> None:
        """One was deaf for so many seconds: begin so much later."""
        self.start += by
        self._set_deadline()


class LocalHealth:
    """0: one's own senses are fine; up to 7: everybody else seems to be late."""

    __slots__ = ("_most", "score")

    def __init__(self, *, lifeguard: bool, most: int = 7) -> None:
        self._most = most if lifeguard else 0
        self.score = 0

    def add(self, points: int) -> None:
        """Something went wrong (more than 0) or right (less)."""
        self.score = min(self._most, max(0, self.score + points))

    @property
    def stretch(self) -> int:
        """By what one's own probe interval and timeouts are multiplied."""
        return self.score + 1
