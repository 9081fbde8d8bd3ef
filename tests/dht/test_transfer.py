"""A lease is handed over by who owns it, to whom it names, once; nobody else gains by it."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from trio.testing import MockClock

from p2pmoe.dht.claims import Ask, Claim, Lost
from p2pmoe.dht.leases import LeaseCopy, LeaseRefused, most_named, quorum
from p2pmoe.dht.outcomes import AskFirst, Others, Put, Refused, Stale, Stored
from p2pmoe.dht.records import RecordParams, RecordStore
from p2pmoe.errors import LeaseLost, PeerUnreachable, QuorumNotReached
from p2pmoe.wire.envelope import Kind, Signed
from tests.dht.peers import UID, Peer, Town, held, owner_of, swarm, town
from tests.dht.swarm_of_ids import GRID, PEOPLE, lease, snapshot, transfer

ANN, BOB, EVE = PEOPLE[:3]
KEY = lease(ANN).body.key


def anns(number: int = 1, *, started_at: float = 0.0) -> RecordStore:
    """A holder of Ann's lease."""
    one = RecordStore(RecordParams(), started_at=started_at)
    one.decide(lease(ANN, number=number), Others(number=number - 1), started_at)
    return one


def owner(one: RecordStore, now: float) -> object:
    return next((each.signed.signer for each in one.get(KEY, now, kind=Kind.LEASE)), None)


# ------------------------------------------------------------------------------- what a holder does
def test_a_lease_that_was_signed_over_is_granted_at_once() -> None:
    one = anns()
    bobs = lease(BOB, number=2)
    assert one.put(bobs, 5.0, transfer=transfer(ANN, BOB)) == Stored(35.0)
    assert owner(one, 5.0) == BOB.peer_id
    refused = one.put(lease(ANN, number=1, version=9), 6.0)
    assert isinstance(refused, Refused)
    assert refused.why == "owned"


@pytest.mark.parametrize(
    ("said", "claim"),
    [
        (None, lease(BOB, number=2)),
        (transfer(EVE, BOB), lease(BOB, number=2)),  # signed by one who has nothing to give
        (transfer(BOB, BOB), lease(BOB, number=2)),
        (transfer(ANN, BOB), lease(EVE, number=2)),  # given to another one
        (transfer(ANN, BOB, "ffn.1.3"), lease(BOB, number=2)),  # another expert
        (transfer(ANN, BOB, grid=bytes(32)), lease(BOB, number=2)),  # in another grid
        (transfer(ANN, BOB, number=3), lease(BOB, number=3)),  # a number that is not next
        (transfer(ANN, BOB), lease(BOB, number=3)),
        (transfer(ANN, BOB, number=1), lease(BOB, number=1)),
    ],
)
def test_what_the_owner_did_not_sign_over_so_is_refused(said: Signed | None, claim: Signed) -> None:
    one = anns()
    refused = one.put(claim, 5.0, transfer=said)
    assert isinstance(refused, Refused)
    assert refused.why == "owned"
    assert owner(one, 5.0) == ANN.peer_id


def test_a_transfer_counts_once() -> None:
    one, old = anns(), transfer(ANN, BOB)
    one.put(lease(BOB, number=2), 1.0, transfer=old)
    one.put(lease(ANN, number=3), 2.0, transfer=transfer(BOB, ANN, number=3))
    assert owner(one, 2.0) == ANN.peer_id
    for number in (2, 3, 4):
        assert isinstance(one.put(lease(BOB, number=number, version=7), 3.0, transfer=old), Refused)
    assert owner(one, 3.0) == ANN.peer_id


def test_a_claim_that_was_withdrawn_does_not_come_back_by_its_transfer() -> None:
    one, old = anns(), transfer(ANN, BOB)
    bobs = lease(BOB, number=2, version=3)
    one.put(lease(BOB, number=2, version=4, ttl_ms=0), 1.0)
    assert one.put(bobs, 1.0, transfer=old) == Stale()


def test_a_lease_that_has_ended_is_no_ones_to_hand_over() -> None:
    one = anns()
    bobs, said = lease(BOB, number=2), transfer(ANN, BOB)
    assert one.put(bobs, 31.0, transfer=said) == AskFirst(bobs, said)
    assert one.decide(bobs, Others(number=1, answered=4), 31.0, transfer=said) == Stored(61.0)


