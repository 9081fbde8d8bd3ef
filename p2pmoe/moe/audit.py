"""Which answers are computed again, and what follows from the comparison. A core.

A server may answer quickly, finitely, and wrongly. So a share of the answers is computed again from
a copy of the expert's weights, row by row. The gaps between two audits of an expert are random, so
that its server cannot tell which answers count, and bounded, so that none goes long unaudited.

An expert may learn between its answer and its copy. Where no update came between, both must agree
but for rounding. A few updates later they must still be alike; after more, nothing is said.
"""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

AGREES = 0.99  # least cosine of two rows from the same weights; leaves room for bfloat16
ALIKE = 0.5  # the same, a few updates apart; a guess: rows made up have 0, within 4 / sqrt(width)
FEW = 16  # updates; a guess: at a rate of 1e-3 each moves a weight by a small part of itself
MOST_EXPERTS = 16_384  # whose next audit is remembered; a guess


class Verdict(Enum):
    """What an audit says of an answer."""

    GOOD = "good"
    WRONG = "wrong"
    UNSURE = "unsure"


@dataclass
class Audits:
    """The audits of one grid's answers: `share` of them, from 0 to 1."""

    share: float
    rng: random.Random
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    _left: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)

    def wanted(self, expert: Hashable) -> bool:
        """Whether to audit this answer of an expert's; called once an answer."""
        if not self.share:
            return False
        left = self._left.pop(expert, 0) or self._gap()
        self._left[expert] = left - 1
        if len(self._left) > MOST_EXPERTS:
            self._left.popitem(last=False)
        return left == 1

    def judge(self, cosine: float, updates: int) -> Verdict:
        """What the least cosine of the rows says, so many updates apart; it is counted."""
        if math.isnan(cosine):
            verdict = Verdict.UNSURE
        elif cosine >= AGREES:
            verdict = Verdict.GOOD
        elif not updates or (updates <= FEW and cosine < ALIKE):
            verdict = Verdict.WRONG
        else:
            verdict = Verdict.GOOD if updates <= FEW else Verdict.UNSURE
        self.verdicts[verdict] += 1
        return verdict

    def _gap(self) -> int:
        """Answers from one audit to the next: 1 / share in the mean, never twice that."""
        return self.rng.randint(1, max(1, round(2 / self.share) - 1))
