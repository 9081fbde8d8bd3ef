"""The machine as a whole: probes, answers, rumours, refutations, joining, leaving, stalls."""

from __future__ import annotations

import math
import random

import pytest

from p2pmoe.gossip.members import Changed, Dial, Equivocation, Neighbours, Refute, State
from p2pmoe.gossip.membership import Membership, MembershipParams
from p2pmoe.gossip.messages import (
    Ack,
    Digest,
    GossipMessage,
    Leave,
    Nack,
    News,
    Ping,
    PingReq,
    Summary,
    Suspect,
)
from p2pmoe.gossip.probes import ProbeParams
from p2pmoe.gossip.views import ViewParams
from tests.gossip.people import Person, World, of, people, sends, tell

PEOPLE = people(40)
ME, A, B, C, D = PEOPLE[:5]
STILL = MembershipParams(probes=ProbeParams(interval=1e9, random_every=1e9))  # asks nobody


def machine(
    *members: Person, params: MembershipParams = STILL, own: Person = ME, up: bool = True
) -> Membership:
    """One that knows these, is connected to them, and has told its rumours."""
    core = Membership(own.record(), own.sign, params, random.Random(1), 0.0)
    for person in members:
        core.learn(person.record(), 0.0)
    for person in members if up else ():
        core.connected(person.id, 0.0)
    while up and core.next_deadline() < 2.0:
        core.tick(core.next_deadline())
    return core


def state(core: Membership, person: Person) -> State | None:
    member = core.member(person.id)
    return None if member is None else member.state


def end(core: Membership, person: Person) -> float:
    """Let the suspicion of this one end; when that was."""
    while state(core, person) is State.SUSPECT:
        now = core.next_deadline()
        core.tick(now)
    assert state(core, person) is State.DEAD
    return now


def claims(effects: list, to: Person | None = None) -> list:
    """The claims in all messages, or in those to one."""
    found = [one for one in sends(effects) if to is None or one.to == to.id]
    return [claim for one in found for claim in one.message.claims]


# ------------------------------------------------------------------ looking
def test_a_new_machine_knows_itself_only() -> None:
    core = machine()
    assert core.members() == {}
    assert core.own == ME.record()
    assert core.next_deadline() < math.inf


def test_what_is_met_first_hand_is_a_member_and_a_neighbour() -> None:
    core = machine()
    effects = core.learn(A.record(), 1.0)
    assert effects == [Changed(A.id, None, State.ALIVE, A.record()), Neighbours((A.id,))]
    assert core.learn(A.record(), 1.0) == []
    assert core.members()[A.id].record == A.record()


# ------------------------------------------------------------------ answers
def test_a_ping_is_answered_with_load_and_slots_by_anybody_s_wish() -> None:
    core = machine(A)
    core.load = (250, 3)
    for asker in (A, B):
        (ack,) = core.receive(asker.id, GossipMessage(Ping(seq=9)), 3.0)
        assert (ack.to, ack.message.body) == (asker.id, Ack(seq=9, load=250, free_slots=3))
    member = core.member(A.id)
    assert member is not None
    assert member.last_heard == 3.0


def test_relays_are_asked_and_answer() -> None:
    core = machine(A, B)
    request = PingReq(seq=4, target=A.id.raw, left_ms=1000)
    (ping,) = sends(core.receive(B.id, GossipMessage(request), 3.0), Ping)
    answer = GossipMessage(Ack(seq=ping.message.body.seq))
    (ack,) = sends(core.receive(A.id, answer, 3.1), Ack)
    assert (ack.to, ack.message.body.seq) == (B.id, 4)
    assert core.receive(A.id, GossipMessage(Nack(seq=4)), 3.2) == []


# ------------------------------------------------------------------ rumours
def test_a_rumour_goes_to_all_neighbours_but_to_its_teller_and_subject() -> None:
    core = machine(A, B, C)
    told = core.receive(A.id, tell(D.record()), 5.0)
    assert {one.to for one in sends(told, News)} == {B.id, C.id}
    assert {one.to for one in sends(core.connected(D.id, 5.0))} <= {D.id}
    assert core.next_deadline() > 5.1


