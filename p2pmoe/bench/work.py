"""What every benchmark shares: statistics, calls from many threads, and the line that is printed.

A line names the work, the system that did it, its parameters, what was measured, and the host. The
same work done by another system prints a line of the same form, so that two can be compared. Its
half uses what is here in an environment of its own: nothing but the standard library is loaded.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pmoe.errors import P2PMoEError

if TYPE_CHECKING:
    import trio

SYSTEM = "p2pmoe"
Metrics = dict[str, Any]
now = time.perf_counter


def percentile(values: Sequence[float], q: float) -> float | None:
    """The nearest-rank percentile, q in 0..100; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(1, int(-(-len(ordered) * q // 100))) - 1]


def ms(seconds: float | None) -> float | None:
    """Seconds as milliseconds, to the microsecond."""
    return None if seconds is None else round(seconds * 1000, 3)


def latency_summary(values: Sequence[float]) -> Metrics:
    """Of latencies in seconds: how many, median, 99th percentile and mean in ms."""
    return {
        "n": len(values),
        "p50_ms": ms(percentile(values, 50)),
        "p99_ms": ms(percentile(values, 99)),
        "mean_ms": ms(statistics.fmean(values)) if values else None,
    }


def record(bench: str, params: Mapping[str, Any], metrics: Metrics, by: str = SYSTEM) -> Metrics:
    """The line of one benchmark, by this system or by another way to do the same work."""
    load = round(os.getloadavg()[0], 1)
    return {
        "bench": bench,
        "system": by,
        "params": dict(params),
        "metrics": metrics,
        "host": {"cores": os.cpu_count(), "nice": os.nice(0), "load1_at_end": load},
    }


@dataclass(slots=True)
class Tally:
    """What several threads that called in a loop saw. Times in seconds."""

    took: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def failed(self, error: P2PMoEError) -> None:
        """Count a call that failed."""
        self.errors.append(f"{type(error).__name__}: {error}"[:200])

    def summary(self, rows: int = 1) -> Metrics:
        """Rates and latencies, where each call had so many rows."""
        rate = len(self.latencies) / self.took
        found = {"calls_per_s": round(rate, 2), "samples_per_s": round(rate * rows, 1)}
        found |= latency_summary(self.latencies)
        return found | self.failures()

    def failures(self) -> Metrics:
        """How many calls failed, and the first reason; nothing when none did."""
        return {"errors": len(self.errors), "first_error": self.errors[0]} if self.errors else {}


def hammer(call: Callable[[], object], threads: int, seconds: float) -> Tally:
    """Call in a loop from so many threads for so many seconds; each thread once at least."""
    tally, ready = Tally(), threading.Barrier(threads + 1)
    stop = now() + seconds

    def loop() -> None:
        ready.wait()
        while True:
            began = now()
            try:
                call()
                tally.latencies.append(now() - began)
            except P2PMoEError as error:
                tally.failed(error)
            if now() >= stop:
                return

    crowd = [threading.Thread(target=loop) for _ in range(threads)]
    for one in crowd:
        one.start()
    stop = now() + seconds
    ready.wait()
    began = now()
    for one in crowd:
        one.join()
    tally.took = now() - began
    return tally


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    """What comes on a stream, a line at a time."""
    rest = b""
    async for chunk in stream:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line


def memory_of(pid: int) -> Metrics:
    """Resident and proportional memory of a process and its children, MiB (Linux)."""
    pids = with_children(pid)
    resident = proportional = 0
    for each in pids:
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        resident += sizes["Rss:"]
        proportional += sizes["Pss:"]
    return {
        "processes": len(pids),
        "rss_mib": round(resident / 1024, 1),
        "pss_mib": round(proportional / 1024, 1),
    }


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_children(pid: int) -> list[int]:
    """A process and all its descendants, those nearest to it first (Linux)."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found
