"""Two files of results side by side."""

import json
from xml.etree import ElementTree as ET

import pytest

from p2pmoe.bench.compare import bars, compare
from p2pmoe.errors import ConfigurationError


def lines(path, *metrics, bench="expert_rpc", **params):
    each = [json.dumps({"bench": bench, "params": params, "metrics": one}) for one in metrics]
    path.write_text("\n".join([*each, ""]))
    return path


def test_more_of_a_rate_and_less_of_a_latency_is_better(tmp_path):
    theirs = lines(tmp_path / "theirs", {"c1": {"calls_per_s": 100, "p50_ms": 4, "n": 9}})
    ours = lines(tmp_path / "ours", {"c1": {"calls_per_s": 300, "p50_ms": 8, "n": 9}})
    found = {one.figure: one.better for one in compare(theirs, ours)}
    assert found == {"c1.calls_per_s": 3.0, "c1.p50_ms": 0.5}


def test_several_runs_count_by_their_median(tmp_path):
    theirs = lines(tmp_path / "theirs", {"x_ms": 1}, {"x_ms": 10}, {"x_ms": 2})
    ours = lines(tmp_path / "ours", {"x_ms": 1})
    (one,) = compare(theirs, ours)
    assert (one.theirs, one.ours, one.better) == (2, 1, 2)


def test_different_work_is_not_compared(tmp_path):
    theirs = lines(tmp_path / "theirs", {"x_ms": 1}, cls="bench_nop")
    assert compare(theirs, lines(tmp_path / "ours", {"x_ms": 1}, cls="bench_ffn")) == []


@pytest.mark.parametrize("value", [0, None, "text", True])
def test_what_has_no_ratio_is_left_out(tmp_path, value):
    theirs, ours = (
        lines(tmp_path / "theirs", {"x_ms": 1}),
        lines(tmp_path / "ours", {"x_ms": value}),
    )
    assert compare(theirs, ours) == []


@pytest.mark.parametrize("text", ["no json", "{}", "[]", '{"params": 1, "metrics": {"a": 1}}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    file = tmp_path / "wrong"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match="no benchmark's"):
        compare(file, file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read"):
        compare(tmp_path / "nowhere", tmp_path / "nowhere")


def test_the_drawing_has_a_bar_for_each_ratio(tmp_path):
    theirs = lines(tmp_path / "theirs", {"a_ms": 10, "b_per_s": 10})
    ours = lines(tmp_path / "ours", {"a_ms": 1, "b_per_s": 5})
    drawing = ET.fromstring(bars(compare(theirs, ours)))  # noqa: S314  our own drawing
    assert len(drawing.findall("{http://www.w3.org/2000/svg}rect")) == 2
