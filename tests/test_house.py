"""The house's own rules: budgets, who may do what, what an import costs, and the mirror.

Floors are checked by import-linter (`nox -s floors`); style by ruff, types by mypy. What is here is
what those three cannot say. A rule reads the source through `ast`, never by running it.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pmoe.cli.verbs import VERBS
from tests.coverage_gate import ROOT, cores

PACKAGE = ROOT / "p2pmoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
WRITTEN = [
    path
    for folder in ("p2pmoe", "tests", "fuzz", "docs", "protocols")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".md", ".cddl"} and "_build" not in path.parts
] + [ROOT / name for name in ("README.md", "noxfile.py", "pyproject.toml")]

FILE_LINES = 400
CLASS_LINES = 300
FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 10
PARAMETERS = 6  # beyond that, a frozen params struct
INHERITANCE_LEVELS = 2
FACE_NAMES = 25
HELP_SECONDS = 0.2  # what `--help` may take on a quiet machine
SLACK = 5.0  # how much slower a busy one may be

# Beside every service.py: who may have work done in another thread.
THREADS = {"dht/keeping.py", "experts/compute.py", "experts/snapshot.py", "bridge.py", "swarm.py"}
NEVER_IMPORTED = {"asyncio", "multiprocessing", "trio_typing", "marshal", "shelve"}
NEVER_USED = {"spawn_system_task", "torch.load", "os.fork", "np.load", "numpy.load"}
FORKS = {"bench/dht_peer.py": {"os.fork"}}  # before any loop or thread, as the peers it measures by
SPEAKING = sorted(
    path.name
    for path in PACKAGE.iterdir()
    if path.name == "wire" or (path / "messages.py").exists()
)


def name(path: Path) -> str:
    """How a failure names a file."""
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def classes(path: Path) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def imported(path: Path) -> set[str]:
    """The modules that a file names in an import, for type checking or not."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(path: Path) -> set[str]:
    """Every dotted name that a file uses, such as `torch.load`, and every bare one."""
    return {
        ast.unparse(node)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute | ast.Name)
    }


