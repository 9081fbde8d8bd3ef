"""The peer system and ours, in turn, on the same work: every ratio of `docs/performance.md`.

    python -m p2pmoe.bench.in_turn --peer-python PYTHON docs/performance.jsonl

`--peer-python` has hivemind 1.1.12; the peer's half is `docs/peer/hivemind_bench.py` of the
repository. In every turn each item is done by the peer, by us and, at the end, by the limit; there
are `--runs` turns. All lines go into the file. Without `--peer-python` the peer is left out. Then
`p2pmoe bench table docs/performance.jsonl docs/performance.md` makes the table. What fails is told
on standard error and left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

LIMIT = 900  # seconds of one run of one item; the peer's half ends itself a little earlier
PEER = Path(__file__).parents[2] / "docs/peer/hivemind_bench.py"  # has items of the same names
LIMITS = {"block", "limit"}  # items without a peer: their goals are shares of the limit
ITEMS = {  # item: what is asked for beside its name, of the peer and of ours
    "rpc": ("seconds=3 concurrency=1,16", "rpc --seconds 3 --concurrency 1,16"),
    "block": ("", "rpc --cls bench_ffn --seconds 3 --concurrency 1,16"),
    "moe64": ("", "moe --batches 64"),
    "moe512": ("", "moe --batches 512"),
    "dht16": ("", "dht --peers 16"),
    "dht64": ("keys=100", "dht --peers 64 --keys 100"),
    "memory": ("", "footprint"),
    "limit": ("", "local --seconds 3 --batches 2048"),
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--items", default=",".join(ITEMS))
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    for turn in range(given.runs):
        for item in given.items.split(","):
            theirs, ours = (words.split() for words in ITEMS[item])
            commands = [[sys.executable, "-m", "p2pmoe", "bench", *ours, "--json"]]
            if given.peer_python and item not in LIMITS:
                commands.insert(0, [given.peer_python, str(PEER), item, *theirs])
            for command in commands:
                lines = run(command)
                with given.file.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(json.loads(line))}\n" for line in lines)
                sys.stderr.write(f"turn {turn + 1}, {item}: {len(lines)} lines\n")


if __name__ == "__main__":
    main()
