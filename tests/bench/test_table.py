"""The table of figures, and the page that it stands on."""

import json
from pathlib import Path

from p2pmoe.bench.table import BEGIN, END, GOALS, LIMIT, PEER, put, table

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def write(path, *lines):
    made = [
        {"bench": bench, "system": system, "params": params, "metrics": metrics}
        for bench, system, params, metrics in lines
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def steps(rate):
    return {"train_batch64": {"steps_per_s": rate}}


def test_each_row_has_the_medians_and_says_whether_the_goal_is_met(tmp_path):
    ours = [("moe_layer", "p2pmoe", {}, steps(rate)) for rate in (10, 30, 20)]
    others = [("moe_layer", PEER, {}, steps(0.5)), ("moe_local", LIMIT, {}, steps(80))]
    rows = table(write(tmp_path / "lines", *ours, *others)).splitlines()[2:]
    assert rows == [
        "| mixture, 64 rows: steps/s | hivemind | 0.5 | 20 | **40** | 30 | 60 |",
        "| mixture, 64 rows: steps/s | plain torch | 80 | 20 | 0.25 | 0.4 | 0.6 |",
    ]


def test_less_is_better_where_it_is(tmp_path):
    weights = [{"idle_server": {"total": {"pss_mib": mib}}} for mib in (600, 200)]
    lines = [
        ("memory_startup", system, {}, one)
        for system, one in zip((PEER, "p2pmoe"), weights, strict=True)
    ]
    (row,) = table(write(tmp_path / "lines", *lines)).splitlines()[2:]
    assert row == "| idle server: MiB | hivemind | 600 | 200 | **3** | 2 | 2 |"


def test_the_table_takes_its_place_in_a_page_and_nothing_else_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    lines = write(tmp_path / "lines", ("moe_layer", "p2pmoe", {}, steps(1)))
    for _ in range(2):
        put(lines, page)
    assert page.read_text() == f"before\n{BEGIN}\n\n{table(lines)}\n{END}\nafter\n"


def test_the_page_shows_what_its_figures_say():
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(PAGE.with_suffix(".jsonl")).strip()


def test_every_goal_is_a_ratio_and_no_aim_is_below_it():
    assert all(0 < goal.goal <= goal.aim for goal in GOALS)
    assert all(goal.limit[0] for goal in GOALS if goal.against == LIMIT)
