"""Where the time of one training step goes, measured and drawn.

The training thread is watched by Python's own profiler; what it waits for is divided by what the
servers say of their devices. Servers work side by side: the one that computes longest counts.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from p2pmoe.bench.work import now
from p2pmoe.identity import PeerId
from p2pmoe.moe.layer import DMoE
from p2pmoe.node import Node
from p2pmoe.wire import schema
from p2pmoe.wire.status import METHOD, NodeStatus, StatusRequest

STEPS = 50  # that are watched
FUNCTIONS = {  # stage: the functions that make it, by file and name
    "gate": {("gating.py", "forward"), ("gating.py", "cell_scores")},
    "beam": {("link.py", "search"), ("select.py", "select")},
    "dispatch": {
        ("dispatch.py", "plan"),
        ("dispatch.py", "gather_rows"),
        ("dispatch.py", "gather_pairs"),
        ("trip.py", "_asks"),
    },
    "crossing": {("link.py", "cross")},
    "combine": {
        ("gating.py", "survivor_weights"),
        ("layer.py", "_combined"),
        ("trip.py", "_scattered"),
    },
}
COLOURS = {  # Okabe and Ito's, told apart by everybody
    "gate": "#e69f00",
    "beam": "#56b4e9",
    "dispatch": "#009e73",
    "network": "#f0e442",
    "queue": "#0072b2",
    "compute": "#d55e00",
    "combine": "#cc79a7",
    "rest": "#808080",
}
WIDTH, ROW, LEFT = 900, 22, 8  # of the drawing, in its own units


def watch(layer: DMoE, step: Callable[[], object], steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of each stage of one training step of a layer, in the mean."""
    swarm, peers = layer.link.swarm, frozenset(layer.link.service.view.peers)
    before, profile = swarm.call(_devices, swarm.node, peers), cProfile.Profile()
    began = now()
    profile.enable()
    for _ in range(steps):
        step()
    profile.disable()
    took = now() - began
    after = swarm.call(_devices, swarm.node, peers)
    spent = dict.fromkeys(FUNCTIONS, 0.0)
    for (file, _, name), (*_, seconds, _callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]  # not in its stub
        for stage, functions in FUNCTIONS.items():
            spent[stage] += seconds if (Path(file).name, name) in functions else 0.0
    busiest = max(after, key=lambda peer: after[peer][0] - before[peer][0])
    compute, queue = (b - a for a, b in zip(before[busiest], after[busiest], strict=True))
    rest = took - sum(spent.values())
    crossing = spent.pop("crossing")
    network = max(0.0, crossing - compute - queue)
    stages = spent | {"network": network, "queue": queue, "compute": compute, "rest": rest}
    return {stage: round(stages[stage] / steps * 1000, 3) for stage in COLOURS}


async def _devices(node: Node, peers: Iterable[PeerId]) -> Mapping[PeerId, tuple[float, float]]:
    """Of each server, seconds that its device computed, and that work waited for it."""
    found = {}
    for peer in peers:
        contact = node.dht.contact(peer)
        assert contact is not None  # it was asked for training steps
        part = await node.pool.call(contact, METHOD, schema.encode(StatusRequest()))
        (row,) = schema.decode(part.body, NodeStatus).sections["device"]
        found[peer] = (int(row.values["computed_us"]) / 1e6, int(row.values["waited_us"]) / 1e6)
    return found


def drawn(stages: Mapping[str, float], title: str) -> str:
    """One bar, its parts as long as they take, and what they are."""
    total = sum(stages.values()) or 1.0
    lines = [_text(0, f"{title}: {total:.1f} ms a step")]
    x = float(LEFT)
    for row, (stage, taken) in enumerate(stages.items(), start=3):
        width = taken / total * WIDTH
        place = f'x="{x:.1f}" y="{1.2 * ROW:.1f}" width="{width:.1f}" height="{1.3 * ROW:.1f}"'
        lines.append(f'<rect {place} fill="{COLOURS[stage]}"/>')
        mark = f'x="{LEFT}" y="{row * ROW + 5}" width="12" height="12"'
        lines.append(f'<rect {mark} fill="{COLOURS[stage]}"/>')
        lines.append(_text(row, f"{stage}: {taken:.2f} ms, {taken / total:.0%}", LEFT + 20))
        x += width
    box = f'viewBox="0 0 {WIDTH + 2 * LEFT} {ROW * (len(stages) + 4)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif">'
    return "\n".join([head, *lines, "</svg>", ""])


def _text(row: int, text: str, x: float = LEFT) -> str:
    place = f'x="{x:.1f}" y="{(row + 0.7) * ROW:.1f}"'
    return f'<text {place} font-size="13" fill="#808080">{escape(text)}</text>'
