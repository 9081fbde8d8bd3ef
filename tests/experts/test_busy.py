"""How busy a device was: nothing, all the time, half of it."""

import pytest

from p2pmoe.experts.busy import MEMORY, BusyShare


def test_a_device_that_never_worked_is_idle() -> None:
    assert BusyShare(5.0).share(100.0) == 0.0


def test_a_device_that_always_works_is_busy_and_forgets_it_when_it_rests() -> None:
    busy = BusyShare(0.0)
    for at in range(100):
        busy.worked(float(at), at + 1.0)
    assert busy.share(100.0) == pytest.approx(1.0, abs=0.001)
    assert busy.share(100.0 + MEMORY) == pytest.approx(0.368, abs=0.001)


def test_a_device_that_works_half_of_its_time_is_half_busy() -> None:
    busy = BusyShare(0.0)
    for at in range(100):
        busy.worked(float(at), at + 0.5)
    assert busy.share(100.0) == pytest.approx(0.5, abs=0.03)


def test_a_batch_that_took_no_time_changes_nothing() -> None:
    busy = BusyShare(0.0)
    busy.worked(1.0, 1.0)
    assert busy.share(1.0) == 0.0