def test_a_holder_that_hears_of_the_lease_from_others_grants_it_too() -> None:
    one = RecordStore(RecordParams(), started_at=0.0, amnesia=True)
    bobs, said = lease(BOB, number=2), transfer(ANN, BOB)
    others = Others((LeaseCopy(lease(ANN), 20.0),) * 2, 1, 2)
    assert one.put(bobs, 1.0, transfer=said) == AskFirst(bobs, said)
    assert one.decide(bobs, others, 1.0, transfer=said) == Stored(31.0)
    two = RecordStore(RecordParams(), started_at=0.0)
    assert isinstance(two.decide(lease(EVE, number=2), others, 1.0, transfer=said), Refused)


def test_what_is_handed_over_is_no_vacant_cell() -> None:
    one = RecordStore(RecordParams(leases_per_grid=1), started_at=0.0)
    for uid in ("ffn.1.2", "ffn.1.3"):
        one.decide(lease(ANN if uid == "ffn.1.2" else EVE, uid), Others(), 0.0)
    for giver, uid in ((ANN, "ffn.1.2"), (EVE, "ffn.1.3")):
        given = one.put(lease(BOB, uid, number=2), 1.0, transfer=transfer(giver, BOB, uid))
        assert given == Stored(31.0)
    assert isinstance(one.decide(lease(BOB, "ffn.1.4"), Others(), 1.0), Stored)


def test_who_took_it_over_says_what_was_saved() -> None:
    one = anns()
    one.put(snapshot(ANN, step=4), 1.0)
    one.put(lease(BOB, number=2), 1.0, transfer=transfer(ANN, BOB))
    assert isinstance(one.put(snapshot(ANN, step=5), 2.0), Refused)
    assert isinstance(one.put(snapshot(BOB, number=2, step=4), 2.0), Stored)


# ----------------------------------------------------------------------------- what a claimant does
def test_a_claim_does_not_lose_to_an_owner_that_signed_it_over() -> None:
    copies = [LeaseCopy(lease(ANN, UID), 30.0)] * 5
    assert Claim(BOB.peer_id).look(copies, 1, 5, 0.0) == Lost(ANN.peer_id)
    claim = Claim(BOB.peer_id, transfer(ANN, BOB, UID))
    assert claim.look(copies, 1, 5, 0.0) == Ask(2)
    assert claim.look(copies, 2, 5, 0.0) == Lost(ANN.peer_id)  # it was used by somebody
    theirs = [LeaseCopy(lease(EVE, UID), 30.0)] * 5
    assert claim.look(theirs, 1, 5, 0.0) == Lost(EVE.peer_id)


def test_a_claimant_asks_for_a_number_above_what_it_remembers_itself() -> None:
    assert Claim(BOB.peer_id, above=17).look([], 3, 5, 0.0) == Ask(18)
    assert Claim(BOB.peer_id, above=17).look([], 20, 5, 0.0) == Ask(21)


# ------------------------------------------------------------------------------------ whole peers
def willing(peer: Peer) -> None:
    peer.dht.on_transfer = lambda _grid, _uid, _owner: True


async def test_a_hand_over_takes_a_moment_and_every_reader_is_given_the_new_owner(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 6)
        await peers[0].dht.claim(GRID, UID)
        offers: list[tuple] = []
        peers[1].dht.on_transfer = lambda *offer: offers.append(offer) or True
        began = trio.current_time()
        assert await peers[0].dht.transfer(GRID, UID, peers[1].id)
        assert offers == [(GRID, UID, peers[0].id)]
        assert held(peers[0]) is None
        view = await peers[1].dht.claim(GRID, UID)
        assert (view.peer, view.number) == (peers[1].id, 2)
        assert trio.current_time() - began < 1.0
        for reader in peers:
            named = await owner_of(reader)
            assert named is not None
            assert (named.peer, named.number) == (peers[1].id, 2)
        await trio.sleep(90)
        assert held(peers[1]) == 2
        below = await peers[3].dht.get_prefix(GRID, "ffn.3")
        assert below.coordinates == {7: (peers[1].id,)}


