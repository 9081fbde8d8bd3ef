"""The harnesses find what they are there for: bugs that are planted in copies of the package.

A bug is a patch in `fuzz/planted/`. That all of them still apply is checked always; that each is
found within a minute, and nothing where there is none, in the soak profile, which needs atheris.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuzz import plant, run

ROOT = Path(__file__).parent.parent
BUGS = plant.bugs()
HARNESSES = sorted({bug.harness for bug in BUGS.values()})
SECONDS = 60  # in which a planted bug is found


def fuzzed(root: Path, harness: str, seconds: float) -> tuple[subprocess.CompletedProcess, float]:
    """Run a harness of the copy at `root`, which has not failed yet."""
    program = [sys.executable, str(root / "fuzz" / "run.py"), harness]
    limits = ["--minutes", str(seconds / 60), "--work", str(root / "work")]
    begun = time.monotonic()
    done = subprocess.run([*program, *limits], capture_output=True, text=True, check=False)
    return done, time.monotonic() - begun


def test_there_are_many_bugs_for_many_harnesses():
    assert len(BUGS) >= 20
    assert set(HARNESSES) <= set(run.names())
    assert len(HARNESSES) >= 12


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_still_applies_and_is_python(bug, tmp_path):
    file = tmp_path / bug.file
    file.parent.mkdir(parents=True)
    before = (ROOT / bug.file).read_text()
    file.write_text(before)
    bug.apply(tmp_path)
    assert file.read_text() != before
    assert ast.parse(file.read_text())
    with pytest.raises(ValueError, match="other lines"):
        bug.apply(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_found_within_a_minute(bug, tmp_path, record_property):
    bug.apply(plant.copy(tmp_path))
    done, took = fuzzed(tmp_path, bug.harness, SECONDS)
    record_property("seconds", round(took, 1))
    assert "Uncaught Python exception" in done.stdout, done.stdout[-3000:]
    assert done.returncode
    assert list((tmp_path / "work" / "failing").iterdir())
    assert took < SECONDS + 5


@pytest.mark.soak
@pytest.mark.parametrize("harness", HARNESSES)
def test_nothing_is_found_in_a_minute_where_no_bug_is(harness, tmp_path):
    done, _ = fuzzed(plant.copy(tmp_path), harness, SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "work" / "failing").iterdir()) == []
