"""Coverage, said before pytest's own closing line: the cores whole, of everything nearly all.

A plugin that `nox -s tests` loads when it runs all tests; a part of them covers only a part of the
code. What pytest-cov has gathered from its workers is judged here. The list of the cores is the one
that the floors check.
"""

from __future__ import annotations

import io
import tomllib
from collections.abc import Generator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parent.parent
CORES_PERCENT = 100.0  # of lines and branches: cores are pure, so it is cheap
TOTAL_PERCENT = 95.0  # of lines and branches; processes that the scenarios start do not count

_report = io.StringIO()


def cores() -> list[Path]:
    """The files of the cores."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if c["name"].startswith("A core ")]
    paths = [ROOT / name.replace(".", "/") for name in contract["source_modules"]]
    packages = [file for path in paths if path.is_dir() for file in path.glob("*.py")]
    return packages + [path.with_suffix(".py") for path in paths if not path.is_dir()]


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-cov, which writes what is read here
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    result = yield
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist
        return result
    measured = coverage.Coverage()
    measured.load()
    _report.write("All of it, processes of the scenarios aside:\n")
    total = measured.report(file=_report)
    _report.write("\nThe cores:\n")
    of_cores = measured.report(include=[str(path) for path in cores()], file=_report)
    if of_cores < CORES_PERCENT or total < TOTAL_PERCENT:
        _report.write(f"\ntoo little: the cores need {CORES_PERCENT} %, all {TOTAL_PERCENT} %\n")
        session.testsfailed += 1
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("coverage")
    terminalreporter.write(_report.getvalue())
