"""The group of verbs: what is loaded, which code the process exits with, what is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from p2pmoe import errors
from p2pmoe.cli import app, verbs
from p2pmoe.cli.verbs import VERBS, Verb
from p2pmoe.errors import P2PMoEError

LOADED = """
import sys
from p2pmoe.cli.app import run
assert run(sys.argv[1:]) == 0
heavy = {{"torch", "trio", "structlog", "cryptography", "msgspec", "cbor2", "numpy", "rich"}}
print("loaded:", sorted(heavy & set(sys.modules)))
""".replace("{{", "{").replace("}}", "}")

CODES = {
    "CallTimeout": 75,
    "PeerUnreachable": 69,
    "ConnectionLost": 69,
    "ExpertUnavailable": 75,
    "SchemaMismatch": 1,
    "NonFiniteError": 1,
    "RemoteError": 1,
    "NotAllowed": 77,
    "VersionMismatch": 76,
    "PeerBusy": 75,
    "LeaseLost": 75,
    "QuorumNotReached": 75,
    "RemoteProtocolError": 76,
    "MalformedMessage": 76,
    "LocalProtocolError": 1,
    "NodeClosed": 75,
    "ForkedProcessError": 1,
    "ConfigurationError": 78,
    "StateError": 73,
    "KeyFileError": 73,
    "AddressInUse": 98,
    "DuplicateIdentity": 4,
    "ExpertPaused": 75,
    "SnapshotRefused": 1,
}


def every_error(root: type[P2PMoEError] = P2PMoEError) -> set[type[P2PMoEError]]:
    below = {error for error in root.__subclasses__() if error.__module__ == errors.__name__}
    return below.union(*map(every_error, below))


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run a verb that raises an error; the exit code."""

    def run(error: BaseException) -> int:
        @click.command("version", cls=Verb)
        def fail() -> None:
            raise error

        monkeypatch.setattr(app, "load_verb", lambda name: fail)
        return app.run(["version"])

    return run


def test_every_error_of_the_tree_has_its_exit_code() -> None:
    assert {error.__name__ for error in every_error()} == set(CODES)
    for error in every_error():
        two = issubclass(error, errors.MalformedMessage | errors.SnapshotRefused)
        made = error("a.b", "why") if two else error("why")
        assert app.exit_code(made) == CODES[error.__name__]


def test_an_error_is_one_line_with_stage_and_address(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    error = errors.PeerUnreachable("refused\nthe dial", stage="connect", address="127.0.0.1:1")
    assert raising(error) == 69
    assert capsys.readouterr() == ("", "p2pmoe: connect 127.0.0.1:1: refused\\nthe dial\n")


def test_an_error_inside_groups_is_found(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    inner = BaseExceptionGroup("inner", [errors.AddressInUse("port 4747 is taken")])
    assert raising(BaseExceptionGroup("outer", [inner])) == 98
    assert capsys.readouterr().err == "p2pmoe: port 4747 is taken\n"
    assert raising(BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError()])) == 130


def test_an_interruption_is_no_error(raising: Callable[[BaseException], int]) -> None:
    assert raising(KeyboardInterrupt()) == 130


def test_a_bug_prints_a_traceback_without_values(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    local = "a value"
    assert raising(ZeroDivisionError("what happened")) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "what happened" in said
    assert local not in said


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["nod"], "did you mean 'node'?"),
        (["zzz"], "known are node, demo"),
        (["version", "--jsno"], "--json"),
        (["version", "surplus"], "surplus"),
        (["--zzz"], "--zzz"),
    ],
)
def test_a_wrong_call_is_one_line_and_names_the_closest(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("p2pmoe: ")
    assert said.count("\n") == 1
    assert hint in said


def test_a_bad_value_in_the_environment_is_a_bad_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("P2PMOE_STOP_WITHIN", "soon")
    assert app.run(["node"]) == 78
    assert capsys.readouterr().err.startswith("p2pmoe: P2PMOE_STOP_WITHIN: ")


def test_a_bad_configuration_file_is_named(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["node", "--config", f"{tmp_path}/none.toml"]) == 78
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_loads_nothing_heavy(verb: str) -> None:
    words = [word for word in (verb, "--help") if word]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_of_the_table_exists_and_every_option_says_what_it_is(name: str) -> None:
    verb = verbs.load_verb(name)
    assert verb.name == name
    assert verb.help
    assert all(option.help for option in verb.options.values())


def test_both_spellings_of_an_option_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["node", "--log_level", "zzz"]) == 2
    assert "--log-level" in capsys.readouterr().err
