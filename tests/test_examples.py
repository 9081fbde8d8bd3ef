"""What the pages say is true: their code runs, their commands exist, their tables match."""

from __future__ import annotations

import builtins
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

import p2pmoe
from p2pmoe import errors
from p2pmoe.cli.app import EXIT_CODES, INTERRUPTED, NOT_RUNNING, OK, USAGE
from p2pmoe.cli.verbs import VERBS, load_verb
from p2pmoe.nn import DMoE
from p2pmoe.testing import local_swarm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"^\$ p2pmoe (.+)$", re.MULTILINE)
GRID = "ffn.[0:8].[0:8]"


def page(name: str) -> str:
    return (ROOT / name).read_text()


def run_code(path: Path, names: dict[str, object]) -> None:
    """Run the Python blocks of a page one after another, in one namespace."""
    blocks = Sybil([PythonCodeBlockParser()], path=str(path.parent)).parse(path)
    blocks.namespace.update(names)
    for block in blocks.examples():
        block.evaluate()


def options(verb: str, *words: str) -> set[str]:
    """Every spelling of every option of a verb, or of what stands in a verb of several things."""
    command: click.Command = load_verb(verb)
    if words and isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words[0]) or command
    given = command.params
    return {name for param in given for name in (*param.opts, *param.secondary_opts)} | {"--help"}


@pytest.fixture
def swarm() -> Iterator[p2pmoe.Swarm]:
    cells = [f"ffn.{row}.{column}" for row in range(8) for column in (2, 5)]
    with (
        local_swarm(GRID, hidden_dim=512, cells=cells) as servers,
        p2pmoe.connect(servers.addresses) as swarm,
    ):
        yield swarm


# ------------------------------------------------------------------ Python
def test_the_tutorial_runs() -> None:
    run_code(ROOT / "docs" / "tutorial.md", {})


def test_the_guide_to_testing_runs() -> None:
    run_code(ROOT / "docs" / "testing.md", {})


def test_the_readme_trains(swarm: p2pmoe.Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p2pmoe, "connect", lambda _peers: swarm)
    loader = [(torch.randn(8, 64), torch.randint(10, (8,)))]
    run_code(ROOT / "README.md", {"loader": loader})


def test_the_guide_to_training_runs(swarm: p2pmoe.Swarm) -> None:
    run_code(ROOT / "docs" / "training.md", {"swarm": swarm, "torch": torch, "DMoE": DMoE})


# ------------------------------------------------------------------ the command line
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_that_a_page_shows_exists(path: Path) -> None:
    for line in CONSOLE.findall(path.read_text()):
        verb, *words = shlex.split(line, comments=True)
        assert verb in VERBS, line
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= options(verb, *words), line


def test_every_option_that_the_guide_to_serving_names_exists() -> None:
    known = set[str]().union(*map(options, VERBS))
    named = re.findall(r"`(--[a-z_-]+)", page("docs/serving.md"))
    assert {name.replace("_", "-") for name in named} <= known


def test_the_guide_lists_every_exit_code() -> None:
    table = page("docs/serving.md").partition("(exit-codes)=")[2].partition("\n#")[2]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    used = {code for _, code in EXIT_CODES} | {OK, USAGE, NOT_RUNNING, INTERRUPTED}
    assert used <= listed


def test_the_guide_to_training_tells_what_each_error_is() -> None:
    rows = re.findall(
        r"^\| `([A-Z]\w+)` \| (?:`(\w+)`)? *\|", page("docs/training.md"), re.MULTILINE
    )
    for name, builtin in rows:
        bases = [base.__name__ for base in getattr(errors, name).__mro__]
        wanted = builtin or "Exception"
        assert wanted == next(base for base in bases if hasattr(builtins, base)), name


def test_every_verb_says_what_it_does() -> None:
    for verb in VERBS:
        command = load_verb(verb)
        assert isinstance(command, click.Command)
        assert command.help
