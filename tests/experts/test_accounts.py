"""One client may teach so often and no more, whatever the others do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import PeerBusy
from p2pmoe.experts.accounts import TEACHING, AccountParams, Accounts
from p2pmoe.net.quota import Rate

PARAMS = AccountParams(updates=10.0, burst=2.0)


def refused(accounts: Accounts, client: str, now: float, count: int = 1) -> float:
    """For how long, or 0."""
    try:
        accounts.admit_updates(client, count, now)
    except PeerBusy as error:
        assert error.retry_after
        return error.retry_after
    return 0.0


def test_a_burst_is_taken_and_then_the_rate() -> None:
    accounts = Accounts(PARAMS)
    assert not any(refused(accounts, "a", 0.0) for _ in range(20))
    assert refused(accounts, "a", 0.0) == pytest.approx(0.1)
    assert not refused(accounts, "b", 0.0)
    assert refused(accounts, "a", 0.05) == pytest.approx(0.05)
    assert not refused(accounts, "a", 0.11)


def test_a_large_call_is_taken_whole_and_paid_for_later() -> None:
    accounts = Accounts(PARAMS)
    assert not refused(accounts, "a", 0.0, count=64)
    assert refused(accounts, "a", 0.0) == pytest.approx(4.5)
    assert not refused(accounts, "a", 4.51)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), max_size=200))
def test_no_pattern_of_calls_brings_more_than_burst_and_rate(
    calls: list[tuple[float, int]],
) -> None:
    accounts, now, applied = Accounts(PARAMS), 0.0, 0
    for gap, count in calls:
        now += gap
        if not refused(accounts, "a", now, count):
            applied += count
    assert applied <= PARAMS.updates * (PARAMS.burst + now) + 5


def test_who_waits_as_long_as_it_is_told_is_let_in() -> None:
    accounts, now = Accounts(PARAMS), 0.0
    for _ in range(100):
        while wait := refused(accounts, "a", now, count=3):
            now += wait * (1 + 1e-9)
    assert now == pytest.approx((300 - 20) / 10, rel=0.05)


def test_a_client_whose_calls_are_no_good_is_not_heard_for_a_while() -> None:
    accounts = Accounts(AccountParams(faults=Rate(1.0, 2), disgrace=5.0))
    for _ in range(2):
        accounts.faulty("a", 0.0)
        accounts.admit("a", 0.0)
    accounts.faulty("a", 0.5)
    with pytest.raises(PeerBusy) as refusal:
        accounts.admit("a", 2.5)
    assert refusal.value.retry_after == pytest.approx(3.0)
    accounts.admit("b", 2.5)
    accounts.admit("a", 5.5)


def test_who_trains_here_is_counted_but_for_the_one_who_asks() -> None:
    accounts = Accounts(PARAMS)
    for client in "abc":
        accounts.answered(client, "ok", 4, now=0.0)
    accounts.admit_updates("a", 1, now=0.0)
    accounts.admit_updates("b", 1, now=TEACHING / 2)
    assert accounts.teachers("a", TEACHING / 2) == 1
    assert accounts.teachers("c", TEACHING / 2) == 2
    assert accounts.teachers("c", TEACHING) == 1


def test_what_became_of_a_clients_parts_is_told_and_the_table_is_bounded() -> None:
    accounts = Accounts(AccountParams(most=3))
    for client, rows in zip("abcd", (1, 4, 3, 2), strict=True):
        accounts.answered(client, "ok", rows, now=0.0)
    accounts.answered("c", "nonfinite", 0, now=0.0)
    assert len(accounts) == 3
    assert [client for client, _ in accounts.busiest(2)] == ["b", "c"]
    assert accounts.busiest(2)[1][1].parts == {"ok": 1, "nonfinite": 1}
