"""Values with units."""

from __future__ import annotations

import click
import pytest

from p2pmoe.cli.units import DURATION, RATE, SIZE, Quantity, seconds_text


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (DURATION, "250ms", 0.25),
        (DURATION, "30s", 30.0),
        (DURATION, "30", 30.0),
        (DURATION, "1.5 h", 5400.0),
        (DURATION, "5m", 300.0),
        (DURATION, "2h", 7200.0),
        (DURATION, "1d", 86400.0),
        (SIZE, "64MB", 64_000_000),
        (SIZE, "2GiB", 2 << 30),
        (SIZE, "0.5KiB", 512),
        (RATE, "20Mbit/s", 20_000_000),
    ],
)
def test_a_quantity_is_read_in_its_base_unit(kind: Quantity, text: str, value: float) -> None:
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (DURATION, "5 parsecs"),
        (DURATION, "5M"),
        (DURATION, "-5s"),
        (DURATION, "s"),
        (DURATION, "1e3s"),
        (DURATION, ""),
        (SIZE, "2"),
        (SIZE, "2 gib"),
        (RATE, "20Mb"),
    ],
)
def test_a_quantity_without_sense_is_refused_with_an_example(kind: Quantity, text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(text, None, None)
    assert kind.example in refused.value.message
    assert repr(text) in refused.value.message


def test_a_number_that_is_no_text_passes_as_it_is() -> None:
    assert DURATION.convert(2.5, None, None) == 2.5
    assert SIZE.convert(2.5, None, None) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.25, "250ms"),
        (1, "1s"),
        (59.4, "59s"),
        (60, "1m"),
        (200, "3m20s"),
        (18720, "5h12m"),
        (90000, "1d1h"),
        (86400 * 3, "3d"),
    ],
)
def test_a_duration_is_written_with_its_two_largest_units(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
