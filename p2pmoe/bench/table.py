"""The table of `docs/performance.md`: work, what each system needed for it, and the ratio.

Its rows are made of a file of benchmark lines of several systems. Each figure is the median of all
runs in the file; a ratio above 1 is ours to the good.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from p2pmoe.bench.compare import read
from p2pmoe.bench.work import SYSTEM

PEER, LIMIT = "hivemind", "torch"  # systems, as their lines name them
LIMITS = {"bare_tls": "bare TLS"}  # by benchmark; the others are plain torch
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


@dataclass(frozen=True, slots=True)
class Goal:
    """One row: which figure of which benchmark, and by how much it is to be better.

    `higher` says which way is up. The limit's figure may have names of its own.
    """

    work: str
    bench: str
    figure: str
    goal: float
    aim: float
    higher: bool = True
    against: str = PEER
    limit: tuple[str, str] = ("", "")


NOP, FFN, MOE, START = (
    "expert_rpc bench_nop",
    "expert_rpc bench_ffn",
    "moe_layer",
    "memory_startup",
)
FORWARD, TRAIN = "forward_batch2048", "train_batch2048"
GOALS = (
    Goal("call, 1 row, 1 caller: p50 ms", NOP, "forward_batch1_c1.p50_ms", 6, 10, higher=False),
    Goal("call, 1 row, 16 callers: calls/s", NOP, "forward_batch1_c16.calls_per_s", 5, 10),
    *(
        Goal(
            f"call, 4 MB, {callers}: MB/s",
            NOP,
            f"forward_batch1024_c{count}.payload_both_ways_MB_per_s",
            3,
            5,
        )
        for callers, count in (("1 caller", 1), ("16 callers", 16))
    ),
    Goal(
        "block of 1,024, 2,048 rows forward: rows/s",
        FFN,
        f"{FORWARD}_c16.samples_per_s",
        0.9,
        0.97,
        against=LIMIT,
        limit=("bare_tls", f"{FORWARD}_c4.samples_per_s"),
    ),
    Goal(
        "block of 1,024, 2,048 rows forward and backward: rows/s",
        FFN,
        f"{TRAIN}_c16.samples_per_s",
        0.85,
        0.92,
        against=LIMIT,
        limit=("local_limit", "train_recompute_batch2048.samples_per_s"),
    ),
    Goal("mixture, 64 rows: steps/s", MOE, "train_batch64.steps_per_s", 30, 60),
    Goal(
        "mixture, 64 rows: steps/s",
        MOE,
        "train_batch64.steps_per_s",
        0.4,
        0.6,
        against=LIMIT,
        limit=("moe_local", "train_batch64.steps_per_s"),
    ),
    Goal("mixture, 512 rows: steps/s", MOE, "train_batch512.steps_per_s", 100, 200),
    Goal(
        "mixture, 512 rows: steps/s",
        MOE,
        "train_batch512.steps_per_s",
        0.5,
        0.7,
        against=LIMIT,
        limit=("moe_local", "train_batch512.steps_per_s"),
    ),
    Goal("choosing 4 of 64, 64 rows: p50 ms", MOE, "beam_batch64.p50_ms", 50, 500, higher=False),
    *(
        goal
        for peers in (16, 64)
        for goal in (
            Goal(
                f"DHT of {peers}, store: p50 ms",
                f"dht_store_get {peers}",
                "store_seq.p50_ms",
                4,
                8,
                higher=False,
            ),
            Goal(
                f"DHT of {peers}, get: p50 ms",
                f"dht_store_get {peers}",
                "get_seq.p50_ms",
                3,
                8,
                higher=False,
            ),
            Goal(
                f"DHT of {peers}, 64 at once: stores/s",
                f"dht_store_get {peers}",
                "store_c64.per_s",
                8,
                20,
            ),
            Goal(
                f"DHT of {peers}, 64 at once: gets/s",
                f"dht_store_get {peers}",
                "get_c64.per_s",
                8,
                20,
            ),
        )
    ),
    Goal("DHT of 64, start: s", "dht_store_get 64", "start_all_s", 3, 3, higher=False),
    Goal("idle peer: MiB", START, "idle_dht_peer.total.pss_mib", 5, 5, higher=False),
    Goal("idle peer: processes", START, "idle_dht_peer.total.processes", 4, 4, higher=False),
    Goal("idle server: MiB", START, "idle_server.total.pss_mib", 2, 2, higher=False),
    Goal("idle server: processes", START, "idle_server.total.processes", 14, 14, higher=False),
    Goal("start to first answer: s", START, "first_forward_s", 1 / 0.6, 2, higher=False),
)


def table(file: Path) -> str:
    """The table in Markdown, of the rows that the file has figures for."""
    ours = read(file, SYSTEM)
    others = {system: read(file, system) for system in (PEER, LIMIT)}
    lines = ["| work | by | theirs | ours | ratio | goal | aim |", "| --- " + "| --: " * 6 + "|"]
    lines[1] = "| --- | --- " + "| --: " * 5 + "|"
    for goal in GOALS:
        mine = ours.get((goal.bench, goal.figure))
        key = goal.limit if goal.against == LIMIT else (goal.bench, goal.figure)
        theirs = others[goal.against].get(key)
        if mine is None or not theirs:
            continue
        ratio = mine / theirs if goal.higher else theirs / mine
        met = "**" if ratio >= goal.goal else ""
        figures = f"{theirs:.4g} | {mine:.4g} | {met}{_short(ratio, 3)}{met}"
        name = LIMITS.get(key[0], "plain torch") if goal.against == LIMIT else goal.against
        lines.append(f"| {goal.work} | {name} | {figures} | {goal.goal:.3g} | {goal.aim:.3g} |")
    return "\n".join(lines) + "\n"


def put(file: Path, page: Path) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{table(file)}\n{END}{tail}", encoding="utf-8")


def _short(value: float, digits: int) -> str:
    """A value in so many digits, or all those before its point."""
    return f"{value:,.0f}" if value >= 10**digits else f"{value:.{digits}g}"