def test_rumours_wait_for_a_fifth_of_a_second_after_the_last_ones() -> None:
    core = machine(A, B, C)
    core.receive(A.id, tell(D.record()), 5.0)
    later = core.receive(A.id, tell(C.record(2)), 5.1)
    assert claims(later) == []
    assert core.next_deadline() == pytest.approx(5.2)
    assert claims(core.tick(5.2), B) == [C.record(2)]
    assert core.tick(5.4) == []


def test_probes_and_answers_carry_rumours() -> None:
    core = machine(A, B, C)
    core.receive(A.id, tell(D.record()), 5.0)
    core.receive(A.id, tell(C.record(2)), 5.1)
    (ack,) = sends(core.receive(B.id, GossipMessage(Ping(seq=1)), 5.15))
    assert ack.message.claims == (C.record(2),)
    assert claims(core.tick(5.2), B) == []


def test_one_under_suspicion_hears_of_it_before_anything_else() -> None:
    core = machine(A, B, C)
    core.receive(B.id, tell(B.accuse(A.record())), 5.0)
    for _ in range(2):
        (ack,) = sends(core.receive(A.id, GossipMessage(Ping(seq=1)), 5.05))
        assert ack.message.claims == (B.accuse(A.record()),)
    plain = machine(A, B, C, params=MembershipParams(probes=STILL.probes, lifeguard=False))
    plain.receive(B.id, tell(B.accuse(A.record())), 5.0)
    assert sends(plain.receive(A.id, GossipMessage(Ping(seq=1)), 5.05))[0].message.claims == ()


def test_a_neighbour_that_others_accuse_is_asked_at_once() -> None:
    core = machine(A, B, C)
    effects = core.receive(B.id, tell(B.accuse(A.record())), 5.0)
    (ping,) = sends(effects, Ping)
    assert (ping.to, ping.message.claims) == (A.id, (B.accuse(A.record()),))


def test_own_news_go_to_all() -> None:
    core = machine(A, B)
    effects = core.own_record(ME.record(2), 5.0)
    assert core.own == ME.record(2)
    assert {one.to for one in sends(effects)} == {A.id, B.id}
    assert set(claims(effects)) == {ME.record(2)}
    core.own_record(ME.record(1), 5.1)  # overtaken
    assert core.own == ME.record(2)


# ------------------------------------------------------------------ accusing
def test_silence_is_signed_told_and_ends_in_death() -> None:
    core = machine(A, B, C, up=False)
    world = World(core)
    effects = core.unreachable(A.id, 1.0, refused=True)
    assert claims(effects) == []  # nobody is connected yet
    assert of(effects, Changed) == [Changed(A.id, State.ALIVE, State.SUSPECT, A.record())]
    assert core.unreachable(A.id, 1.1, refused=True) == []  # said already
    for person in (B, C):
        world.do(core.connected(person.id, 1.2))
        world.do(core.receive(person.id, tell(person.accuse(A.record(), "refused")), 1.2))
    assert end(core, A) == 2.0


def test_the_accused_hears_it_from_the_accuser_itself() -> None:
    params = MembershipParams(probes=ProbeParams(interval=1e9, random_every=5.0))
    core = machine(*PEOPLE[1:40], params=params)
    seen = []
    while core.next_deadline() < 40:
        seen += core.tick(core.next_deadline())
    accused = [claim for claim in claims(seen) if isinstance(claim.body, Suspect)]
    first = accused[0].body.subject
    told = [one.to.raw for one in sends(seen) for c in one.message.claims if c == accused[0]]
    assert told[0] == first
    assert told.count(first) == 1


def test_silence_of_one_already_accused_is_signed_once() -> None:
    core = machine(A, B, params=MembershipParams(probes=ProbeParams(random_every=1e9)))
    signed = set()
    while core.next_deadline() < 60:
        signed |= {
            c for c in claims(core.tick(core.next_deadline())) if isinstance(c.body, Suspect)
        }
    assert {(c.signer, c.body.subject) for c in signed} == {(ME.id, A.id.raw), (ME.id, B.id.raw)}
    assert len(signed) == 2


