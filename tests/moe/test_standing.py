"""Who is asked last, for how long, and who is tried again; time is a number, chance is seeded."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.moe.standing import Key, Standing, StandingParams
from p2pmoe.net.backoff import BackoffParams

PARAMS = StandingParams(jitter=0.0, out=BackoffParams(first=2.0, most=16.0, jitter=0.0))
A, B, C = ("p", "ffn.0"), ("p", "ffn.1"), ("q", "ffn.2")
ALL: list[Key] = [A, B, C]


def standing(params: StandingParams = PARAMS) -> Standing:
    return Standing(params, random.Random(1))


def miss(of: Standing, key: Key, times: int = 3, now: float = 0.0) -> Standing:
    for _ in range(times):
        of.asked([key], now)
        of.missed(key, now)
    return of


def test_an_expert_that_misses_three_times_in_a_row_is_asked_last() -> None:
    known = miss(standing(), A, 2)
    assert known.asked_last(ALL, 0.0) == frozenset()
    assert miss(known, A, 1).asked_last(ALL, 0.0) == {A}
    assert known.counts["doubted"] == 1
    assert known.asked_last([B, C], 0.0) == frozenset()


def test_an_expert_that_misses_one_answer_in_ten_is_never_doubted() -> None:
    known, rng = standing(), random.Random(3)
    for now in range(500):
        if rng.random() < 0.1:
            known.missed(A, float(now))
        else:
            known.answered(A, 0.1, float(now))
    assert known.counts["doubted"] <= 1


def test_after_its_time_out_it_is_tried_by_one_batch_alone() -> None:
    known = miss(standing(), A)
    assert known.next_change(0.0) == 2.0
    assert known.asked_last(ALL, 1.9) == {A}
    assert known.asked_last(ALL, 2.0) == frozenset()
    known.asked([A, B], 2.0)
    assert known.asked_last(ALL, 2.0) == {A}
    known.answered(A, 0.1, 2.1)
    assert known.asked_last(ALL, 2.1) == frozenset()
    assert known.counts["cleared"] == 1
    assert known.next_change(2.1) == math.inf


def test_each_trial_that_fails_doubles_the_time_out_and_a_while_of_answers_ends_that() -> None:
    known, now, waits = miss(standing(), A), 0.0, []
    for _ in range(5):
        waits.append(known.next_change(now) - now)
        now += waits[-1]
        miss(known, A, 1, now)
    assert waits == [2.0, 4.0, 8.0, 16.0, 16.0]
    now = known.next_change(now)
    known.asked([A], now)
    for _ in range(10):
        known.answered(A, 0.1, now)
    miss(known, A, 3, now)
    assert known.next_change(now) == now + 2.0


def test_a_trial_of_which_nothing_is_heard_is_forgotten() -> None:
    known = miss(standing(), A)
    known.asked([A], 2.0)
    assert known.next_change(2.0) == 2.0 + PARAMS.trial
    assert known.asked_last(ALL, 2.0 + PARAMS.trial) == frozenset()


def test_one_that_answers_though_it_is_asked_last_proves_itself() -> None:
    known = miss(standing(), A)
    for _ in range(3):
        assert known.asked_last(ALL, 1.0) == {A}
        known.answered(A, 0.1, 1.0)
    assert known.asked_last(ALL, 1.0) == frozenset()


def test_one_that_misses_while_it_is_asked_last_does_not_stay_out_for_longer() -> None:
    known = miss(standing(), A)
    known.missed(A, 1.0)
    assert known.next_change(1.0) == 2.0


def test_where_most_are_doubted_nobody_is() -> None:
    known = miss(miss(standing(), A), B)
    assert known.asked_last(ALL, 0.0) == frozenset()
    assert known.asked_last([*ALL, ("q", "ffn.3")], 0.0) == {A, B}


def test_misses_are_forgiven_by_time() -> None:
    known = miss(standing(), A, 2)
    known.missed(A, 10 * PARAMS.forgive)
    assert known.asked_last(ALL, 10 * PARAMS.forgive) == frozenset()


def test_a_server_that_says_when_to_come_again_is_left_alone_at_least_so_long() -> None:
    known = standing(StandingParams())
    known.rest(A, 5.0, now=10.0)
    assert known.asked_last(ALL, 15.0) == {A}
    assert 15.0 <= known.next_change(10.0) <= 10.0 + 5.0 * 1.5
    assert known.asked_last(ALL, 10.0 + 5.0 * 1.5) == frozenset()
    known.rest(("p", ""), 2.0, now=20.0)
    assert known.asked_last(ALL, 21.0) == {A, B}
    known.rest(A, 1e9, now=20.0)
    assert known.next_change(30.0) <= 20.0 + 1.5 * 60
    assert known.counts["rested"] == 3


def test_an_answer_does_not_end_a_rest() -> None:
    known = standing()
    known.rest(A, 5.0, now=0.0)
    known.answered(A, 0.1, now=1.0)
    assert known.asked_last(ALL, 4.0) == {A}
    known.answered(A, 0.1, now=6.0)
    assert known.next_change(6.0) == math.inf


def test_a_liar_is_out_for_long_and_longer_each_time() -> None:
    known = standing()
    assert known.lied(A, now=0.0) == PARAMS.lie
    known.answered(A, 0.1, now=1.0)
    assert known.asked_last(ALL, PARAMS.lie - 1) == {A}
    assert known.lied(A, now=PARAMS.lie) == 2 * PARAMS.lie
    assert known.counts["lied"] == 2


def test_the_usual_time_is_the_experts_own_or_what_experts_take() -> None:
    known = standing()
    assert known.usual(A) == math.inf
    for now in range(100):
        known.answered(A, 1.0, float(now))
        known.answered(B, 0.2, float(now))
    assert known.usual(A) == pytest.approx(1.0)
    assert known.usual(B) == pytest.approx(0.2)
    assert 0.2 < known.usual(C) < 1.0
    miss(known, A, 3, 100.0)
    assert known.usual(A) == known.usual(C)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["asked", "answered", "missed", "rest", "lied"]),
            st.integers(0, 9),
            st.floats(0, 100),
        ),
        max_size=80,
    )
)
def test_whatever_happens_every_expert_is_tried_again_and_the_table_stays_bounded(
    events: list[tuple[str, int, float]],
) -> None:
    known, now = standing(StandingParams(most=5, lie=60.0)), 0.0
    keys: list[Key] = [(n % 3, f"ffn.{n}" if n else "") for n in range(10)]
    for what, n, passed in events:
        now += passed
        if what == "asked":
            known.asked(keys[n : n + 2], now)
        elif what in {"answered", "rest"}:
            getattr(known, what)(keys[n], passed, now)
        else:
            getattr(known, what)(keys[n], now)
        assert len(known) <= 5
        assert known._troubled.keys() <= known._records.keys()
        assert known.next_change(now) > now
    for _ in range(40):
        if (change := known.next_change(now)) == math.inf:
            break
        now = change
    assert known.asked_last(keys, now) == frozenset()
