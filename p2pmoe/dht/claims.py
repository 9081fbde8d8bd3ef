"""A claim of a vacant uid, round by round: whom it loses to, which number it asks for, when it won.

The claimant reads the key from all of the closest peers (`look`), puts a lease with the number
that it is told at the r closest, and counts (`count`). After a defeat it withdraws the claim
everywhere, also where it was refused: by L1 those may have kept a copy of what another granted.
Then it goes on after a pause, or gives up. Of claimants that split the votes the one that comes
first (`claim_rank`) goes on and the others give way. To an owner that signed its lease over a
claim does not lose, as long as nobody remembers the number that this one named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pmoe.dht.leases import Granted, LeaseCopy, Vote, quorum, tally
from p2pmoe.dht.messages import Lease, Transfer
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed

ROUNDS = 4  # of a split vote; a guess
PAUSE = 0.3  # seconds between the first two, at most, and longer each time; a guess
_FINAL = {"cells", "restarted", "not_dialled"}  # rules of holders that another round meets again


@dataclass(frozen=True, slots=True)
class Ask:
    """Put a lease with this number at the r closest."""

    number: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Another peer has the uid, or comes before this one."""

    owner: PeerId


@dataclass(frozen=True, slots=True)
class Again:
    """Begin another round after a pause between these many seconds."""

    least: float
    most: float


@dataclass(frozen=True, slots=True)
class TooFew:
    """Too few holders granted it, for these reasons; it may be tried again much later."""

    granted: int
    needed: int
    reasons: tuple[str, ...]


class Claim:
    """One claimant's attempt at one uid."""

    def __init__(
        self, claimant: PeerId, transfer: Signed[Transfer] | None = None, *, above: int = 0
    ) -> None:
        """`above`: the highest number that the claimant itself remembers."""
        self._claimant, self._transfer = claimant, transfer
        self._lowest = above + 1
        self._round = 1

    def look(self, copies: Sequence[LeaseCopy], number: int, asked: int, now: float) -> Ask | Lost:
        """What the `asked` holders name, and the highest number that anybody remembers."""
        if self._transfer is not None and number < self._transfer.body.number:
            giver = self._transfer.signer
            copies = [copy for copy in copies if copy.signed.signer != giver]
        valid = [copy.signed.signer for copy in copies if copy.expires_at > now]
        for owner in sorted(set(valid) - {self._claimant}):
            if valid.count(owner) >= quorum(asked):
                return Lost(owner)
        return Ask(max(number + 1, self._lowest))

    def count(
        self, lease: Signed[Lease], votes: Sequence[Vote], asked: int
    ) -> Granted | Lost | Again | TooFew:
        """What the holders made of the lease. All but `Granted` wants it withdrawn."""
        outcome = tally(lease, votes, asked, renewal=False)
        if isinstance(outcome, Granted):
            return outcome
        last = self._round == ROUNDS
        winner = outcome.rival or (outcome.owner if last else None)
        if winner is not None:
            return Lost(winner)
        if last or any(vote.why in _FINAL for vote in votes):
            granted = sum(vote.outcome == "stored" for vote in votes)
            return TooFew(granted, quorum(asked), tuple(sorted({v.why for v in votes if v.why})))
        pause = self._round * PAUSE
        self._round += 1
        self._lowest = max(outcome.number, lease.body.number) + 1
        return Again(pause / 2, pause)