def test_an_accusation_of_a_newer_version_asks_its_teller_for_the_record() -> None:
    core = machine(A, B)
    (digest,) = sends(core.receive(B.id, tell(B.accuse(A.record(2))), 5.0))
    assert digest.to == B.id
    other = machine(A, ME, own=B)
    other.receive(A.id, tell(A.record(2)), 3.0)
    answer = sends(other.receive(ME.id, digest.message, 5.1), News)[0]
    assert answer.message.claims == (A.record(2),)
    effects = core.receive(B.id, answer.message, 5.2)
    assert state(core, A) is State.SUSPECT
    assert Changed(A.id, State.ALIVE, State.SUSPECT, A.record(2)) in effects


# ------------------------------------------------------------------ being accused
def test_an_accusation_of_oneself_is_refuted_to_its_teller_and_to_all() -> None:
    core = machine(A, B, C)
    core.receive(A.id, tell(B.accuse(ME.record())), 5.0)
    effects = core.tick(core.next_deadline())
    assert of(effects, Refute) == [Refute(ME.record(2))]
    assert core.own == ME.record(2)
    assert core.health.score == 1
    assert claims(effects, A)[0] == ME.record(2)
    assert {one.to for one in sends(effects)} == {A.id, B.id, C.id}


def test_those_who_hear_a_refutation_first_hand_are_bounded() -> None:
    core = machine(*PEOPLE[1:3])
    tellers = people(100)[3:]
    for person in tellers:
        core.receive(person.id, tell(A.accuse(ME.record())), 5.0)
    answered = {one.to for one in sends(core.tick(5.0))}
    assert answered == {person.id for person in tellers[:64]} | {A.id, B.id}


def test_one_refutes_at_most_once_a_second_and_that_is_enough() -> None:
    core = machine(A, B)
    refuted = []
    for step in range(40):
        now = 5 + step / 10
        core.receive(A.id, tell(B.accuse(core.own)), now)
        if core.next_deadline() <= now:
            refuted += of(core.tick(now), Refute)
    assert len(refuted) == 4
    assert core.own.body.incarnation == 5


def test_whoever_accuses_an_older_version_is_told_the_newer_one() -> None:
    core = machine(A, B)
    core.own_record(ME.record(2), 3.0)
    effects = core.receive(A.id, tell(B.accuse(ME.record())), 5.0)
    assert claims(effects, A)[0] == ME.record(2)
    assert core.own == ME.record(2)
    assert claims(core.receive(A.id, tell(B.accuse(ME.record())), 5.1), A) == []


def test_who_is_held_for_dead_and_speaks_is_told_and_returns() -> None:
    core = machine(A, B)
    core.receive(B.id, tell(B.accuse(A.record())), 5.0)
    World(core, 5.0).wait(1.0)
    core.receive(A.id, tell(A.record(2)), 6.0)
    core.receive(B.id, tell(B.accuse(A.record(2))), 7.0)
    now = end(core, A)
    effects = core.receive(A.id, GossipMessage(Ping(seq=1)), now)
    (claim,) = claims(effects, A)
    assert (claim.body.evidence, claim.body.record) == ("hearsay", A.record(2).digest)
    assert claims(core.receive(A.id, GossipMessage(Ping(seq=2)), now), A) == []  # not every time
    other = machine(ME, own=A)
    other.own_record(A.record(2), now)
    other.receive(ME.id, tell(claim), now)
    answers = [one for one in sends(other.tick(now + 1)) if one.to == ME.id]
    core.receive(A.id, answers[0].message, now + 1)
    assert state(core, A) is State.ALIVE


# ------------------------------------------------------------------ one's own key
def test_what_one_signed_may_come_round() -> None:
    core = machine(A)
    core.own_record(ME.record(2), 3.0)
    assert core.receive(A.id, tell(ME.record(2), ME.record(1)), 5.0) == []


def test_ones_own_key_used_elsewhere_is_reported() -> None:
    core = machine(A)
    for other in (ME.record(1, meta=b"other"), ME.record(1, epoch=2)):
        assert core.receive(A.id, tell(other), 5.0) == [Equivocation(ME.id, ME.record(), other)]


def test_a_leave_that_one_did_not_mean_is_refuted() -> None:
    core = machine(A)
    core.receive(A.id, tell(ME.leave()), 5.0)
    assert of(core.tick(5.0), Refute) == [Refute(ME.record(2))]
    assert core.receive(A.id, tell(ME.leave()), 6.0) == []


