"""How much of what strangers reach do the harnesses reach: `python fuzz/reach.py [FOLDER ...]`.

Replays what the harnesses begin with under coverage, and prints the share of the branches of
`wire/` and of all messages.py that were taken. FOLDERs hold inputs that a run has found, each
named for its harness: FOLDER/NAME/*.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

import coverage

ROOT = Path(__file__).parent.parent
WATCHED = ["p2pmoe/wire/*.py", "p2pmoe/*/messages.py"]
PERCENT = 95.0  # of branches


def replay(folders: list[Path]) -> None:
    from fuzz import run, seeds  # under coverage, and so what they import

    for name in run.names():
        fuzz_one = importlib.import_module(f"fuzz.fuzz_{name}").fuzz_one
        found = [path for folder in folders for path in sorted((folder / name).glob("*"))]
        for data in (b"", *seeds.seeds(name), *(path.read_bytes() for path in found)):
            fuzz_one(data)


def branches(folders: list[Path]) -> dict[str, tuple[int, int, list[list[int]]]]:
    """Of each file: branches taken, all branches, and those that were not taken, by line."""
    watched = [str(ROOT / pattern) for pattern in WATCHED]
    measured = coverage.Coverage(branch=True, include=watched, data_file=None, config_file=False)
    with measured.collect():
        replay(folders)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        measured.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    return {
        name: (
            file["summary"]["covered_branches"],
            file["summary"]["num_branches"],
            file["missing_branches"],
        )
        for name, file in files.items()
    }


def main() -> None:
    files = branches([Path(folder) for folder in sys.argv[1:]])
    for name, (taken, there, missing) in files.items():
        print(f"{name:32} {taken:4} of {there:4} branches", *missing)
    taken, there = (sum(file[at] for file in files.values()) for at in (0, 1))
    print(f"{100 * taken / there:.1f} % of {there} branches; {PERCENT} % are asked for")
    sys.exit(taken / there < PERCENT / 100)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
