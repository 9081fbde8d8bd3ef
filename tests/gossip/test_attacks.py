"""What a hostile member can do to the membership, with real keys: nothing."""

from __future__ import annotations

import random

import cbor2
import msgspec
import pytest

from p2pmoe.errors import MalformedMessage
from p2pmoe.gossip.members import Equivocation, State
from p2pmoe.gossip.membership import Membership, MembershipParams
from p2pmoe.gossip.messages import (
    MAX_CLAIMS,
    Digest,
    GossipMessage,
    News,
    Tell,
    encode_message,
    open_message,
)
from p2pmoe.gossip.probes import ProbeParams
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import VerifiedCache
from tests.gossip.people import NETWORK, RealPerson, World, accusation, of, sends, tell

PEOPLE = [RealPerson(number) for number in range(80)]
ME, VICTIM, LIAR = PEOPLE[:3]
STILL = MembershipParams(probes=ProbeParams(interval=1e9, random_every=1e9))
CACHE = VerifiedCache(4096)


def world(*members: RealPerson, params: MembershipParams = STILL) -> World:
    """A machine that knows these members and is connected to them."""
    core = Membership(ME.record(), ME.sign, params, random.Random(1), 0.0)
    around = World(core)
    for person in members:
        around.do(core.learn(person.record(), 0.0))
        around.do(core.connected(person.id, 0.0))
    around.wait(5.0)
    return around


def over_the_wire(message: GossipMessage) -> GossipMessage:
    return open_message(encode_message(message), NETWORK, CACHE)


def state(around: World, person: RealPerson) -> State:
    member = around.machine.member(person.id)
    assert member is not None
    return member.state


def test_three_invented_accusers_change_nothing() -> None:
    around = world(VICTIM, LIAR)
    invented = [RealPerson(1000 + number) for number in range(3)]
    lies = tell(*(one.accuse(VICTIM.record(), "refused") for one in invented))
    effects = around.machine.receive(LIAR.id, over_the_wire(lies), around.now)
    assert effects == []
    around.wait(600.0)
    assert state(around, VICTIM) is State.ALIVE


def test_one_liar_with_many_claims_is_one_accuser_and_the_victim_refutes() -> None:
    around = world(*PEOPLE[1:20])
    for evidence in ("silent", "refused", "hearsay"):
        around.hear(LIAR, LIAR.accuse(VICTIM.record(), evidence))
    suspicion = around.machine._roster.suspicions[VICTIM.id]
    assert set(suspicion.accusers) == {LIAR.id}
    assert suspicion.deadline - around.now > 15.0  # Tmax at n = 20: no confirmation came
    around.wait(10.0)
    around.hear(PEOPLE[5], VICTIM.record(2))
    assert state(around, VICTIM) is State.ALIVE


def test_an_accusation_with_a_version_never_signed_changes_nothing() -> None:
    around = world(VICTIM, LIAR)
    body = accusation(VICTIM.record())
    for never in (
        msgspec.structs.replace(body, record=bytes(32)),
        msgspec.structs.replace(body, epoch=7),
        msgspec.structs.replace(body, incarnation=9),
        msgspec.structs.replace(body, incarnation=0),
    ):
        around.hear(LIAR, LIAR.sign(never))
        assert state(around, VICTIM) is State.ALIVE
    around.wait(600.0)
    assert state(around, VICTIM) is State.ALIVE


def test_the_highest_incarnation_silences_nobody() -> None:
    around = world(VICTIM, LIAR)
    top = msgspec.structs.replace(accusation(VICTIM.record()), incarnation=2**63 - 1)
    around.hear(LIAR, LIAR.sign(top))
    around.hear(LIAR, LIAR.accuse(VICTIM.record()))
    assert state(around, VICTIM) is State.SUSPECT
    around.hear(LIAR, VICTIM.record(2))
    assert state(around, VICTIM) is State.ALIVE
    mine = msgspec.structs.replace(accusation(ME.record()), incarnation=2**63 - 1)
    around.hear(LIAR, LIAR.sign(mine))
    around.wait(10.0)
    assert around.machine.own == ME.record()  # nothing to answer