# ------------------------------------------------------------------ leaving
def test_a_leave_goes_to_everybody_and_is_the_last_word() -> None:
    core = machine(A, B, C)
    effects = core.leave(5.0)
    assert {one.to for one in sends(effects)} == {A.id, B.id, C.id}
    assert {type(claim.body) for claim in claims(effects)} == {Leave}
    assert core.next_deadline() == math.inf
    assert core.tick(6.0) == core.receive(A.id, GossipMessage(Ping(seq=1)), 6.0) == []
    assert core.unreachable(A.id, 6.0, refused=True) == []


def test_one_that_left_is_left_and_its_broken_connection_is_no_evidence() -> None:
    core = machine(A, B, C)
    effects = core.receive(A.id, tell(A.leave()), 5.0)
    assert of(effects, Changed) == [Changed(A.id, State.ALIVE, State.LEFT, A.record())]
    assert {one.to for one in sends(effects)} == {B.id, C.id}
    assert core.unreachable(A.id, 5.1, refused=True) == []
    assert core.unreachable(A.id, 5.2, refused=True) == []
    assert state(core, A) is State.LEFT


def test_an_orderly_close_is_no_evidence_but_a_neighbour_is_dialled_again() -> None:
    core = machine(A, B)
    assert core.closed(A.id) == [Dial(A.id, A.record())]
    assert core.closed(C.id) == []
    assert claims(core.own_record(ME.record(2), 5.0), A) == []
    assert state(core, A) is State.ALIVE
    core.leave(6.0)
    assert core.closed(A.id) == []


# ------------------------------------------------------------------ joining and comparing
def test_a_joiner_asks_three_contacts_at_once_and_goes_on_until_one_answers() -> None:
    core = machine()
    dials = of(core.join([p.record() for p in (ME, A, B, C, D)], 0.0), Dial)
    assert len({one.peer for one in dials}) == 3
    assert ME.id not in {one.peer for one in dials}
    for at in (1.0, 2.0, 4.0, 8.0, 12.0):
        assert of(core.tick(at - 0.1), Dial) == []
        assert len(of(core.tick(at), Dial)) == 3


def test_a_joiner_compares_views_at_once_and_after_one_two_and_four_seconds() -> None:
    core = machine()
    assert core.join([], 0.0) == []
    (dial,) = of(core.join([A.record()], 0.0), Dial)
    core.learn(A.record(), 0.1)
    (summary,) = sends(core.connected(dial.peer, 0.1), Summary)
    assert summary.message.claims == (ME.record(),)
    for at in (1.0, 2.0, 4.0):
        assert len(sends(core.tick(at), Summary)) == 1
    assert core.tick(8.0) == []


def test_a_joiner_learns_everything_by_one_comparison() -> None:
    others = PEOPLE[1:40]
    member = machine(*others[1:], own=A)
    joiner = machine()
    (summary,) = sends(joiner.join([A.record()], 0.0), Summary) or sends(
        joiner.connected(A.id, 0.0), Summary
    )
    waiting = [(ME, A, summary.message)]
    cores = {ME.id: joiner, A.id: member}
    for source, target, message in waiting:
        answers = sends(cores[target.id].receive(source.id, message, 1.0))
        waiting += [(target, source, one.message) for one in answers if one.to == source.id]
    assert set(joiner.members()) == {person.id for person in others}
    assert state(member, ME) is State.ALIVE
    assert len(waiting) <= 6


def test_contacts_are_bounded_and_a_dial_that_failed_is_not_waited_for() -> None:
    params = MembershipParams(probes=STILL.probes, views=ViewParams(contacts=2))
    core = machine(params=params)
    dials = of(core.join([p.record() for p in (A, B, C)], 0.0), Dial)
    assert {one.peer for one in dials} == {B.id, C.id}
    core.unreachable(B.id, 0.1, refused=False)
    assert core.connected(B.id, 0.2) == []
    assert core.connected(C.id, 99.0) == []  # too late


