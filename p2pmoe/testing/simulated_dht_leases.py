"""Who is believed to serve an expert while holders come and go and strangers try to take it over.

An owner claims a uid and renews its lease as `dht/owner.py` does; a stranger claims it again and
again, asks for the longest lifetime there is, and replays every record of the owner that it has
seen; readers ask all the while. An owner may stand still, give its uid back, or hand it over to an
heir, and put its old leases again ever after. What must never happen is counted: a reader that is
given somebody else while the owner's lease runs, and two that hold valid leases at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from p2pmoe.dht.claims import Again, Ask, Claim
from p2pmoe.dht.leases import Granted, LeaseBook, LeaseParams, Vote, most_named, tally
from p2pmoe.dht.messages import MAX_TTL_MS, Lease, Transfer, key_of
from p2pmoe.dht.reading import Question, Searched, all_reached, never
from p2pmoe.identity import PeerId
from p2pmoe.testing.simulated_dht import SimulatedPeer, World, sign
from p2pmoe.testing.simulated_dht_churn import Churn, ChurnRun
from p2pmoe.testing.simulated_dht_search import Search, Write, read
from p2pmoe.wire.envelope import Kind, Signed

GRID, UID = bytes(32), "ffn.3.7"
NAME = (GRID, UID)
KEY = key_of(Kind.LEASE, *NAME)
LOOK_EVERY = 0.5  # seconds between looks at what is due


class Claimant:
    """One peer that wants the uid: the owner, its heir, or a stranger."""

    def __init__(self, world: World, peer: SimulatedPeer, ttl_ms: int = 30_000) -> None:
        self.world, self.peer = world, peer
        self.book = LeaseBook(LeaseParams())
        self.paused = False
        self.sent: list[Signed[Lease]] = []
        self.transfer: Signed[Transfer] | None = None  # what it says that the owner signed
        self._ttl_ms = ttl_ms
        self._claiming = False

    @property
    def number(self) -> int | None:
        """The number under which it would serve a call now."""
        return self.book.number(NAME, self.world.now)

    # ---------------------------------------------------------------------------------- claiming
    def claim(self) -> None:
        """Try to get it, as often as the rules of a claim allow."""
        if not self._claiming and self.number is None and not self.paused:
            self._claiming = True
            self._round(Claim(self.peer.id, self.transfer))

    def _round(self, claim: Claim) -> None:
        question = Question(Kind.LEASE, KEY)
        read(self.world, self.peer, question, partial(self._looked, claim), never)

    def _looked(self, claim: Claim, found: Searched) -> None:
        look = claim.look(found.copies(), found.number(), len(found.holders), self.world.now)
        if not isinstance(look, Ask):
            self._claiming = False
            return
        lease = self._lease(look.number, self._ttl_ms)
        counted = partial(self._counted, claim, lease, (list(found.holders), self.world.now))
        Write(self.world, self.peer, lease, counted, self.transfer).at(list(found.holders))

    def _counted(
        self,
        claim: Claim,
        lease: Signed[Lease],
        at: tuple[list[PeerId], float],
        votes: Mapping[PeerId, Vote],
        asked: int,
    ) -> None:
        places, asked_at = at
        outcome = claim.count(lease, list(votes.values()), asked)
        if isinstance(outcome, Granted):
            self.book.granted(NAME, lease.body.number, asked_at)
            self._claiming = False
            return
        Write(self.world, self.peer, self._lease(lease.body.number, 0)).at(places)
        if isinstance(outcome, Again):
            self.world.simulation.after(outcome.most, self._round, claim)
        else:
            self._claiming = False

    # ---------------------------------------------------------------------------------- renewing
    def look_after(self) -> None:
        """Renew what is due, again and again."""
        if not self.paused:
            self.book.lapsed(self.world.now)
            for _ in self.book.due(self.world.now):
                Search(self.world, self.peer, KEY, self._renew, all_reached)
        self.world.simulation.after(LOOK_EVERY, self.look_after)

    def _renew(self, found: Searched) -> None:
        number, asked_at = self.number, self.world.now
        if number is None or self.paused:
            return
        lease = self._lease(number, self._ttl_ms)

        def counted(votes: Mapping[PeerId, Vote], asked: int) -> None:
            outcome = tally(lease, list(votes.values()), asked, renewal=True)
            if self.number != number:
                return
            if isinstance(outcome, Granted):
                self.book.granted(NAME, number, asked_at)
            elif outcome.owner is not None:
                self.book.drop(NAME)
            else:
                self.book.missed(NAME, self.world.now)

        Write(self.world, self.peer, lease, counted).at(list(found.holders))

    def withdraw(self) -> None:
        """Give it back."""
        number = self.number
        self.book.drop(NAME)
        if number is not None:
            Write(self.world, self.peer, self._lease(number, 0)).begin()

    def hand_over(self, to: PeerId) -> Signed[Transfer] | None:
        """End the lease here and sign it over, as `dht/owner.py` does; None without a lease."""
        number = self.book.end(NAME, self.world.now)
        if number is None:
            return None
        body = Transfer(grid=GRID, uid=UID, to=to.raw, number=number + 1)
        return sign(self.peer.id, body, Kind.TRANSFER)

    def replay(self, records: Sequence[Signed[Lease]]) -> None:
        """Put somebody else's records at the holders again, the newest first."""
        for record in records[-1:-4:-1]:
            Write(self.world, self.peer, record).begin()

    def _lease(self, number: int, ttl_ms: int) -> Signed[Lease]:
        epoch, version = self.peer.version()
        body = Lease(
            grid=GRID, uid=UID, number=number, epoch=epoch, incarnation=version, ttl_ms=ttl_ms
        )
        lease = sign(self.peer.id, body, Kind.LEASE)
        self.sent.append(lease)
        return lease