def test_old_traffic_replayed_into_a_restarted_peer_changes_nothing() -> None:
    old = [
        tell(VICTIM.record(1), LIAR.accuse(VICTIM.record(1))),
        tell(VICTIM.record(2), LIAR.accuse(VICTIM.record(2), "refused")),
        tell(VICTIM.leave(2)),
        tell(ME.record(1), LIAR.accuse(ME.record(1)), ME.leave(1)),
    ]
    epoch = 2
    core = Membership(ME.record(1, epoch), ME.sign, STILL, random.Random(1), 0.0)
    around = World(core)
    around.do(core.learn(LIAR.record(), 0.0))
    around.do(core.learn(VICTIM.record(1, epoch), 0.0))
    for message in [*old, *reversed(old)]:
        around.do(core.receive(LIAR.id, over_the_wire(message), around.now))
        around.wait(1.0)
    around.wait(600.0)
    assert state(around, VICTIM) is State.ALIVE
    assert core.member(VICTIM.id).record == VICTIM.record(1, epoch)
    assert core.own == ME.record(1, epoch)


def test_ten_thousand_invented_members_in_one_message_add_at_most_the_limit() -> None:
    invented = [RealPerson(2000 + number).record().raw for number in range(MAX_CLAIMS + 1)]

    def written(records: list[bytes]) -> bytes:
        """As a peer without limits of its own would write it."""
        return cbor2.dumps({"body": {"t": "news"}, "records": records}, canonical=True)

    around = world(LIAR)
    for records in (invented * 160, invented):
        with pytest.raises(MalformedMessage):
            open_message(written(records), NETWORK, CACHE)
    message = open_message(written(invented[:MAX_CLAIMS]), NETWORK, CACHE)
    around.machine.receive(LIAR.id, message, around.now)
    assert len(around.machine.members()) == 1 + MAX_CLAIMS


def test_a_sender_brings_so_many_new_members_and_no_more() -> None:
    params = MembershipParams(probes=STILL.probes, new_members=30, new_member_rate=1.0)
    around = world(LIAR, params=params)
    around.hear(LIAR, *(person.record() for person in PEOPLE[10:70]))
    assert len(around.machine.members()) == 31
    around.wait(10.0)
    around.hear(LIAR, *(person.record() for person in PEOPLE[10:70]))
    assert len(around.machine.members()) == 41


def test_equivocation_is_detected_reported_and_passed_on() -> None:
    around = world(VICTIM, LIAR, *PEOPLE[5:10])
    one, other = LIAR.record(2, meta=b"one"), LIAR.record(2, meta=b"other")
    around.hear(VICTIM, one)
    effects = around.hear(PEOPLE[5], other) + around.wait(1.0)
    (found,) = of(effects, Equivocation)
    assert {found.a.raw, found.b.raw} == {one.raw, other.raw}
    assert other in {claim for each in sends(effects) for claim in each.message.claims}
    assert state(around, LIAR) is State.DEAD
    around.wait(2.0)
    around.hear(LIAR, LIAR.record(3))
    assert state(around, LIAR) is State.DEAD
    around.hear(LIAR, LIAR.accuse(VICTIM.record()))
    assert state(around, VICTIM) is State.ALIVE
    around.hear(LIAR, LIAR.record(1, epoch=2))
    assert state(around, LIAR) is State.ALIVE


def test_a_liar_that_calls_everybody_dead_moves_nobody() -> None:
    around = world(VICTIM, LIAR, *PEOPLE[5:20])
    rows = b"".join(
        p.id.raw[:8] + (1).to_bytes(8) * 2 + p.record().digest[:8] + b"\1" for p in PEOPLE
    )
    around.do(around.machine.receive(LIAR.id, GossipMessage(Digest(covers=0, rows=rows)), 9.0))
    around.wait(100.0)
    assert {member.state for member in around.machine.members().values()} == {State.ALIVE}


def test_nobody_makes_somebody_else_leave() -> None:
    forged = bytearray(VICTIM.leave().raw)
    forged[-1] ^= 1
    with pytest.raises(MalformedMessage):
        open_message(schema.encode(Tell(body=News(), leaves=(bytes(forged),))), NETWORK, None)
    around = world(VICTIM, LIAR)
    around.hear(LIAR, LIAR.leave())
    assert (state(around, VICTIM), state(around, LIAR)) == (State.ALIVE, State.LEFT)