def run(code: str) -> set[str]:
    """What the top-level modules outside the standard library are after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n' + ' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = {module.partition(".")[0] for module in done.stdout.splitlines()[-1].split()}
    return {module for module in loaded - sys.stdlib_module_names if not module.startswith("_")}


HELP = """
import sys
from p2pmoe.__main__ import main
sys.argv = {argv!r}
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
"""


# ------------------------------------------------------------------ budgets
def test_no_file_is_longer_than_its_budget() -> None:
    long = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {file: lines for file, lines in long.items() if lines > FILE_LINES} == {}


def test_no_class_is_longer_than_its_budget() -> None:
    long = [
        (name(path), node.name, length(node))
        for path in SOURCES
        for node in classes(path)
        if length(node) > CLASS_LINES
    ]
    assert long == []


def test_functions_are_short_and_most_are_very_short() -> None:
    lengths = {
        (name(path), function.name, function.lineno): length(function)
        for path in SOURCES
        for function in functions(path)
    }
    assert {where: lines for where, lines in lengths.items() if lines > FUNCTION_LINES} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION_LINES


def test_no_function_takes_more_parameters_than_its_budget() -> None:
    many = []
    for path in SOURCES:
        for function in functions(path):
            given = function.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            if len([n for n in names if n not in {"self", "cls", "task_status"}]) > PARAMETERS:
                many.append((name(path), function.name, names))
    assert many == []


def test_inheritance_is_two_levels_deep_at_most() -> None:
    bases = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for path in SOURCES
        for node in classes(path)
    }

    def levels(class_name: str) -> int:
        above = [levels(base) + 1 for base in bases[class_name] if base in bases]
        return max(above, default=0)

    assert {each: levels(each) for each in bases if levels(each) > INHERITANCE_LEVELS} == {}


@pytest.mark.parametrize("face", ["p2pmoe", "p2pmoe.nn", "p2pmoe.testing"])
def test_a_face_has_few_names_and_each_exists(face: str) -> None:
    module = __import__(face, fromlist=["*"])
    assert len(module.__all__) <= FACE_NAMES
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def test_inner_packages_have_empty_init_files() -> None:
    faces = {PACKAGE / "__init__.py", PACKAGE / "testing" / "__init__.py"}
    inner = [path for path in PACKAGE.rglob("__init__.py") if path not in faces]
    assert [name(path) for path in inner if path.read_text()] == []


# ------------------------------------------------------------------ who may do what
def test_a_core_asks_nobody_for_the_time_or_for_chance() -> None:
    forbidden = {"trio", "torch", "time", "logging", "structlog", "p2pmoe.telemetry"}
    for path in cores():
        assert path.exists(), name(path)
        assert imported(path) & forbidden == set(), name(path)
        dice = {use for use in dotted(path) if use.startswith("random.")}
        assert dice <= {"random.Random"}, f"{name(path)}: the caller passes the dice in"
        called = {ast.unparse(n.func) for n in ast.walk(tree(path)) if isinstance(n, ast.Call)}
        assert "random.Random" not in called, name(path)
        assert not any(isinstance(node, ast.Await) for node in ast.walk(tree(path))), name(path)


def test_foreign_threads_are_entered_in_the_listed_files_only() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if any(".to_thread" in use or ".from_thread" in use for use in dotted(path))
    }
    assert {path for path in users if not path.endswith("/service.py")} <= THREADS


def test_nobody_uses_what_the_house_does_without() -> None:
    for path in [*SOURCES, *TESTS]:
        tops = {module.partition(".")[0] for module in imported(path)}
        assert tops & NEVER_IMPORTED == set(), name(path)
    for path in SOURCES:
        uses = dotted(path)
        allowed = FORKS.get(path.relative_to(PACKAGE).as_posix(), set())
        assert {use for use in uses if use.endswith(tuple(NEVER_USED))} == allowed, name(path)
        assert not {use for use in imported(path) | uses if use.startswith("pickle")}, name(path)


def test_a_nursery_is_named_for_what_its_children_do() -> None:
    for path in [*SOURCES, *TESTS]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.AsyncWith):
                for item in node.items:
                    if "open_nursery" in ast.unparse(item.context_expr) and item.optional_vars:
                        chosen = ast.unparse(item.optional_vars)
                        assert chosen not in {"nursery", "n", "tg"}, f"{name(path)}:{node.lineno}"


def test_whoever_catches_everything_says_why_or_raises_it_again() -> None:
    for path in [*SOURCES, *TESTS]:
        lines = path.read_text().splitlines()
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler) or node.type is None:
                continue
            caught = re.findall(r"\b(?:Base)?Exception\b", ast.unparse(node.type))
            passed_on = isinstance(node.body[-1], ast.Raise)
            reason = re.search(r"#.*[a-z] [a-z]", lines[node.lineno - 1])
            assert not caught or passed_on or reason, f"{name(path)}:{node.lineno}"


def test_every_exception_from_a_rule_has_its_reason_beside_it() -> None:
    excuse = re.compile(r"# (?:ruff: )?(?:noqa|type: ignore)\b:?[A-Z0-9, ]*(?:\[[a-z, -]+\])?(.*)")
    for path in [*SOURCES, *TESTS, ROOT / "noxfile.py"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for reason in excuse.findall(line):
                said = re.search(r"[a-z]{2}", reason) or "re.compile" in line
                assert said, f"{name(path)}:{number}: write `# noqa: X001  the reason`"


def test_every_file_opens_by_saying_what_it_is() -> None:
    silent = [p for p in [*SOURCES, *TESTS] if p.read_text() and not ast.get_docstring(tree(p))]
    assert [name(path) for path in silent] == []


def test_nothing_is_left_for_later() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|NotImplemented(Error)?)\b")
    left = [
        f"{name(path)}:{number}"
        for path in WRITTEN
        if path.name != "test_house.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unfinished.search(line) and "return NotImplemented" not in line
    ]
    assert left == []


# ------------------------------------------------------------------ tests
def test_every_test_is_named_by_a_sentence() -> None:
    short = [
        (name(path), function.name)
        for path in TESTS
        for function in functions(path)
        if function.name.startswith("test_") and len(function.name.split("_")) < 4
    ]
    assert short == []


def test_no_test_waits_for_real_time_to_pass() -> None:
    for path in TESTS:
        uses = dotted(path)
        assert "time.sleep" not in uses, name(path)
        if "trio.sleep" in uses and path.name.startswith("test_"):
            text = path.read_text()
            assert "autojump_clock" in text or "MockClock" in text, f"{name(path)}: virtual time"


def test_every_core_has_its_tests_but_for_what_another_core_is_made_of() -> None:
    inner = set[str]().union(*map(imported, cores()))
    missing = [
        name(path)
        for path in cores()
        if path.name != "__init__.py"
        and ".".join(path.relative_to(ROOT).with_suffix("").parts) not in inner
        and not list((ROOT / "tests" / path.parent.name).glob(f"test_{path.stem}*.py"))
    ]
    assert missing == []


def test_every_package_that_speaks_is_mirrored() -> None:
    for package in SPEAKING:
        protocol = ROOT / "protocols" / package
        assert (protocol / "spec.md").exists()
        assert (protocol / "schema.cddl").exists()
        assert list((protocol / "vectors").glob("*.json"))
        assert (ROOT / "tests" / package).is_dir()
        assert (ROOT / "docs" / "specification" / f"{package}.md").exists()


# ------------------------------------------------------------------ what an import costs
def test_importing_the_package_loads_neither_torch_nor_trio() -> None:
    assert run("import p2pmoe") == {"p2pmoe"}


def test_connecting_needs_no_torch() -> None:
    assert "torch" not in run("from p2pmoe import connect, open_node")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_loads_click_alone(verb: str) -> None:
    argv = [word for word in ("p2pmoe", verb, "--help") if word]
    assert run(HELP.format(argv=argv)) <= {"p2pmoe", "click"}


def test_help_comes_at_once() -> None:
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "p2pmoe", "--help"], check=True, capture_output=True, cwd=ROOT
        )
        took.append(time.perf_counter() - begun)
    assert min(took) < HELP_SECONDS * SLACK


# ------------------------------------------------------------------ what is installed
def test_every_requirement_is_pinned_by_the_lock_and_the_lock_fits_any_machine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = {
        re.split(r"[\[<>=;\s]", requirement)[0].lower()
        for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]
    }
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert needed - {"p2pmoe"} - set(pins) == set()
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())
