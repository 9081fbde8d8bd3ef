"""How long a batch waits is decided by rows, not by parts; time is a number."""

import math

import numpy as np
import pytest

from p2pmoe.moe.quorum import WAITS_NEEDED, Quorum, QuorumParams, Waits

PARAMS = QuorumParams(k_min=1, grace=0.2, patience=2.0, timeout=5.0)


def rows(*parts: list[int]) -> dict[int, np.ndarray]:
    return {i: np.array(part, dtype=np.int64) for i, part in enumerate(parts)}


def test_grace_begins_when_every_row_has_an_answer() -> None:
    quorum = Quorum(rows([0, 1], [1, 2], [0, 2]), 3, PARAMS, now=10.0)
    assert quorum.next_deadline() == 12.0
    quorum.answered([0], now=10.5)
    assert quorum.next_deadline() == 12.0
    assert quorum.served.tolist() == [True, True, False]
    quorum.answered([2], now=11.0)
    assert quorum.served.all()
    assert quorum.next_deadline() == pytest.approx(11.2)
    quorum.answered([1], now=11.1)
    assert quorum.waited(now=11.1) == pytest.approx(1.0)
    assert quorum.next_deadline() == pytest.approx(11.2)


def test_an_answer_that_was_asked_for_later_serves_its_rows_too() -> None:
    quorum = Quorum(rows([0, 1]), 2, PARAMS, now=0.0)
    quorum.asked({7: np.array([1])})
    quorum.answered([7], now=0.5)
    assert (quorum.rows_served, quorum.next_deadline()) == (1, 2.0)
    quorum.answered([0], now=0.6)
    assert (quorum.rows_served, quorum.next_deadline()) == (2, pytest.approx(0.8))


def test_a_row_needs_k_min_answers_of_its_own() -> None:
    quorum = Quorum(rows([0, 1], [0]), 2, QuorumParams(2, 0.2, 2.0, 5.0), now=0.0)
    quorum.answered([0], now=0.1)
    quorum.answered([1], now=0.3)
    assert quorum.served.tolist() == [True, False]
    assert quorum.next_deadline() == pytest.approx(0.5)


def test_a_row_whose_parts_all_failed_keeps_nobody_waiting() -> None:
    quorum = Quorum(rows([0], [1], [1]), 2, PARAMS, now=0.0)
    quorum.failed([0], now=0.1)
    assert quorum.next_deadline() == 2.0
    quorum.answered([1], now=0.4)
    assert quorum.next_deadline() == pytest.approx(0.6)
    assert quorum.served.tolist() == [False, True]


def test_neither_patience_nor_grace_goes_beyond_the_timeout() -> None:
    quorum = Quorum(rows([0], [0]), 1, QuorumParams(1, 1.0, math.inf, 5.0), now=0.0)
    assert quorum.next_deadline() == 5.0
    quorum.answered([0], now=4.5)
    assert quorum.next_deadline() == 5.0


def test_a_batch_without_answers_waited_until_now() -> None:
    quorum = Quorum(rows([0]), 1, PARAMS, now=1.0)
    assert quorum.waited(now=3.0) == 2.0
    quorum.failed([0], now=3.5)
    assert quorum.waited(now=4.0) == 3.0


def test_a_batch_without_rows_is_settled_at_once() -> None:
    assert Quorum({}, 0, PARAMS, now=1.0).next_deadline() == pytest.approx(1.2)


def test_the_median_wait_is_known_after_enough_batches() -> None:
    waits = Waits()
    for i in range(WAITS_NEEDED):
        assert waits.median == math.inf
        waits.add(float(i))
    assert waits.median == (WAITS_NEEDED - 1) / 2
