"""Make a copy of the package with a bug in it: `python fuzz/plant.py NAME FOLDER`, or `--list`.

`planted/NAME.patch` says what is wrong, which harness must find it, and the change as a unified
diff. To show that a harness finds what it is there for, and to practise: FOLDER/fuzz/run.py is then
the runner of the copy.
"""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COPIED = ("p2pmoe", "fuzz", "protocols")


@dataclass(frozen=True)
class Bug:
    """A change for the worse: in `file`, the first text of each of `hunks` becomes the second."""

    name: str
    what: str
    harness: str
    file: str
    hunks: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Bug:
        head, _, diff = path.read_text().partition("--- ")
        what, harness = re.fullmatch(r"(.+)\nharness: (\w+)\n+", head, re.DOTALL).groups()
        first, *hunks = re.split(r"^@@ .*\n", diff, flags=re.MULTILINE)
        pairs = tuple((_side(hunk, " -"), _side(hunk, " +")) for hunk in hunks)
        return cls(path.stem, what, harness, first.splitlines()[0], pairs)

    def apply(self, root: Path) -> None:
        """Plant it in the package below `root`; `ValueError` if the lines are not there."""
        text = (root / self.file).read_text()
        for before, after in self.hunks:
            if text.count(before) != 1:
                raise ValueError(f"{self.name}: {self.file} has other lines than the patch says")
            text = text.replace(before, after)
        (root / self.file).write_text(text)


def _side(hunk: str, marks: str) -> str:
    """The lines of a hunk that have one of these marks."""
    lines = hunk.splitlines(keepends=True)
    return "".join(line[1:] for line in lines if line[0] in marks)


def bugs() -> dict[str, Bug]:
    """Every planted bug by its name."""
    return {path.stem: Bug.read(path) for path in sorted(HERE.glob("planted/*.patch"))}


def copy(folder: Path) -> Path:
    """The package, its harnesses and its vectors once more."""
    for name in COPIED:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HERE.parent / name, folder / name, ignore=skipped)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant a bug in a copy of p2pmoe.")
    parser.add_argument("name", nargs="?", choices=bugs())
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--list", action="store_true", help="print the bugs and stop")
    options = parser.parse_args()
    if options.list:
        for bug in bugs().values():
            print(f"{bug.name:28} {bug.harness:12} {bug.what}")
    elif options.folder is None:
        parser.error("name a bug, and a folder that does not exist yet")
    else:
        bug = bugs()[options.name]
        bug.apply(copy(options.folder))
        print(f"python {options.folder}/fuzz/run.py {bug.harness} --minutes 1")


if __name__ == "__main__":
    main()
