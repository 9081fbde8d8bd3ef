"""Named events and counters. Shells call this; cores never do.

An event has a dotted name (`dht.lookup.finished`) and fields; a counter has a Prometheus name and
labels of few values. The library changes no setting of the process, neither of `logging` nor of
structlog: events go where `configure` says, else to structlog as the program configured it, else,
from WARNING on, to standard error. structlog is loaded when it is first needed: that takes as long
as a fifth of all that a node loads.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from typing import Any, Literal, TextIO

from p2pmoe.errors import printable

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["console", "json"]

_LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_own_log: Any = None  # made by `configure`
_counters: Counter[str] = Counter()
_labelled: dict[tuple[object, ...], str] = {}  # names of counters by their labels

LINES_EACH = 10  # a second that one peer or address can cause; a guess
LINES_IN_ALL = 100  # a second that all of them can; a guess. It bounds the table, too.
_second = 0  # of the monotonic clock, that `_lines` is about
_lines: Counter[str] = Counter()  # by whom they are blamed on


def _safe(value: object) -> object:
    """A field as it may be printed: text from peers is escaped and cut."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes):
        return value[:16].hex()
    return printable(str(value) or type(value).__name__)


def emit(event: str, /, *, level: Level = "debug", **fields: object) -> None:
    """Say that something happened. `event` is a dotted name; fields are facts, not prose."""
    log = _log_for(_LEVELS[level])
    if log is not None:
        getattr(log, level)(event, **{key: _safe(value) for key, value in fields.items()})


def complain(of: str, event: str, /, *, level: Level = "info", **fields: object) -> None:
    """Say that something happened which others can make happen as often as they like.

    `of` is the peer or address at fault: 10 lines a second of each are written, 100 of all, and
    those left out are counted.
    """
    if _too_many(of):
        count("p2pmoe_log_lines_dropped_total", event=event)
    else:
        emit(event, level=level, **fields)


def _too_many(blame: str) -> bool:
    """Whether a line would be one too many of this second."""
    global _second  # one process has one log
    if (now := int(time.monotonic())) != _second:
        _second = now
        _lines.clear()
    if _lines[blame] >= LINES_EACH or _lines.total() >= LINES_IN_ALL:
        return True
    _lines[blame] += 1
    return False


def _log_for(level: int) -> Any | None:
    """Where an event of this level goes; None if it is not wanted."""
    if _own_log is not None:
        return _own_log if _own_log.is_enabled_for(level) else None
    structlog = sys.modules.get("structlog")  # whoever configured it has loaded it
    if structlog is not None and structlog.is_configured():
        return structlog.get_logger("p2pmoe")
    return None if level < logging.WARNING else _make_log("warning", "console", sys.stderr)


def count(name: str, amount: float = 1, /, **labels: str) -> None:
    """Add `amount` to a counter. Labels take few values: never a peer id or an expert uid."""
    if labels:
        key = (name, *labels.items())
        if key not in _labelled:
            told = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
            _labelled[key] = f"{name}{{{told}}}"
        name = _labelled[key]
    _counters[name] += amount  # type: ignore[assignment]  # a Counter may hold floats


def counters() -> dict[str, float]:
    """Every counter of this process by its name with labels."""
    return dict(_counters)


def configure(level: Level, fmt: Format, stream: TextIO | None = None) -> None:
    """Send events to `stream` (standard error by default), as console lines or as JSON objects.

    For programs, such as this package's command line.
    """
    global _own_log  # one process has one log
    _own_log = _make_log(level, fmt, stream if stream is not None else sys.stderr)


def _make_log(level: Level, fmt: Format, out: TextIO) -> Any:
    import structlog

    processors: list[Any] = [structlog.processors.add_log_level]
    if fmt == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    else:
        plain = structlog.dev.RichTracebackFormatter(show_locals=False)
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False, key="timestamp"),
            structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=plain),
        ]
    wrapper = structlog.make_filtering_bound_logger(_LEVELS[level])
    return structlog.wrap_logger(structlog.WriteLogger(out), processors, wrapper)