# ---------------------------------------------------------------------------------- the attack
@dataclass(frozen=True, slots=True, kw_only=True)
class TakeoverRun:
    """Seconds. `pause_at`: from then on the owner's process stands still for a minute."""

    nodes: int = 20
    half_life: float = 900.0
    duration: float = 7200.0
    try_every: float = 5.0
    read_every: float = 20.0
    pause_at: float | None = None
    give_back_at: float | None = None
    hand_over_at: float | None = None
    seed: int = 1


@dataclass(slots=True)
class TakeoverFigures:
    """What came of it. The first two must be 0, whatever happens."""

    strangers_read: int = 0  # reads that named another one while the owner's lease ran
    both_valid: int = 0  # looks at which two would have served a call
    reads: int = 0
    owner_read: int = 0  # reads that named the owner while its lease ran
    nobody_read: int = 0  # reads that named nobody although the owner's lease ran
    tries: int = 0
    owner_held: float = 0.0  # share of the looks at which the owner's lease ran
    stranger_held: float = 0.0


class Takeover:
    """One run of the attack."""

    def __init__(self, run: TakeoverRun) -> None:
        self.run = run
        self._churn = Churn(
            ChurnRun(nodes=run.nodes, half_life=run.half_life, records=0, seed=run.seed)
        )
        self._churn.begin()
        world = self.world = self._churn.world
        world.seeded = True
        self.owner = Claimant(world, self._outsider())
        self.stranger = Claimant(world, self._outsider(), ttl_ms=MAX_TTL_MS)
        self.heir = Claimant(world, self._outsider())
        self._reader = self._outsider()
        self._claimants = (self.owner, self.heir, self.stranger)
        world.seeded = False
        self.figures = TakeoverFigures()
        self._looks = self._held = self._taken = 0

    def _outsider(self) -> SimulatedPeer:
        """A peer that stays, and holds nothing for others."""
        peer = self.world.add(listed=False)
        self.world.contacts_of(peer)
        self._churn.keep(peer)
        return peer

    def measure(self) -> TakeoverFigures:
        """Run it to its end."""
        run, simulation = self.run, self.world.simulation
        self.owner.claim()
        simulation.run(5.0)
        for each in self._claimants:
            each.look_after()
        self._again(run.try_every, self._try)
        self._again(run.read_every, self._read)
        self._again(LOOK_EVERY, self._look)
        if run.pause_at is not None:
            simulation.at(run.pause_at, self._pause, True)
            simulation.at(run.pause_at + 60.0, self._pause, False)
        if run.give_back_at is not None:
            simulation.at(run.give_back_at, self._give_back)
        if run.hand_over_at is not None:
            simulation.at(run.hand_over_at, self._hand_over)
        simulation.run(run.duration)
        self.figures.owner_held = self._held / max(1, self._looks)
        self.figures.stranger_held = self._taken / max(1, self._looks)
        return self.figures

    def _again(self, every: float, action: Callable[[], None]) -> None:
        def act() -> None:
            action()
            self.world.simulation.after(every, act)

        self.world.simulation.after(every, act)

    def _try(self) -> None:
        self.figures.tries += 1
        self.stranger.claim()
        if self.figures.tries % 6 == 0:
            self.stranger.replay(self.owner.sent)

    def _pause(self, paused: bool) -> None:
        self.owner.paused = paused

    def _give_back(self) -> None:
        """The owner gives it back and puts its old leases at the holders ever after."""
        self.owner.withdraw()
        self._put_old_leases(self.owner)

    def _hand_over(self) -> None:
        """The heir owns it from now on; the stranger claims with what was signed for the heir."""
        former, self.owner = self.owner, self.heir
        self.heir.transfer = self.stranger.transfer = former.hand_over(self.heir.peer.id)
        self.heir.claim()
        self._again(self.run.try_every, former.claim)
        self._put_old_leases(former)

    def _put_old_leases(self, former: Claimant) -> None:
        self._again(30.0, partial(former.replay, list(former.sent)))

    def _look(self) -> None:
        self._looks += 1
        self._held += self.owner.number is not None
        self._taken += self.stranger.number is not None
        self.figures.both_valid += sum(each.number is not None for each in self._claimants) > 1

    def _read(self) -> None:
        if self.owner.number is not None:
            named = partial(self._named, self.owner)
            read(self.world, self._reader, Question(Kind.LEASE, KEY), named)

    def _named(self, owner: Claimant, found: Searched) -> None:
        if owner.number is None:
            return
        self.figures.reads += 1
        valid = [copy for copy in found.copies() if copy.expires_at > self.world.now]
        winner = most_named(valid)
        if winner is None:
            self.figures.nobody_read += 1
        elif winner.signed.signer == owner.peer.id:
            self.figures.owner_read += 1
        else:
            self.figures.strangers_read += 1