def test_a_new_neighbour_is_compared_with_but_not_each_of_many() -> None:
    core = machine(A, B, up=False)
    assert len(sends(core.connected(A.id, 3.0), Summary)) == 1
    assert sends(core.connected(B.id, 3.1), Summary) == []
    core.closed(B.id)
    assert len(sends(core.connected(B.id, 6.0), Summary)) == 1


def test_views_that_agree_are_compared_by_one_message() -> None:
    one, other = machine(B, C), machine(ME, B, C, own=A)
    one.learn(A.record(), 3.0)
    (summary,) = sends(one.connected(A.id, 3.0), Summary)
    assert sends(other.receive(ME.id, summary.message, 3.1)) == []


def test_what_one_side_holds_for_dead_is_heard_by_the_other() -> None:
    one, other = machine(A, B), machine(ME, B, own=A)
    one.receive(A.id, tell(A.accuse(B.record())), 3.0)
    end(one, B)
    one.receive(A.id, tell(A.record(2)), 200.0)  # whoever is silent here is A, not B
    cores = {ME.id: one, A.id: other}
    digest = Digest(covers=2**32 - 1, rows=b"", answer=True)
    waiting = [(ME, A, GossipMessage(digest))]
    for source, target, message in waiting:
        answers = sends(cores[target.id].receive(source.id, message, 201.0))
        waiting += [(target, source, each.message) for each in answers if each.to == source.id]
    assert state(other, B) is State.SUSPECT
    assert state(one, B) is State.DEAD


def test_comparisons_by_one_peer_are_bounded() -> None:
    core = machine(A, B)
    digest = GossipMessage(Digest(covers=2**32 - 1, answer=True))
    answered = sum(bool(core.receive(A.id, digest, 5.0)) for _ in range(40))
    assert answered == 16
    assert core.receive(A.id, GossipMessage(Summary(buckets=bytes(256))), 5.0) == []


def test_a_comparison_rides_on_the_probe_of_a_random_member_now_and_then() -> None:
    params = MembershipParams(probes=ProbeParams(interval=1e9, random_every=10.0))
    core = machine(*PEOPLE[1:11], params=params)
    world = World(core, 2.0)
    compared = len(sends(world.wait(300.0), Summary))
    assert 8 <= compared <= 11


def test_a_dead_member_that_is_back_is_compared_with() -> None:
    params = MembershipParams(probes=ProbeParams(interval=1e9, random_every=10.0))
    core = machine(A, B, params=params, up=False)
    core.receive(B.id, tell(B.accuse(A.record())), 3.0)
    effects = World(core, end(core, A)).wait(300.0)
    assert A.id in {one.to for one in sends(effects, Summary)}
    assert "hearsay" in {c.body.evidence for c in claims(effects, A) if isinstance(c.body, Suspect)}


# ------------------------------------------------------------------ time
def test_whoever_wakes_up_late_trusts_its_timers_less() -> None:
    core = machine(A, B, C)
    core.receive(B.id, tell(B.accuse(A.record())), 5.0)
    due = core.next_deadline()
    core.tick(due + 60.0)
    assert core.health.score == 1
    assert state(core, A) is State.SUSPECT
    core.slow(1.0)
    assert core.health.score == 2


def test_a_stall_that_was_reported_is_not_counted_again() -> None:
    core = machine(A, B, C, params=MembershipParams(), up=False)
    now = core.next_deadline() + 30.0
    core.slow(30.0)
    core.tick(now)
    assert core.health.score == 1


def test_whoever_wakes_up_in_time_loses_nothing() -> None:
    core = machine(A, B, C)
    core.receive(B.id, tell(B.accuse(A.record())), 5.0)
    core.tick(core.next_deadline() + 0.2)
    assert core.health.score == 0


def test_tombstones_are_dropped_in_time() -> None:
    core = machine(A, B)
    core.receive(A.id, tell(A.leave()), 5.0)
    World(core, 5.0).wait(3500.0)
    assert state(core, A) is State.LEFT
    World(core, 3505.0).wait(200.0)
    assert state(core, A) is None


def test_the_same_dice_give_the_same_effects() -> None:
    def play() -> list:
        core = machine(*PEOPLE[1:30], params=MembershipParams())
        world = World(core, 2.0)
        world.hear(A, A.leave(), B.record(2))
        return world.wait(60.0)

    assert play() == play()
