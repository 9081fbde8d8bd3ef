"""Quotas: what is over a limit is refused with a hint, and nothing is lost in the counting."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage, PeerBusy
from p2pmoe.net.quota import MIB, Progress, Quota, QuotaParams, Rate, TokenBucket
from tests.net.pools import KEYS

PEERS = [keys.peer_id for keys in KEYS]


def account(params: QuotaParams | None = None):
    return Quota(params or QuotaParams()).connect(PEERS[0], bulk=False, now=0.0)


# ------------------------------------------------------------------ buckets
def test_a_bucket_gives_its_burst_and_then_its_rate():
    bucket = TokenBucket(Rate(10, 3), now=0.0)
    assert [bucket.take(0.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(0.0) == pytest.approx(0.1)
    assert bucket.take(0.1) == 0
    assert bucket.take(0.1) == pytest.approx(0.1)


def test_a_bucket_never_holds_more_than_its_burst():
    bucket = TokenBucket(Rate(10, 3), now=0.0)
    assert [bucket.take(1000.0) for _ in range(4)][:3] == [0, 0, 0]
    assert bucket.take(1000.0) > 0


# ------------------------------------------------------------------ progress
def test_what_has_not_begun_may_take_for_ever():
    assert Progress(QuotaParams()).deadline == math.inf


def test_what_stops_moving_is_too_slow_after_its_grace_and_one_more_chance():
    progress = Progress(QuotaParams())
    progress.moved(100, now=1.0)
    assert not progress.too_slow(10.9)
    assert progress.deadline == 11.0
    assert not progress.too_slow(11.0)
    assert progress.too_slow(12.0)


def test_one_byte_a_second_is_too_slow_within_fifteen_seconds():
    progress = Progress(QuotaParams())
    second = 0.0
    while not progress.too_slow(min(progress.deadline, second)):
        progress.moved(1, second)
        second += 1.0
    assert second <= 12


def test_the_least_rate_is_fast_enough_for_ever():
    progress = Progress(QuotaParams())
    for second in range(1000):
        assert not progress.too_slow(float(second))
        progress.moved(16 * 1024, float(second))


def test_fast_bytes_earn_no_more_than_the_grace():
    progress = Progress(QuotaParams())
    progress.moved(1, now=0.0)
    progress.moved(1000 * MIB, now=1.0)
    assert progress.deadline == 11.0


def test_what_moves_again_after_a_miss_goes_on():
    progress = Progress(QuotaParams())
    progress.moved(1, now=0.0)
    assert not progress.too_slow(10.0)
    progress.moved(MIB, now=10.5)
    assert not progress.too_slow(20.4)


def test_what_is_whole_rests():
    progress = Progress(QuotaParams())
    progress.moved(1, now=0.0)
    progress.rest()
    assert not progress.too_slow(1e9)


# ------------------------------------------------------------------ connections
def test_a_peer_has_two_connections_of_each_class():
    quota = Quota(QuotaParams())
    for bulk in (False, True):
        for _ in range(2):
            quota.connect(PEERS[0], bulk=bulk, now=0.0)
        with pytest.raises(PeerBusy):
            quota.connect(PEERS[0], bulk=bulk, now=0.0)
    quota.connect(PEERS[1], bulk=True, now=0.0)


def test_a_connection_that_ended_makes_room():
    quota = Quota(QuotaParams(connections=1))
    account = quota.connect(PEERS[0], bulk=True, now=0.0)
    with pytest.raises(PeerBusy):
        quota.connect(PEERS[1], bulk=True, now=0.0)
    quota.disconnect(account, bulk=True)
    quota.connect(PEERS[1], bulk=True, now=0.0)


def test_coming_back_does_not_fill_the_bucket():
    quota = Quota(QuotaParams(rates=(("dht.", Rate(1, 1)),)))
    account = quota.connect(PEERS[0], bulk=False, now=0.0)
    assert account.begin_call("dht.get", 0, now=0.0) == 0
    account.end_call()
    quota.disconnect(account, bulk=False)
    again = quota.connect(PEERS[0], bulk=False, now=0.0)
    assert again.begin_call("dht.get", 0, now=0.0) > 0


def test_accounts_are_bounded_and_the_oldest_idle_one_goes_first():
    quota = Quota(QuotaParams(peers_remembered=2))
    held = quota.connect(PEERS[0], bulk=False, now=0.0)
    for peer in PEERS[1:]:
        quota.disconnect(quota.connect(peer, bulk=False, now=0.0), bulk=False)
        assert len(quota) <= 2
    assert quota.connect(PEERS[0], bulk=False, now=0.0) is held


def test_accounts_in_use_are_never_dropped():
    quota = Quota(QuotaParams(peers_remembered=1))
    accounts = [quota.connect(peer, bulk=False, now=0.0) for peer in PEERS]
    assert len(quota) == len(PEERS)
    assert quota.connect(PEERS[0], bulk=True, now=0.0) is accounts[0]


# ------------------------------------------------------------------ calls
def test_calls_in_flight_are_bounded_a_peer_over_all_its_connections():
    params = QuotaParams(calls_a_peer=2)
    quota = Quota(params)
    one = quota.connect(PEERS[0], bulk=False, now=0.0)
    assert quota.connect(PEERS[0], bulk=True, now=0.0) is one
    assert [one.begin_call("x", 0, 0.0) for _ in range(2)] == [0, 0]
    assert one.begin_call("x", 0, 0.0) == params.come_again
    one.end_call()
    assert one.begin_call("x", 0, 0.0) == 0


def test_payload_is_bounded_a_peer_and_in_all():
    quota = Quota(QuotaParams(payload_a_peer=10, payload_in_all=15))
    one = quota.connect(PEERS[0], bulk=False, now=0.0)
    two = quota.connect(PEERS[1], bulk=False, now=0.0)
    assert one.begin_call("x", 11, 0.0) > 0
    assert one.begin_call("x", 10, 0.0) == 0
    assert two.begin_call("x", 6, 0.0) > 0
    assert two.reserve(5)
    one.release(10)
    assert two.reserve(5)
    assert quota.payload_bytes == 10


def test_kinds_of_requests_have_rates_of_their_own_and_experts_have_none():
    one = account(QuotaParams(rates=(("dht.", Rate(1, 2)), ("gossip.", Rate(1, 1)))))
    assert [one.begin_call("dht.find", 0, 0.0) for _ in range(3)] == [0, 0, 1]
    assert one.begin_call("gossip.push", 0, 0.0) == 0
    assert all(one.begin_call("expert.forward", 0, 0.0) == 0 for _ in range(200))


def test_a_peer_that_goes_on_regardless_loses_its_connection():
    one = account(QuotaParams(calls_a_peer=0, refusals=Rate(1, 3)))
    assert [one.begin_call("x", 0, 0.0) > 0 for _ in range(3)] == [True] * 3
    with pytest.raises(MalformedMessage, match=r"quota\.refused_too_often"):
        one.begin_call("x", 0, 0.0)


def test_opening_and_cancelling_all_the_time_is_abuse():
    one = account(QuotaParams(cancels=Rate(10, 20)))
    for _ in range(20):
        one.count_cancel(now=0.0)
    with pytest.raises(MalformedMessage, match=r"quota\.cancels_too_often"):
        one.count_cancel(now=0.05)
    one.count_cancel(now=0.2)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_what_is_given_back_is_what_was_taken(steps):
    quota = Quota(QuotaParams(payload_a_peer=60, payload_in_all=100))
    accounts = [quota.connect(peer, bulk=False, now=0.0) for peer in PEERS[:3]]
    held = []
    for who, size in steps:
        if who == 3 and held:
            one, was = held.pop()
            one.release(was)
        elif who < 3 and accounts[who].reserve(size):
            held.append((accounts[who], size))
        assert quota.payload_bytes == sum(size for _, size in held) <= 100
        assert all(one.payload <= 60 for one in accounts)
