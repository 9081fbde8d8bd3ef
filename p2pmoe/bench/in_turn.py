"""The peer system and ours, in turn, on the same work: every ratio of `docs/performance.md`.

    python -m p2pmoe.bench.in_turn --scripts DIR --peer-python PYTHON docs/performance.jsonl

`--scripts` is a folder with the peer's half of each work, one script an item, which print lines as
`p2pmoe bench --json` does. `--peer-python` has hivemind 1.1.12. Every item is done by the peer, by
us and, where there is one, by the limit, and that `--runs` times over; all lines go into the file.
Then `p2pmoe bench table docs/performance.jsonl docs/performance.md` makes the table. What fails is
told on standard error and left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

LIMIT = 900  # seconds of one run of one item
ITEMS = {  # item: the peer's script with its options, and ours
    "rpc": ("expert_rpc.py --cls bench_nop", "rpc --cls bench_nop"),
    "block": ("expert_rpc.py --concurrency 1,16", "rpc --cls bench_ffn --concurrency 1,16"),
    "moe64": ("moe_layer.py --batches 64 --beam 50", "moe --batches 64"),
    "moe512": ("moe_layer.py --batches 512 --beam 0 --seconds 40", "moe --batches 512"),
    "dht16": ("dht_store_get.py --peers 16", "dht --peers 16"),
    "dht64": ("dht_store_get.py --peers 64", "dht --peers 64"),
    "memory": ("memory_startup.py", "footprint"),
    "limit": ("", "local"),
}


def run(command: list[str]) -> list[str]:
    """The lines that a command prints; none when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)  # noqa: S603  named by whoever runs this
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"{' '.join(command)}: {error}\n")
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Measure, in turn."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("file", type=Path)
    words.add_argument("--scripts", type=Path)
    words.add_argument("--peer-python")
    words.add_argument("--items", default=",".join(ITEMS))
    words.add_argument("--runs", type=int, default=5)
    given = words.parse_args()
    for turn in range(given.runs):
        for item in given.items.split(","):
            theirs, ours = ITEMS[item]
            commands = [[sys.executable, "-m", "p2pmoe", "bench", *ours.split(), "--json"]]
            if theirs and given.scripts and given.peer_python:
                script, *options = theirs.split()
                commands.insert(0, [given.peer_python, str(given.scripts / script), *options])
            for command in commands:
                lines = run(command)
                with given.file.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(json.loads(line))}\n" for line in lines)
                sys.stderr.write(f"turn {turn + 1}, {item}: {len(lines)} lines\n")


if __name__ == "__main__":
    main()
