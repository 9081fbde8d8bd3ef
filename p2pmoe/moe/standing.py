"""`Standing`: which experts are asked last, and how long each usually takes.

An expert that is late, fails or answers nonsense misses. Whoever misses too large a share of what
he was asked lately is doubted: others are asked before him. When his time out is over he is tried
with one batch: a good answer ends the doubt, another miss begins a time out twice as long. Where
most are doubted nobody is, for then the fault is here. A server that says when to come again is
left alone at least that long, and so is who was caught with a wrong answer, for much longer.

Rules: slow is what its caller did not wait for; a record a expert and server, in a table of bounded
size, which forgets first what was spoken of least lately; `now` and the dice come in.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field

from p2pmoe.net.backoff import Backoff, BackoffParams

Key = tuple[Hashable, str]  # a server, and the uid of an expert; "" for the server as a whole


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingParams:
    """When to doubt, and for how long. Times in seconds."""

    weight: float = 0.25  # of the latest answer in the share of misses; a guess: 3 in a row doubt
    doubt: float = 0.5  # share of misses from which on an expert is doubted; a guess
    forgive: float = 60.0  # s in which a share halves while nothing is heard; a guess
    trial: float = 30.0  # s after which a trial without an end is forgotten; a call's limit
    times: float = 0.125  # weight of the latest time in the usual one; RFC 6298, section 2
    lie: float = 600.0  # s for which a wrong answer counts, twice as long each time; a guess
    longest_rest: float = 60.0  # s, whatever a server says; a guess
    jitter: float = 0.5  # a rest is longer by up to this part of itself; a guess
    most: int = 16_384  # records; a guess, four times the cells of a grid that is watched whole
    out: BackoffParams = BackoffParams(first=2.0, most=120.0)  # noqa: RUF009  frozen; a guess


@dataclass(slots=True)
class _Record:
    """What is known of one expert on one server. Times in seconds."""

    out: Backoff
    misses: float = 0.0  # share of what it was asked lately
    at: float = 0.0  # when that was so
    usual: float | None = None  # from question to answer
    doubted: bool = False
    tried_until: float = -math.inf
    rests_until: float = -math.inf
    lies: int = 0

    def last(self, now: float) -> bool:
        """Whether it is asked last now."""
        trouble = self.doubted and (self.out.wait(now) > 0 or now < self.tried_until)
        return trouble or now < self.rests_until

    def changes_at(self, now: float) -> float:
        """When that may be otherwise by itself."""
        ends = (self.rests_until, self.tried_until, now + self.out.wait(now))
        return min((end for end in ends if end > now), default=math.inf)


@dataclass
class Standing:
    """The experts of one grid, as one caller knows them. `counts` are events since the start."""

    params: StandingParams
    rng: random.Random
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("doubted", "cleared", "rested", "lied"), 0)
    )
    _records: OrderedDict[Key, _Record] = field(default_factory=OrderedDict)
    _troubled: dict[Key, _Record] = field(default_factory=dict)
    changes: int = 0  # after which `asked_last` may differ
    _usual: float = math.inf

    def __len__(self) -> int:
        return len(self._records)

    def usual(self, key: Key) -> float:
        """Seconds that it takes to answer; of one not known, what experts take in the mean.

        Infinite while nothing is known.
        """
        record = self._records.get(key)
        if record is None or record.usual is None or record.doubted:
            return self._usual
        return record.usual

    def asked_last(self, keys: Collection[Key], now: float) -> frozenset[Key]:
        """Those of the keys that are asked where others do not suffice."""
        if not self._troubled:
            return frozenset()
        resting = {key for key in keys if self._rests(key, now)}
        doubted = {key for key in keys if (one := self._troubled.get(key)) and one.last(now)}
        return frozenset(resting | doubted if 2 * len(doubted) <= len(keys) else resting)

    def next_change(self, now: float) -> float:
        """When `asked_last` may differ, if nothing happens before."""
        return min((one.changes_at(now) for one in self._troubled.values()), default=math.inf)

    def asked(self, keys: Iterable[Key], now: float) -> None:
        """These are asked now: whose time out is over is tried by it, and by nobody else."""
        if self._troubled:
            for key in keys:
                record = self._troubled.get(key)
                if record is not None and record.doubted and not record.last(now):
                    record.tried_until = now + self.params.trial
                    self.changes += 1

    def answered(self, key: Key, seconds: float | None, now: float) -> None:
        """A good answer came, after so many seconds if that is to be remembered."""
        record = self._heard(key, now, 0.0)
        if seconds is not None:
            record.usual = _mean(record.usual, seconds, self.params.times)
            self._usual = _mean(self._usual, seconds, self.params.times)
        if record.doubted and (now < record.tried_until or record.misses < self.params.doubt / 2):
            record.doubted, record.tried_until = False, -math.inf
            record.misses = min(record.misses, self.params.weight)
            self.counts["cleared"] += 1
            self.changes += 1
        if not record.doubted:
            if record.misses < self.params.weight / 2:
                record.out.clear()
            if now >= record.rests_until:
                self._troubled.pop(key, None)

    def missed(self, key: Key, now: float) -> None:
        """It was late, failed, or answered what is no answer."""
        record = self._heard(key, now, 1.0)
        tried = record.doubted and now < record.tried_until
        if tried or (not record.doubted and record.misses >= self.params.doubt):
            self.counts["doubted"] += not record.doubted
            record.doubted, record.tried_until = True, -math.inf
            record.out.failed(now, self.rng)
            self._trouble(key, record)

    def rest(self, key: Key, seconds: float, now: float) -> None:
        """Its server says not to come again before so many seconds are over."""
        record = self._record(key)
        self.counts["rested"] += now >= record.rests_until
        jitter = 1 + self.params.jitter * self.rng.random()
        self._rest(key, record, now + min(self.params.longest_rest, seconds) * jitter)

    def lied(self, key: Key, now: float) -> float:
        """Its answer was proven wrong. Returns for how many seconds it is asked last by that."""
        record = self._record(key)
        seconds = self.params.lie * 2.0 ** min(record.lies, 16)
        record.lies += 1
        self.counts["lied"] += 1
        self._rest(key, record, now + seconds)
        return seconds

    def _rests(self, key: Key, now: float) -> bool:
        whole, part = self._troubled.get((key[0], "")), self._troubled.get(key)
        return any(one is not None and now < one.rests_until for one in (whole, part))

    def _rest(self, key: Key, record: _Record, until: float) -> None:
        record.rests_until = max(record.rests_until, until)
        self._trouble(key, record)

    def _trouble(self, key: Key, record: _Record) -> None:
        self._troubled[key] = record
        self.changes += 1

    def _heard(self, key: Key, now: float, miss: float) -> _Record:
        """Its record, with one more answer (0) or miss (1) in its share of misses."""
        record = self._record(key)
        record.misses *= 0.5 ** (max(0.0, now - record.at) / self.params.forgive)
        record.misses += self.params.weight * (miss - record.misses)
        record.at = now
        return record

    def _record(self, key: Key) -> _Record:
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(Backoff(self.params.out))
            if len(self._records) > self.params.most:
                gone, _ = self._records.popitem(last=False)
                self._troubled.pop(gone, None)
        self._records.move_to_end(key)
        return record


def _mean(before: float | None, latest: float, weight: float) -> float:
    """The mean with one more in it; the first one is the mean."""
    if before is None or before == math.inf:
        return latest
    return before + weight * (latest - before)
