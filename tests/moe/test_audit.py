"""Answers that are computed again: how soon a liar is found, and that nobody honest is accused."""

import math
import random

import numpy as np
import pytest

from p2pmoe.moe.audit import FEW, MOST_EXPERTS, Audits, Verdict

WIDTH = 64


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_random_unit_vectors_are_found_within_a_hundred_calls_at_five_percent() -> None:
    found = 0
    for seed in range(1000):
        audits, dice = Audits(0.05, random.Random(seed)), np.random.default_rng(seed)
        for _ in range(100):
            honest, made_up = dice.normal(size=(2, WIDTH))
            if audits.wanted("ffn.0") and (
                audits.judge(cosine(honest, made_up), int(dice.integers(FEW + 1))) is Verdict.WRONG
            ):
                found += 1
                break
    assert found >= 990


def test_an_honest_expert_is_not_accused_for_rounding_or_for_learning() -> None:
    audits, dice = Audits(1.0, random.Random(0)), np.random.default_rng(0)
    for _ in range(1000):
        honest = dice.normal(size=WIDTH)
        rounded = honest * (1 + dice.normal(size=WIDTH) * 2**-8)
        learnt = honest + dice.normal(size=WIDTH) / 2
        assert audits.judge(cosine(honest, rounded), 0) is Verdict.GOOD
        assert audits.judge(cosine(honest, learnt), 3) is Verdict.GOOD
    assert audits.verdicts == {Verdict.GOOD: 2000}


@pytest.mark.parametrize(
    ("alike", "updates", "verdict"),
    [
        (0.99, 10**6, Verdict.GOOD),
        (0.98, 0, Verdict.WRONG),
        (0.98, 1, Verdict.GOOD),
        (0.49, FEW, Verdict.WRONG),
        (0.49, FEW + 1, Verdict.UNSURE),
        (math.nan, 0, Verdict.UNSURE),
    ],
)
def test_what_is_said_of_an_answer(alike: float, updates: int, verdict: Verdict) -> None:
    audits = Audits(1.0, random.Random(0))
    assert audits.judge(alike, updates) is verdict
    assert audits.verdicts == {verdict: 1}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_about_the_share_is_audited_and_no_expert_goes_long_without(share: float) -> None:
    audits = Audits(share, random.Random(5))
    wanted = [audits.wanted("x") for _ in range(20_000)]
    assert sum(wanted) == pytest.approx(share * 20_000, rel=0.1)
    if share:
        places = np.flatnonzero(wanted)
        assert np.diff(places, prepend=-1).max() < 2 / share
        assert share == 1.0 or len(set(np.diff(places))) > 1, "a server must not know when"


def test_experts_that_come_and_go_leave_a_bounded_memory_behind() -> None:
    audits = Audits(0.02, random.Random(5))
    for name in range(MOST_EXPERTS + 10):
        audits.wanted(name)
    assert len(audits._left) == MOST_EXPERTS
