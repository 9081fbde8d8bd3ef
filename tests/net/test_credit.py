"""Credit windows: both ends agree on what may be on its way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.credit import FIRST_WINDOW_BYTES, Credit, Window
from p2pmoe.net.messages import MAX_WINDOW_BYTES


def test_half_a_window_is_used_before_credit_is_announced():
    window = Window()
    window.take(FIRST_WINDOW_BYTES)
    assert window.free(FIRST_WINDOW_BYTES // 2 - 1) == 0
    assert window.free(1) > 0


def test_the_window_doubles_up_to_its_limit():
    window, credit = Window(), Credit()
    open_at_once = []
    for _ in range(8):
        size = credit.left
        credit.spend(size)
        window.take(size)
        credit.grant(window.free(size))
        open_at_once.append(credit.left)
    mebibytes = [size // 2**20 for size in open_at_once]
    assert mebibytes == [2, 4, 8, 8, 8, 8, 8, 8]


def test_bytes_without_credit_break_the_rules():
    window = Window()
    window.take(FIRST_WINDOW_BYTES)
    with pytest.raises(MalformedMessage, match=r"exchange\.no_credit"):
        window.take(1)


def test_credit_beyond_the_largest_window_breaks_the_rules():
    credit = Credit()
    credit.grant(MAX_WINDOW_BYTES - credit.left)
    with pytest.raises(MalformedMessage, match=r"exchange\.credit"):
        credit.grant(1)


@given(st.lists(st.integers(0, 2**20), max_size=60))
def test_both_ends_agree_whatever_is_sent(sizes):
    window, credit, received = Window(), Credit(), 0
    for size in sizes:
        sent = min(size, credit.left)
        credit.spend(sent)
        window.take(sent)
        received += sent
        if granted := window.free(sent):
            credit.grant(granted)
        assert FIRST_WINDOW_BYTES // 2 < credit.left <= MAX_WINDOW_BYTES
