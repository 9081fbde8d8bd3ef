"""How near this package comes to the machine's own limits, and how near it came before.

Each ratio compares a rate of ours with what the machine does without us in the same run, so that
it says the same on a fast and a slow machine. The file keeps the ratios that were accepted last; a
change for the worse is worth a word to whoever makes it.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pmoe.bench import footprint, local, moe, rpc
from p2pmoe.bench.work import memory_of, now
from p2pmoe.errors import ConfigurationError

WORSE = 0.9  # of the ratio that was kept: what is below gets named
ECHO_BYTES = 4096  # there and back; a row of 1,024 floats
ECHO = f"""
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    peer, _ = listener.accept()
    while data := peer.recv({ECHO_BYTES}, socket.MSG_WAITALL):
        peer.sendall(data)
"""
IMPORT = "import torch; print(flush=True); input()"


def measure(seconds: float) -> dict[str, float]:
    """The ratios, each of its measurements taking so long; more is better."""
    mixture = moe.MoeParams(seconds=seconds, beam=1)
    ours = moe.run(mixture)["metrics"]
    torchs = local.run_mixture(mixture)["metrics"]
    found = {
        f"mixture, {rows} rows": _rate(ours, rows, "steps_per_s")
        / _rate(torchs, rows, "steps_per_s")
        for rows in mixture.batches
    }
    block = local.run_block(local.LocalParams(batches=(2048,), seconds=seconds))["metrics"]
    call = rpc.RpcParams(
        cls="bench_ffn", seconds=seconds, concurrency=(4,), only=("forward", "train")
    )
    ours = rpc.run(call)["metrics"]
    for part, limit in (("forward", "forward"), ("train", "train_recompute")):
        mine = ours[f"{part}_batch2048_c4"]["samples_per_s"]
        found[f"block, {part}"] = mine / block[f"{limit}_batch2048"]["samples_per_s"]
    call = rpc.RpcParams(seconds=seconds, concurrency=(1,), only=("latency",))
    calls = rpc.run(call)["metrics"]["forward_batch1_c1"]["calls_per_s"]
    found["call of one row"] = calls / _echoes(seconds)
    weighed = footprint.run(footprint.FootprintParams(settle=1.0))["metrics"]
    took, mib = _import()
    found["start"] = took / weighed["first_forward_s"]
    found["memory of a server"] = mib / weighed["idle_server"]["total"]["pss_mib"]
    found["memory of a peer"] = mib / weighed["idle_dht_peer"]["total"]["pss_mib"]
    return {name: float(f"{ratio:.4g}") for name, ratio in found.items()}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of several runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def differences(kept: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """One line a ratio; the last ones name what became slower, or that nothing did."""
    lines = []
    for name, ratio in found.items():
        change = f"{ratio / kept[name] - 1:+.0%}" if name in kept else "new"
        lines.append(f"{name:20} {kept.get(name, 0.0):8.4g} {ratio:8.4g}  {change}")
    slower = [name for name in found if found[name] < WORSE * kept.get(name, 0.0)]
    worst = f"slower by more than {1 - WORSE:.0%}: {', '.join(slower)}"
    return [*lines, worst if slower else f"nothing is slower by more than {1 - WORSE:.0%}"]


def read(file: Path) -> dict[str, float]:
    """The ratios that were kept; none if there is no such file."""
    try:
        return {str(name): float(ratio) for name, ratio in json.loads(file.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"cannot read ratios from {file}: {error}") from None


def write(file: Path, ratios: Mapping[str, float]) -> None:
    """Keep these."""
    file.write_text(json.dumps(ratios, indent=1) + "\n", encoding="utf-8")


def _rate(metrics: Mapping[str, Any], rows: int, figure: str) -> float:
    return float(metrics[f"train_batch{rows}"][figure])


def _echoes(seconds: float) -> float:
    """How often a second as many bytes as a row's go to another process and back, in the clear."""
    command = [sys.executable, "-c", ECHO]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  the text above
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address) as peer:
            count, data, began = 0, bytes(ECHO_BYTES), now()
            while (took := now() - began) < seconds or not count:
                peer.sendall(data)
                peer.recv(ECHO_BYTES, socket.MSG_WAITALL)
                count += 1
        return count / took


def _import() -> tuple[float, float]:
    """Seconds and MiB that a process needs to import torch."""
    command = [sys.executable, "-c", IMPORT]
    began = now()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:  # noqa: S603  the text above
        assert process.stdout is not None
        process.stdout.readline()
        took = now() - began
        mib = float(memory_of(process.pid)["pss_mib"])
        process.communicate("\n")
    return took, mib
