"""Charts as SVG text."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import pytest

from p2pmoe.testing.plot import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str | None]:
    return [each.text for each in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314  ours


def lines(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in each.get("points").split())]
        for each in ET.fromstring(svg).iter(f"{SVG}polyline")  # noqa: S314  ours
    ]


def test_a_chart_names_its_axes_its_lines_and_its_marks() -> None:
    svg = line_chart({"a <b>": [(0, 0), (10, 40)], "c": [(0, 20), (10, 5)]}, "T & T", "n", "ms")
    found = texts(svg)
    assert {"a <b>", "c", "T & T", "n", "ms", "0", "10", "40"} <= set(found)
    assert svg == line_chart(
        {"a <b>": [(0, 0), (10, 40)], "c": [(0, 20), (10, 5)]}, "T & T", "n", "ms"
    )


def test_larger_values_are_further_up_and_to_the_right() -> None:
    (line,) = lines(line_chart({"a": [(1, 1), (2, 5), (3, 3)]}, "t", "x", "y"))
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert line[1][1] < line[2][1] < line[0][1]


def test_on_a_logarithmic_axis_equal_factors_are_equal_steps() -> None:
    svg = line_chart({"a": [(10, 1), (100, 2), (1000, 3)]}, "t", "x", "y", log_x=True)
    (line,) = lines(svg)
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)
    assert {"10", "20", "50", "100", "1,000"} <= set(texts(svg))
    wide = line_chart({"a": [(1, 1), (10**8, 2)]}, "t", "x", "y", log_x=True)
    assert "20" not in texts(wide)


def test_one_point_and_flat_lines_are_drawn_too() -> None:
    assert len(lines(line_chart({"a": [(5, 0)], "b": [(5, 0)]}, "t", "x", "y"))) == 2
    assert "-2" in texts(line_chart({"a": [(1, -2), (2, 2)]}, "t", "x", "y"))


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(math.inf, 1)], [(0, 1)]])
def test_what_cannot_be_drawn_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="needs"):
        line_chart({"a": points}, "t", "x", "y", log_x=True)
