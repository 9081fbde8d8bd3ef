"""What a layer's user wants to know of its passes. A core: it counts, and says when to warn.

Staleness of an update: how many other updates its expert had between the forward pass and the
backward pass of a batch.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

SKIPPED_MUCH = 0.05  # share of rows below `k_min` from which on accuracy must stall; a guess
LATEST_ROWS = 4096  # over which that share is taken; a guess, some tens of batches
ROWS_NEEDED = 64  # before anything is said; a guess: one row of two is no share
MOST_BITS = 20  # of a staleness; the last range has all that is beyond, whatever servers say
PAUSE = 60.0  # seconds between two warnings

# what an operator or author can do, by the codes of the errors that parts ended with
ADVICE = {
    "answers come too late: give the layer more `patience`, or look for slow servers with"
    " `p2pmoe status`": {"timeout"},
    "servers are gone: start one with `p2pmoe node --peer ... --experts N`": {
        "unreachable",
        "lost",
        "unavailable",
        "lease",
        "closed",
    },
    "servers have no room: start another one, or send fewer rows at once": {"busy", "paused"},
    "experts answer NaN or infinity: lower their servers' `--lr`, or look at what you send": {
        "nonfinite"
    },
    "experts fail, or answer what nobody asked: their servers' logs say why": set(),
}


@dataclass
class Skipped:
    """The share of the latest rows that had fewer answers than they need, and what to say of it."""

    _batches: deque[tuple[int, int]] = field(default_factory=deque)  # rows, skipped
    _rows: int = 0
    _skipped: int = 0
    _unsaid: int = 0  # skipped since it was said last
    _causes: Counter[str] = field(default_factory=Counter)
    _said_at: float = -math.inf

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self._skipped / max(1, self._rows)

    def add(self, rows: int, skipped: int, causes: Mapping[str, int], now: float) -> str | None:
        """One more pass. Returns what can be done when it is time to say so, else nothing.

        `causes` are the codes of the errors that its parts ended with, with their rows. Where no
        row was skipped since the last time, there is nothing new to say.
        """
        self._batches.append((rows, skipped))
        self._rows, self._skipped = self._rows + rows, self._skipped + skipped
        while self._rows - self._batches[0][0] >= LATEST_ROWS:
            oldest = self._batches.popleft()
            self._rows, self._skipped = self._rows - oldest[0], self._skipped - oldest[1]
        if skipped:
            self._causes.update(causes)
        stalls = self._rows >= ROWS_NEEDED and self.share > SKIPPED_MUCH
        self._unsaid += skipped
        if not stalls or not self._unsaid or now - self._said_at < PAUSE:
            return None
        self._said_at, self._unsaid = now, 0
        causes, self._causes = self._causes, Counter()
        return max(ADVICE, key=lambda one: (sum(causes[c] for c in ADVICE[one]), not ADVICE[one]))


@dataclass
class Learning:
    """The updates that a layer has brought to its experts."""

    updates: int = 0
    staleness: Counter[int] = field(default_factory=Counter)  # updates by bits of their staleness
    norm: float = 0.0  # of the latest batch's gradient
    most: float = 0.0
    norms: float = 0.0
    batches: int = 0

    def updated(self, before: int, after: int) -> None:
        """An expert had so many updates at the forward pass, and so many with this one."""
        self.updates += 1
        self.staleness[min(MOST_BITS, max(0, after - before - 1).bit_length())] += 1

    def brought(self, norm: float) -> None:
        """A batch of gradients of this norm is on its way."""
        self.norm, self.most = norm, max(self.most, norm)
        self.norms, self.batches = self.norms + norm, self.batches + 1

    def row(self) -> dict[str, int | str]:
        """For people."""
        mean = self.norms / max(1, self.batches)
        norms = {"grad_norm": self.norm, "grad_norm_mean": mean, "grad_norm_most": self.most}
        shown: dict[str, int | str] = {name: f"{value:.3g}" for name, value in norms.items()}
        return {"updates": self.updates, **shown}

    def histogram(self) -> dict[str, int | str]:
        """Updates by how stale they were: `0`, `1`, `2-3`, `4-7` and so on."""
        return {_range(bits): self.staleness[bits] for bits in sorted(self.staleness)}


@dataclass
class Passes:
    """What became of the passes over batches, by method, and of the updates they brought."""

    methods: tuple[str, ...]
    hedged: int = 0  # rows asked again
    others: int = 0  # trainers of the same experts, as their servers said when they were found
    told_of_others: bool = False
    learning: Learning = field(default_factory=Learning)
    skipped: Skipped = field(default_factory=Skipped)
    _figures: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, method: str, figures: Mapping[str, int]) -> None:
        """One more pass: its rows, and its parts' rows, by what became of them."""
        kept = self._figures.setdefault(method, Counter())
        for name, count in figures.items():
            kept[name] += count

    def describe(self, experts: Mapping[str, int]) -> dict[str, dict[str, int | str]]:
        """All of it for people, with what is known of `experts`."""
        told: dict[str, dict[str, int | str]] = {
            method.rpartition(".")[2]: dict(self._figures.get(method, ()))
            for method in self.methods
        }
        forward = self._figures.get(self.methods[0], Counter())
        per_row = forward["answered"] / max(1, forward["rows"])
        told["experts"] = {
            "other_trainers": self.others,
            "per_row": f"{per_row:.3g}",
            "rows_skipped_lately": f"{self.skipped.share:.3g}",
            "rows_hedged": self.hedged,
            **experts,
        }
        return told | {"learning": self.learning.row(), "staleness": self.learning.histogram()}


def _range(bits: int) -> str:
    least, most = (1 << bits) // 2, max(0, (1 << bits) - 1)
    return str(least) if least == most else f"{least}-{most}"
