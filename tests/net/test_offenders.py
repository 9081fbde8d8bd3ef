"""Where protocols are broken, strangers wait: from when, for how long, and who is remembered."""

from __future__ import annotations

from dataclasses import replace

from p2pmoe.net.offenders import Offenders
from p2pmoe.net.quota import QuotaParams
from tests.net.edges import NEARLY, edge

LIMITS = QuotaParams()
HOST = "127.0.0.1"
BURST = int(LIMITS.offences.burst)


def offenders(offences: int, limits: QuotaParams = LIMITS) -> Offenders:
    """All of them by one host, at time 0."""
    made = Offenders(limits)
    for _ in range(offences):
        made.blame(HOST, 0.0)
    return made


def waits(of: Offenders, host: str = HOST, now: float = 0.0) -> bool:
    """Whether the second stranger in a row has to wait."""
    of.wait(host, now)
    return of.wait(host, now) > 0


@edge("offences")
def test_a_few_offences_are_forgiven_and_more_with_time() -> None:
    assert not waits(offenders(BURST))
    assert waits(offenders(BURST + 1))
    later = 1 / LIMITS.offences.per_second
    patient, hasty = offenders(BURST), offenders(BURST)
    patient.blame(HOST, later)
    hasty.blame(HOST, later - NEARLY)
    assert not waits(patient, now=later)
    assert waits(hasty, now=later - NEARLY)


@edge("disgrace")
def test_an_address_is_as_others_after_a_while() -> None:
    assert waits(offenders(BURST + 1), now=LIMITS.disgrace - NEARLY)
    assert not waits(offenders(BURST + 1), now=LIMITS.disgrace)


def test_others_do_not_wait_for_what_an_address_did() -> None:
    made = offenders(BURST + 1)
    assert not waits(made, "127.0.0.2")
    assert not waits(made, "a name of the network in memory")


def test_a_global_site_is_one_address_and_a_local_one_is_not() -> None:
    made = Offenders(LIMITS)
    for _ in range(BURST + 1):
        made.blame("2a00::1", 0.0)
        made.blame("fd00::1", 0.0)
    assert waits(made, "2a00::2")
    assert waits(made, "fd00::1")
    assert not waits(made, "fd00::2")


def test_who_has_been_good_the_longest_is_forgotten_first() -> None:
    made = Offenders(replace(LIMITS, peers_remembered=2))
    for host in ("10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.3"):
        for _ in range(BURST + 1):
            made.blame(host, 0.0)
    assert len(made) == 2
    assert not waits(made, "10.0.0.2")
    assert waits(made, "10.0.0.1")
