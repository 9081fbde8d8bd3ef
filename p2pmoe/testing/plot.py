"""Line charts as SVG text, drawn by a few lines of our own: no library, the same bytes anywhere.

Colours suit light and dark pages alike, and people who do not tell red from green (Okabe and Ito).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 52  # of the axes' frame
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FONT = 'font-family="sans-serif" font-size="13"'
INK = "#808080"  # text and axes
TICKS = 6  # about so many on an axis

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to places between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        share = (_scaled(value, self.log) - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values within the range."""
        if self.low == self.high:
            return [10.0**self.low if self.log else self.low]
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1,) if self.high - self.low > TICKS else (1, 2, 5)
            marks = [step * 10.0**power for power in powers for step in steps]
        else:
            step = _round_step((self.high - self.low) / TICKS)
            first = math.ceil(self.low / step - 1e-9)
            marks = [step * each for each in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [
            mark for mark in marks if self.low - 1e-9 <= _scaled(mark, self.log) <= self.high + 1e-9
        ]


def line_chart(
    series: Mapping[str, Points], title: str, x: str, y: str, *, log_x: bool = False
) -> str:
    """An SVG document: lines of (x, y) points by name, the y axis from zero, a legend above.

    `x` and `y` name the axes with their units. Raises `ValueError` without any point, or with one
    that is not finite (or not positive where `log_x`).
    """
    points = [point for line in series.values() for point in line]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise ValueError("a chart needs finite points")
    if log_x and min(point[0] for point in points) <= 0:
        raise ValueError("a logarithmic axis needs positive values")
    across = [_scaled(point[0], log_x) for point in points]
    heights = [point[1] for point in points]
    top = max(*heights, 0.0) or 1.0
    axes = (
        Axis(min(across), max(across), LEFT, WIDTH - RIGHT, log_x),
        Axis(min(*heights, 0.0), top * 1.05, HEIGHT - BOTTOM, TOP + 20, log=False),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f"<title>{escape(title)}</title>",
        _text(WIDTH / 2, 20, title, "middle", 'font-size="15"'),
        *_grid(*axes),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x, "middle"),
        _text(LEFT, TOP, y, "middle"),
        *_lines(series, *axes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(across: Axis, up: Axis) -> list[str]:
    parts = []
    for value in up.ticks():
        height = up.place(value)
        parts.append(
            f'<path d="M{LEFT} {height}H{WIDTH - RIGHT}" stroke="{INK}" stroke-opacity=".3"/>'
        )
        parts.append(_text(LEFT - 8, height + 4, _number(value), "end"))
    for value in across.ticks():
        at = across.place(value)
        parts.append(f'<path d="M{at} {HEIGHT - BOTTOM}v5" stroke="{INK}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 20, _number(value), "middle"))
    return parts


def _lines(series: Mapping[str, Points], across: Axis, up: Axis) -> list[str]:
    parts = []
    legend = WIDTH - RIGHT
    for number, (name, line) in enumerate(reversed([*series.items()])):
        colour = COLOURS[(len(series) - 1 - number) % len(COLOURS)]
        places = " ".join(f"{across.place(a)},{up.place(b)}" for a, b in line)
        parts.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2.2"/>'
        )
        parts.append(_text(legend, TOP, name, "end", colour=colour))
        legend -= 8 * len(name) + 16
    return parts


def _text(x: float, y: float, text: str, anchor: str, more: str = "", *, colour: str = INK) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" {more}>'
        f"{escape(text)}</text>"
    )


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so much."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:,.10g}"
