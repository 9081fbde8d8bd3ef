"""Back-off after failed dials."""

from __future__ import annotations

import random

from p2pmoe.net.backoff import Backoff, BackoffParams


def test_a_peer_may_be_dialled_at_first():
    assert Backoff(BackoffParams()).wait(now=5.0) == 0


def test_waits_double_from_half_a_second_to_thirty():
    backoff, rng = Backoff(BackoffParams(jitter=0.0)), random.Random(1)
    waits = []
    for _ in range(8):
        backoff.failed(100.0, rng)
        waits.append(backoff.wait(100.0))
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_wait_ends_when_its_time_is_up():
    backoff = Backoff(BackoffParams(jitter=0.0))
    backoff.failed(10.0, random.Random(1))
    assert backoff.wait(10.4) > 0
    assert backoff.wait(10.5) == 0


def test_jitter_makes_waits_longer_but_never_beyond_the_limit():
    rng = random.Random(1)
    waits = set()
    for _ in range(50):
        backoff = Backoff(BackoffParams())
        backoff.failed(0.0, rng)
        waits.add(backoff.wait(0.0))
    assert len(waits) == 50
    assert 0.5 <= min(waits) < max(waits) <= 0.75
    for _ in range(20):
        backoff.failed(0.0, rng)
    assert backoff.wait(0.0) == 30


def test_a_peer_that_was_reached_starts_anew():
    backoff, rng = Backoff(BackoffParams(jitter=0.0)), random.Random(1)
    for _ in range(5):
        backoff.failed(0.0, rng)
    backoff.clear()
    assert backoff.wait(0.0) == 0
    backoff.failed(0.0, rng)
    assert backoff.wait(0.0) == 0.5
