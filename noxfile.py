"""The tasks of this repository: `nox -s demo`, `nox -s tests`, and what keeps the house in order.

Rules: what a session needs, it installs, at the versions that `.ci/constraints.txt` pins. Sessions
that need torch share one environment, so that it is installed once; the others have a small one of
their own. Arguments after `--` go to the program that the session runs.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import nox

LOCK = Path(".ci/constraints.txt")
TORCH = "torch==2.13.0"  # the release that the development machines have as a CPU build
SHARED = Path(f".nox/shared-{sys.version_info.major}.{sys.version_info.minor}")

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"  # comes with nox; needs no ensurepip, unlike venv
nox.options.sessions = ["lint", "types", "floors", "tests"]


def shared(session: nox.Session, extra: str, *command: str) -> None:
    """Run the shared environment's Python, with the package and this extra installed."""
    wanted = hashlib.sha256(Path("pyproject.toml").read_bytes() + LOCK.read_bytes()).hexdigest()
    stamp = SHARED / f"{extra}.sha256"
    python = str(SHARED / "bin" / "python")
    if not stamp.exists() or stamp.read_text() != wanted:
        if not Path(python).exists():
            session.run(sys.executable, "-m", "virtualenv", "-q", str(SHARED), external=True)
        install = [python, "-m", "pip", "install", "-q", "-c", str(LOCK), "-e", f".[{extra}]"]
        session.run(*install, external=True)
        stamp.write_text(wanted)
    session.run(python, *command, external=True)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train a mixture of experts over a swarm of processes, and kill one of them."""
    shared(session, "demo", "-m", "p2pmoe", "demo", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests; without arguments all, two at a time, with the coverage the house asks for."""
    if session.posargs:
        shared(session, "dev", "-m", "pytest", *session.posargs)
    else:
        measured = ["--cov", "--cov-report=", "-p", "tests.coverage_gate"]
        shared(session, "dev", "-m", "pytest", "-n", "2", "--dist", "loadgroup", *measured)


@nox.session(venv_backend="none")
def soak(session: nox.Session) -> None:
    """Run the long profiles that the ordinary tests leave out."""
    shared(session, "dev,fuzz", "-m", "pytest", "-m", "soak", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure how near the machine's own limits are, and what changed; `-- --update` keeps it."""
    baseline = ["bench", "baseline", ".ci/bench.json", *session.posargs]
    shared(session, "dev", "-m", "p2pmoe", *baseline)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types, strictly."""
    shared(session, "dev", "-m", "mypy", *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    shared(session, "docs", "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "docs/_build/html")


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Fuzz one parser, as in `-- cbor --minutes 5`; without its name each of them as long."""
    harnesses = sorted(path.stem.removeprefix("fuzz_") for path in Path("fuzz").glob("fuzz_*.py"))
    options = list(session.posargs)
    names = [options.pop(0)] if options and not options[0].startswith("-") else harnesses
    for name in names:
        shared(session, "fuzz", "fuzz/run.py", name, *options)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("-q", "-c", str(LOCK), "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(reuse_venv=True)
def floors(session: nox.Session) -> None:
    """Check that a room imports only rooms on lower floors."""
    session.install("-q", "-c", str(LOCK), "import-linter")
    session.run("lint-imports", env={"PYTHONPATH": "."})


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Write `.ci/constraints.txt` anew from what an unpinned installation takes today."""
    session.install(TORCH, "-e", ".[dev,docs,fuzz]")
    frozen = session.run("python", "-m", "pip", "freeze", "--exclude-editable", silent=True)
    pins = re.findall(r"^[\w.-]+==[^+\s]+", str(frozen), re.MULTILINE)  # no local labels: any build
    head = "# The versions that CI and contributors install; written by `nox -s lock`.\n"
    LOCK.write_text(head + "\n".join(sorted(pins, key=str.lower)) + "\n")
