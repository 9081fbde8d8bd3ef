"""Where options come from, and what is said of a file that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from p2pmoe.cli import settings
from p2pmoe.cli.settings import CONFIG_FILE, values_for
from p2pmoe.cli.units import DURATION
from p2pmoe.errors import ConfigurationError

FILE = Path("some.toml")


def options(*declared: click.Option) -> dict[str, click.Option]:
    return {option.opts[0].lstrip("-"): option for option in declared}


KNOWN = {
    "serve": options(
        click.Option(["--listen"]),
        click.Option(["--peer", "peers"], multiple=True),
        click.Option(["--stop-within"], type=DURATION),
        click.Option(["--experts"], type=click.IntRange(min=0)),
        click.Option(["--rate"], type=float),
        click.Option(["--client-only"], is_flag=True),
        click.Option(["--log-level"], type=click.Choice(["info", "debug"])),
    ),
    "ask": options(click.Option(["--peer"]), click.Option(["--seconds"], type=DURATION)),
}


def values(verb: str, **content: Any) -> dict[str, Any]:
    return values_for(verb, content, KNOWN, FILE)


def test_a_key_may_be_spelled_either_way_and_goes_to_its_parameter() -> None:
    assert values("serve", stop_within="5s") == {"stop_within": "5s"}
    assert values("serve", **{"stop-within": 5}) == {"stop_within": 5}
    assert values("serve", peer=["a:1", "b:2"]) == {"peers": ["a:1", "b:2"]}
    assert values("serve", peer="a:1") == {"peers": ["a:1"]}
    assert values("serve", experts=4, rate=1, client_only=True)["client_only"] is True


def test_a_key_of_another_verb_is_left_to_that_verb() -> None:
    assert values("serve", seconds="5s") == {}
    assert values("ask", peer="a:1", seconds="5s") == {"peer": "a:1", "seconds": "5s"}


def test_a_table_is_for_one_verb_and_outweighs_the_top_level() -> None:
    content: dict[str, Any] = {"serve": {"listen": "table"}, "listen": "top"}
    assert values_for("serve", content, KNOWN, FILE) == {"listen": "table"}
    assert values_for("ask", content, KNOWN, FILE) == {}


@pytest.mark.parametrize(
    ("content", "key", "hint"),
    [
        ({"lisen": "x"}, "lisen", "did you mean listen?"),
        ({"serve": {"lisen": "x"}}, "serve.lisen", "did you mean serve.listen?"),
        ({"serv": {"listen": "x"}}, "[serv]", "did you mean [serve]?"),
        ({"zzzzzz": 1}, "zzzzzz", "there is no"),
        ({"experts": "many"}, "experts", "is a integer range, not 'many'"),
        ({"experts": True}, "experts", "not True"),
        ({"experts": -1}, "experts", "-1"),
        ({"rate": "fast"}, "rate", "not 'fast'"),
        ({"listen": 4747}, "listen", "is a text, not 4747"),
        ({"client-only": "yes"}, "client-only", "is true or false, not 'yes'"),
        ({"stop-within": "5 parsecs"}, "stop-within", "is no duration"),
        ({"log-level": "loud"}, "log-level", "'loud'"),
        ({"peer": ["a:1", 5]}, "peer", "not 5"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_file_key_and_the_closest(
    content: dict[str, Any], key: str, hint: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        values_for("serve", content, KNOWN, FILE)
    assert str(refused.value).startswith("some.toml: ")
    assert key in str(refused.value)
    assert hint in str(refused.value)


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        settings.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("listen = ")
    with pytest.raises(ConfigurationError, match="is not TOML"):
        settings.load(tmp_path / "bad.toml")


def test_one_variable_moves_all_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("P2PMOE_HOME", str(tmp_path))
    assert settings.config_folder() == tmp_path
    assert settings.state_folder() == tmp_path / "state"


def test_folders_follow_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("P2PMOE_HOME", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert settings.config_folder() == tmp_path / "config" / "p2pmoe"
    assert settings.state_folder() == tmp_path / "state" / "p2pmoe"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> click.Command:
    """A verb that prints where its value came from, and a home with a configuration file."""
    from p2pmoe.cli import verbs

    @click.command("serve", cls=verbs.Verb)
    @click.option("--greeting", default="default")
    def serve(greeting: str) -> None:
        click.echo(greeting)

    monkeypatch.setattr(verbs, "VERBS", {"serve": "Greet."})
    monkeypatch.setattr(verbs, "load_verb", {"serve": serve}.__getitem__)
    monkeypatch.setenv("P2PMOE_HOME", str(tmp_path))
    monkeypatch.delenv("P2PMOE_CONFIG", raising=False)
    (tmp_path / CONFIG_FILE).write_text("greeting = 'file'")
    (tmp_path / "other.toml").write_text("greeting = 'other file'")
    return serve


def test_the_command_line_outweighs_the_environment_the_file_and_the_default(
    verb: click.Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    def says(*arguments: str) -> str:
        return CliRunner().invoke(verb, arguments, catch_exceptions=False).output.strip()

    monkeypatch.chdir(tmp_path)
    assert says() == "file"
    assert says("--config", "other.toml") == "other file"
    monkeypatch.setenv("P2PMOE_CONFIG", str(tmp_path / "other.toml"))
    assert says() == "other file"
    monkeypatch.setenv("P2PMOE_GREETING", "environment")
    assert says() == "environment"
    assert says("--greeting", "command line") == "command line"
    monkeypatch.delenv("P2PMOE_GREETING")
    monkeypatch.delenv("P2PMOE_CONFIG")
    monkeypatch.setenv("P2PMOE_HOME", str(tmp_path / "empty"))
    assert says() == "default", "a file of the current folder is not read unasked"
