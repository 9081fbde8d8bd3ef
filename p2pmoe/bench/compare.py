"""Two files of results side by side: of every figure in both, how many times better ours is.

Lines of one benchmark with several runs are reduced to the median of each figure first.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from p2pmoe.errors import ConfigurationError

MORE_IS_BETTER = ("per_s", "success", "ok", "steps")  # ends of the names of such figures
LESS_IS_BETTER = ("_ms", "_s", "_mib", "processes", "_percent", "errors")
ROW, LABEL, SCALE, INK = 22, 330, 60, "#808080"  # of the drawing, in its own units
BETTER, WORSE = "#009e73", "#d55e00"  # Okabe and Ito's, told apart by everybody


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of both. `better` is above 1 where ours is the better one."""

    bench: str
    figure: str
    theirs: float
    ours: float
    better: float


def read(file: Path, system: str | None = None) -> dict[tuple[str, str], float]:
    """The median of each figure by benchmark and name, of one system or of all in a file.

    `ConfigurationError` for a file of something else.
    """
    values: dict[tuple[str, str], list[float]] = {}
    try:
        for line in filter(str.strip, file.read_text().splitlines()):
            result = json.loads(line)
            if system is not None and result["system"] != system:
                continue
            for name, value in _figures(result["metrics"]):
                values.setdefault((_name(result), name), []).append(value)
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file} has a line that is no benchmark's: {error!r}") from None
    return {key: statistics.median(each) for key, each in values.items()}


def compare(theirs: Path, ours: Path) -> list[Ratio]:
    """All figures that both files have and that are better higher or better lower."""
    there, here, found = read(theirs), read(ours), []
    for (bench, figure), value in here.items():
        other = there.get((bench, figure))
        if other is None or (direction := _direction(figure)) == 0:
            continue
        up = (value or math.nan) / (other or math.nan)
        better = up if direction > 0 else 1 / up
        if math.isfinite(better):
            found.append(Ratio(bench, figure, other, value, better))
    return found


def bars(ratios: list[Ratio]) -> str:
    """The ratios as an SVG drawing, one bar each on a logarithmic scale, 1 being equal."""
    reach = max([1.0, *(abs(math.log10(one.better)) for one in ratios)])
    middle = LABEL + reach * SCALE
    drawn = [_text(8, 0, "times better than the other system")]
    for index, one in enumerate(ratios, start=1):
        size = math.log10(one.better) * SCALE
        colour = BETTER if size >= 0 else WORSE
        place = f'x="{min(middle, middle + size):.1f}" y="{index * ROW + 3}"'
        drawn += [
            _text(8, index, f"{one.bench} {one.figure}"),
            f'<rect {place} width="{abs(size):.1f}" height="{ROW - 6}" fill="{colour}"/>',
            _text(max(middle, middle + size) + 6, index, f"{one.better:.3g}"),
        ]
    box = f'viewBox="0 0 {middle + reach * SCALE + 80:g} {ROW * (len(ratios) + 2)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif">'
    return "\n".join([head, *drawn, "</svg>", ""])


def _text(x: float, row: int, text: str) -> str:
    place = f'x="{x:.1f}" y="{(row + 0.7) * ROW:.1f}"'
    return f'<text {place} font-size="12" fill="{INK}">{escape(text)}</text>'


def _name(result: Mapping[str, Any]) -> str:
    """A benchmark's name, with the parameter that makes two of them different work."""
    params = result["params"]
    kind = params.get("cls") or params.get("peers") or ""
    return f"{result['bench']} {kind}".strip()


def _figures(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _direction(figure: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    if figure.endswith(MORE_IS_BETTER):
        return 1
    return -1 if figure.endswith(LESS_IS_BETTER) else 0