async def test_a_peer_without_room_refuses_and_the_next_one_takes_it(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        assert not await peers[0].dht.transfer(GRID, UID, peers[1].id)
        assert held(peers[0]) is None  # it serves nothing, whatever came of it
        willing(peers[2])
        assert await peers[0].dht.transfer(GRID, UID, peers[2].id)
        assert (await peers[2].dht.claim(GRID, UID)).number == 2


async def test_what_nobody_took_is_withdrawn_and_vacant_at_once(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        gone = peers[1]
        await here.kill(gone)
        with pytest.raises(PeerUnreachable):
            await peers[0].dht.transfer(GRID, UID, gone.id)
        with pytest.raises(LeaseRefused):
            await peers[2].dht.claim(GRID, UID)
        await peers[0].dht.withdraw([UID])
        assert (await peers[2].dht.claim(GRID, UID)).peer == peers[2].id


async def test_one_can_hand_over_only_what_it_holds(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        willing(peers[1])
        with pytest.raises(LeaseLost):
            await peers[0].dht.transfer(GRID, UID, peers[1].id)
        await peers[0].dht.claim(GRID, UID)
        with pytest.raises(LeaseLost):
            await peers[2].dht.transfer(GRID, UID, peers[1].id)
        assert await peers[0].dht.transfer(GRID, UID, peers[1].id)
        with pytest.raises(LeaseLost):
            await peers[0].dht.transfer(GRID, UID, peers[1].id)


async def test_who_takes_back_what_it_offered_may_give_it_away_later(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        assert not await peers[0].dht.transfer(GRID, UID, peers[1].id)
        assert (await peers[0].dht.claim(GRID, UID)).number == 2
        willing(peers[1])
        assert await peers[0].dht.transfer(GRID, UID, peers[1].id)
        assert (await peers[1].dht.claim(GRID, UID)).number == 3


async def test_an_offer_for_somebody_else_and_one_that_is_false_gain_nothing(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        for each in peers:
            willing(each)
        await peers[0].dht.claim(GRID, UID)
        asks = peers[3].dht._asks
        wrong = transfer(peers[3].keys, peers[2].keys, UID)
        assert (await asks.put(peers[1].id, wrong)).why == "not_for_me"
        mine = transfer(peers[3].keys, peers[1].keys, UID)
        assert (await asks.put(peers[1].id, mine)).outcome == "stored"
        with pytest.raises(LeaseRefused):
            await peers[1].dht.claim(GRID, UID)
        relayed = transfer(peers[0].keys, peers[1].keys, UID)
        assert (await asks.put(peers[1].id, relayed)).why == "not_publisher"
        assert held(peers[0]) == 1


async def test_offers_are_remembered_up_to_a_cap(autojump_clock) -> None:
    async with town() as here:
        [one] = await swarm(here, 1)
        willing(one)
        for at in range(70):
            one.dht._owner.offered(transfer(ANN, one.keys, f"ffn.1.{at}"), one.dht.on_transfer)
        assert len(one.dht._owner._offers) == 64
        assert (GRID, "ffn.1.5") not in one.dht._owner._offers


async def test_what_is_saved_is_found_by_everybody_and_survives_the_owner(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 6)
        await peers[0].dht.claim(GRID, UID)
        said = [snapshot(peers[0].keys, UID, step=step) for step in (3, 8)]
        for each in said:
            assert len(await peers[0].dht.put_snapshot(each)) == 5
        await here.kill(peers[0])
        await trio.sleep(700)
        assert await peers[4].dht.snapshots(GRID, UID) == said[::-1]
        assert (await peers[2].dht.claim(GRID, UID)).number == 2  # the first one's is remembered
        assert await peers[4].dht.snapshots(GRID, "ffn.0.0") == []


async def test_what_nobody_stores_of_a_snapshot_is_an_error_that_says_why(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        with pytest.raises(QuorumNotReached, match="no_lease"):
            await peers[0].dht.put_snapshot(snapshot(peers[0].keys, UID))


async def test_holders_that_came_later_are_told_of_what_was_saved(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        await peers[0].dht.claim(GRID, UID)
        said = snapshot(peers[0].keys, UID)
        await peers[0].dht.put_snapshot(said)
        late = await here.open(9, by=peers[:1])
        assert await late.dht.snapshots(GRID, UID) == [said]
        await trio.sleep(1)
        kept = late.dht._store.get(said.body.key, trio.current_time(), kind=Kind.SNAPSHOT)
        assert [each.signed for each in kept] == [said]


# ------------------------------------------------------------------------ whoever tries what it may
class Handing(RuleBasedStateMachine):
    """Five holders; Ann and Bob pass a lease to and fro, Eve tries whatever she can sign or saw."""

    @initialize()
    def begin(self) -> None:
        self.now, self.version = 0.0, 1
        self.stores = [RecordStore(RecordParams(), started_at=0.0) for _ in range(5)]
        self.owner, self.number, self.until = ANN, 1, 30.0
        self.seen: list[tuple[Signed, Signed | None]] = []
        self.transfers: list[Signed] = []
        assert self.put(lease(ANN), None) >= quorum(5)

    def put(self, claim: Signed, said: Signed | None, *, reaches: int = 5) -> int:
        """At how many holders it was granted."""
        self.seen.append((claim, said))
        granted = 0
        for one in self.stores[:reaches]:
            outcome: Put | AskFirst = one.put(claim, self.now, transfer=said)
            if isinstance(outcome, AskFirst):
                named = [
                    copy for other in self.stores if other is not one for copy in self.copies(other)
                ]
                numbers = max(other.number(KEY) for other in self.stores)
                outcome = one.decide(claim, Others(named, numbers, 4), self.now, transfer=said)
            granted += isinstance(outcome, Stored)
        return granted

    def copies(self, one: RecordStore) -> list[LeaseCopy]:
        entries = one.get(KEY, self.now, kind=Kind.LEASE)
        return [LeaseCopy(each.signed, each.expires_at) for each in entries]

    def claimed(self, keys: object, number: int) -> Signed:
        self.version += 1
        return lease(keys, number=number, version=self.version)

    @rule(reaches=st.integers(3, 5))
    def hand_over(self, reaches: int) -> None:
        """To the other of the two; what they sign is signed once a number."""
        if self.now >= self.until:
            return
        to = BOB if self.owner is ANN else ANN
        said = transfer(self.owner, to, number=self.number + 1)
        self.transfers.append(said)
        if self.put(self.claimed(to, self.number + 1), said, reaches=reaches) >= quorum(5):
            self.owner, self.number, self.until = to, self.number + 1, self.now + 30.0

    @rule()
    def renew(self) -> None:
        if self.now >= self.until:
            return
        if self.put(self.claimed(self.owner, self.number), None) >= quorum(5):
            self.until = self.now + 30.0

    @rule(seconds=st.sampled_from([1.0, 9.0]))
    def wait(self, seconds: float) -> None:
        if self.now + seconds < self.until:
            self.now += seconds

    @rule(number=st.integers(1, 9), to=st.sampled_from([ANN, BOB, EVE]))
    def forge(self, number: int, to: object) -> None:
        self.put(self.claimed(EVE, number), transfer(EVE, to, number=number))

    @rule(number=st.integers(1, 9), data=st.data())
    def steal(self, number: int, data: st.DataObject) -> None:
        """Claim with somebody else's transfer."""
        if self.transfers:
            said = data.draw(st.sampled_from(self.transfers))
            self.put(self.claimed(EVE, number), said)

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        if self.seen:
            self.put(*data.draw(st.sampled_from(self.seen)))

    @rule(data=st.data())
    def use_an_old_transfer(self, data: st.DataObject) -> None:
        """By the one it was for, who has given the lease on since."""
        spent = [said for said in self.transfers if said.body.number <= self.number]
        if spent:
            said = data.draw(st.sampled_from(spent))
            to = ANN if said.body.to == ANN.peer_id.raw else BOB
            if to is not self.owner:
                self.put(self.claimed(to, said.body.number), said)

    @invariant()
    def no_reader_is_given_a_stranger(self) -> None:
        if not hasattr(self, "stores") or self.now >= self.until:
            return
        winner = most_named([copy for one in self.stores for copy in self.copies(one)])
        assert winner is not None
        assert (winner.signed.signer, winner.signed.body.number) == (
            self.owner.peer_id,
            self.number,
        )


TestHanding = Handing.TestCase
TestHanding.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


moves = st.lists(
    st.tuples(
        st.sampled_from(["give", "wait", "read", "grab"]), st.integers(0, 4), st.integers(0, 4)
    ),
    max_size=10,
)


@given(moves)
@settings(max_examples=5, deadline=None)
def test_whoever_has_it_was_given_it_and_nobody_else_is_read(history: list[tuple]) -> None:
    async def play(here: Town) -> None:
        peers = await swarm(here, 5)
        for each in peers:
            willing(each)
        await peers[0].dht.claim(GRID, UID)
        at = 0
        for what, who, whom in history:
            if what == "give" and who == at and whom != at:
                assert await peers[at].dht.transfer(GRID, UID, peers[whom].id)
                view = await peers[whom].dht.claim(GRID, UID)
                assert view.peer == peers[whom].id
                at = whom
            elif what == "grab" and who != at:
                with pytest.raises(LeaseRefused):
                    await peers[who].dht.claim(GRID, UID)
            elif what == "read":
                view = await owner_of(peers[who])
                assert view is not None
                assert view.peer == peers[at].id
            await trio.sleep(7.0 if what == "wait" else 0.1)
            assert [bool(held(each)) for each in peers] == [each is peers[at] for each in peers]

    async def run() -> None:
        async with town() as here:
            await play(here)

    trio.run(run, clock=MockClock(autojump_threshold=0.0))
