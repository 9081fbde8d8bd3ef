"""Nobody takes over a live uid, whatever strangers try while holders come and go."""

from __future__ import annotations

import pytest

from p2pmoe.testing.simulated_dht_leases import Takeover, TakeoverFigures, TakeoverRun


def taken(**changes: float | None) -> TakeoverFigures:
    figures = Takeover(TakeoverRun(**changes)).measure()  # type: ignore[arg-type]  # by name
    assert figures.strangers_read == 0
    assert figures.both_valid == 0
    assert figures.tries > 0
    return figures


def test_a_stranger_that_tries_every_five_seconds_gets_nothing() -> None:
    figures = taken(duration=600.0, half_life=300.0)
    assert figures.owner_held == 1.0
    assert figures.stranger_held == 0.0
    assert figures.owner_read == figures.reads > 20


def test_an_owner_that_stood_still_past_its_lease_serves_nobody_when_it_wakes() -> None:
    figures = taken(duration=300.0, pause_at=100.0)
    assert 0 < figures.stranger_held < 1
    assert 0 < figures.owner_held < 0.6


def test_an_owner_that_gave_its_uid_back_gets_it_back_by_no_old_record() -> None:
    figures = taken(duration=300.0, give_back_at=100.0)
    assert figures.stranger_held > 0.5
    assert figures.owner_held < 0.4


def test_after_a_hand_over_the_heir_alone_is_read_and_the_old_owner_gets_nothing_back() -> None:
    """The stranger claims with what was signed for the heir; the old owner puts its old leases."""
    figures = taken(duration=400.0, half_life=300.0, hand_over_at=100.0)
    assert figures.stranger_held == 0.0
    assert figures.owner_held >= 0.99  # the heir's claim takes a moment
    assert figures.owner_read == figures.reads >= 18


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(60))
def test_no_stranger_gets_a_live_uid_in_two_hours(seed: int) -> None:
    """In every third run the owner hands it over after an hour."""
    figures = taken(seed=seed, hand_over_at=None if seed % 3 else 3600.0)
    print(figures)  # noqa: T201  the figures
    assert figures.owner_held >= 0.999
    assert figures.nobody_read <= 0.01 * figures.reads
