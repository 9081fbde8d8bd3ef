"""The whole DHT as a state machine on the network in memory.

Hypothesis writes a history: peers join, leave and crash, all holders are replaced while a stranger
claims, peers claim and give back, read, are parted and healed, and time jumps. After each step, and
when all has settled, the promises are checked:

- nobody but one peer of a connected swarm believes that it has a uid, and its number only grows;
- whoever reads is given an owner that believes so too, or nobody;
- a swarm that is left alone for a while agrees, and every lease that is held is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pmoe.dht.leases import MOST_HOLDERS, LeaseRefused
from p2pmoe.dht.messages import key_of
from p2pmoe.errors import P2PMoEError, QuorumNotReached
from p2pmoe.wire.envelope import Kind
from tests.dht.peers import Peer, Town, held, owner_of, town
from tests.dht.swarm_of_ids import GRID

UIDS = ("ffn.0.0", "ffn.3.7")
MOST_PEERS = 6
SETTLED = 45.0  # seconds: a lease and a renewal, and the back-off of peers that seemed gone

numbers = st.integers(0, MOST_PEERS - 1)
uids = st.sampled_from(UIDS)
steps = st.one_of(
    st.tuples(st.just("join")),
    st.tuples(st.just("leave"), numbers),
    st.tuples(st.just("crash"), numbers),
    st.tuples(st.just("come_back")),
    st.tuples(st.just("claim"), numbers, uids),
    st.tuples(st.just("replace"), uids),
    st.tuples(st.just("claim_all"), uids),
    st.tuples(st.just("withdraw"), numbers, uids),
    st.tuples(st.just("read"), numbers, uids),
    st.tuples(st.just("part"), st.integers(1, MOST_PEERS - 1)),
    st.tuples(st.just("heal")),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 5.0, 20.0])),
    st.tuples(st.just("jump"), st.sampled_from([3.0, 60.0, 3600.0])),
)


@dataclass
class World:
    """The swarm, and what was promised."""

    here: Town
    clock: MockClock
    opened: int = 0
    last: int = MOST_PEERS  # number of a newcomer
    epoch: int = 1
    gone: list[int] = field(default_factory=list)  # numbers of peers that crashed or left
    parted: bool = False
    parted_until: float = -SETTLED  # when the last partition had healed
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def peers(self) -> list[Peer]:
        return self.here.peers

    def pick(self, number: int) -> Peer | None:
        return self.peers[number % len(self.peers)] if self.peers else None

    # ------------------------------------------------------------------------------------- steps
    async def join(self) -> None:
        if self.opened < MOST_PEERS and not self.parted:
            self.opened += 1
            await self.here.open(self.opened)

    async def come_back(self) -> None:
        """A peer that crashed starts again under its key, having forgotten everything."""
        if self.gone and self.peers and not self.parted:
            self.epoch += 1
            await self.here.open(self.gone.pop(0), epoch=self.epoch, amnesia=True)

    async def crash(self, number: int) -> None:
        if len(self.peers) > 1 and (peer := self.pick(number)):
            self.gone.append(int(peer.host[1:]))
            await self.here.kill(peer)

    async def leave(self, number: int) -> None:
        """In good order: what it has it gives back, and the others are told."""
        if len(self.peers) > 1 and (peer := self.pick(number)):
            await peer.dht.withdraw(UIDS)
            for other in self.peers:
                if other is not peer and not self.parted:
                    other.dht.member_left(peer.id)
            await self.crash(number)

    async def claim(self, number: int, uid: str) -> None:
        peer = self.pick(number)
        if peer is not None:
            try:
                view = await peer.dht.claim(GRID, uid)
            except (LeaseRefused, QuorumNotReached):
                return
            assert view.peer == peer.id

    async def claim_all(self, uid: str) -> None:
        async with trio.open_nursery() as claims:
            for number in range(len(self.peers)):
                claims.start_soon(self.claim, number, uid)

    async def replace(self, uid: str) -> None:
        """All holders but the owner crash, and newcomers take their places: one of them claims."""
        owner = next((peer for peer in self.peers if held(peer, uid)), None)
        if owner is None or self.unsettled:
            return
        found = await owner.dht.inspect(key_of(Kind.LEASE, GRID, uid))
        if not found.answers[owner.id].records:  # it holds what is nearer to others
            return
        for peer in [peer for peer in self.peers if peer is not owner]:
            await self.here.kill(peer)
        for _ in range(MOST_HOLDERS - 1):
            self.last += 1
            await self.here.open(self.last, by=[owner])
        if (number := held(owner, uid)) is not None:
            await self.claim(len(self.peers) - 1, uid)
            assert (held(owner, uid), held(self.peers[-1], uid)) == (number, None)

    async def withdraw(self, number: int, uid: str) -> None:
        if peer := self.pick(number):
            had = held(peer, uid)
            await peer.dht.withdraw([uid])
            assert held(peer, uid) is None
            if had and not self.unsettled:  # whoever reads next does not find it
                assert await owner_of(self.peers[0], uid) is None

    async def read(self, number: int, uid: str) -> None:
        reader = self.pick(number)
        if reader is None or self.unsettled:
            return
        began = trio.current_time()
        view = await owner_of(reader, uid)
        assert trio.current_time() - began <= 10.0
        # One that crashed is named until its lease ends; nobody is named who never had it.
        if view is not None and view.peer in {peer.id for peer in self.peers}:
            assert view.number <= self.numbers.get(uid, 0)

    async def part(self, size: int) -> None:
        if len(self.peers) > 1 and not self.parted:
            self.parted = True
            hosts = [peer.host for peer in self.peers]
            at = 1 + size % (len(hosts) - 1)
            self.here.network.partition(hosts[:at], hosts[at:])

    async def heal(self) -> None:
        if self.parted:
            self.parted = False
            self.parted_until = trio.current_time()
            self.here.network.heal()

    async def wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def jump(self, seconds: float) -> None:
        """The machine slept: every deadline is over at once."""
        self.clock.jump(seconds)
        await trio.sleep(0.1)

    # ---------------------------------------------------------------------------------- promises
    @property
    def unsettled(self) -> bool:
        return self.parted or trio.current_time() < self.parted_until + SETTLED

    def check(self) -> None:
        for uid in UIDS:
            owners = {peer.id: held(peer, uid) for peer in self.peers if held(peer, uid)}
            if not self.unsettled:
                assert len(owners) <= 1, (uid, owners)
            for number in owners.values():
                assert number is not None
                if not self.unsettled:
                    assert number >= self.numbers.get(uid, 0), uid
                self.numbers[uid] = max(number, self.numbers.get(uid, 0))

    async def settle(self) -> None:
        """Nothing happens for a while; then all agree, and what is held is found."""
        await self.heal()
        await trio.sleep(SETTLED + 30)
        self.check()
        for uid in UIDS:
            owner = next((peer for peer in self.peers if held(peer, uid)), None)
            for reader in self.peers:
                view = await owner_of(reader, uid)
                named = None if view is None else (view.peer, view.number)
                assert named == (None if owner is None else (owner.id, held(owner, uid))), uid


@given(st.lists(steps, max_size=12))
@example([("claim", 0, UIDS[0]), ("replace", UIDS[0]), ("wait", 5.0), ("replace", UIDS[0])])
@settings(max_examples=8)
def test_whatever_happens_the_promises_hold_and_afterwards_all_agree(
    history: list[tuple[object, ...]],
) -> None:
    clock = MockClock(autojump_threshold=0.0)

    async def run() -> None:
        async with town() as here:
            world = World(here, clock)
            for _ in range(3):
                await world.join()
            for name, *arguments in history:
                try:
                    await getattr(world, str(name))(*arguments)
                except P2PMoEError:
                    assert world.parted, name  # only whoever is cut off may fail
                world.check()
            await world.settle()

    trio.run(run, clock=clock)
