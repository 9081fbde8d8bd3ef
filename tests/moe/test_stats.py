"""What is counted, and when a user is warned that accuracy must stall."""

import pytest

from p2pmoe.moe.stats import ADVICE, LATEST_ROWS, PAUSE, ROWS_NEEDED, Learning, Skipped


def test_staleness_counts_the_updates_of_others_between_forward_and_backward() -> None:
    learning = Learning()
    for before, after in [(0, 1), (4, 5), (4, 6), (4, 7), (4, 8), (0, 18), (3, 3)]:
        learning.updated(before, after)
    assert learning.histogram() == {"0": 3, "1": 1, "2-3": 2, "16-31": 1}
    assert learning.updates == 7
    for bits in range(64):
        learning.updated(0, 1 << bits)
    assert len(learning.histogram()) <= 21


def test_the_norms_of_gradients_are_told() -> None:
    learning = Learning()
    assert learning.row()["grad_norm_mean"] == "0"
    for norm in (1.0, 4.0, 1.0):
        learning.brought(norm)
    assert learning.row() == {
        "updates": 0,
        "grad_norm": "1",
        "grad_norm_mean": "2",
        "grad_norm_most": "4",
    }


def test_nothing_is_said_while_few_rows_are_skipped_or_few_are_known() -> None:
    skipped = Skipped()
    assert skipped.add(ROWS_NEEDED - 1, ROWS_NEEDED - 1, {"timeout": 1}, 0.0) is None
    assert Skipped().add(1000, 50, {"timeout": 50}, 0.0) is None


@pytest.mark.parametrize(
    ("causes", "advice"),
    [
        ({"timeout": 9, "busy": 3}, "patience"),
        ({"unreachable": 2, "lost": 2, "timeout": 3}, "servers are gone"),
        ({"busy": 2, "paused": 2, "timeout": 3}, "no room"),
        ({"nonfinite": 2}, "NaN"),
        ({"internal": 2}, "logs say why"),
        ({}, "logs say why"),
    ],
)
def test_a_warning_says_what_can_be_done_about_the_most_frequent_cause(
    causes: dict[str, int], advice: str
) -> None:
    said = Skipped().add(1000, 51, causes, 0.0)
    assert said in ADVICE
    assert advice in said


def test_a_warning_is_given_once_a_minute_and_for_what_happened_since() -> None:
    skipped = Skipped()
    assert "patience" in (skipped.add(100, 50, {"timeout": 50}, 0.0) or "")
    assert skipped.add(100, 50, {"busy": 1}, PAUSE - 1) is None
    assert "no room" in (skipped.add(100, 50, {}, PAUSE) or "")
    assert skipped.add(100, 0, {}, 2 * PAUSE) is None
    assert skipped.share > 0.05


def test_only_the_latest_rows_count() -> None:
    skipped = Skipped()
    skipped.add(100, 100, {}, 0.0)
    assert skipped.share == 1.0
    for _ in range(LATEST_ROWS // 100 + 1):
        skipped.add(100, 0, {}, 0.0)
    assert skipped.share == 0.0
    assert len(skipped._batches) <= LATEST_ROWS // 100 + 1
    assert skipped.add(100, 4, {}, 1e9) is None
