"""What an operator sees when something is wrong: one line, and the exit code that is documented."""

from __future__ import annotations

import socket

import pytest

from tests.scenarios.conftest import Launcher


def only_line(text: str) -> str:
    """The one line of an error that begins with the program's name; there is no second one."""
    lines = [line for line in text.splitlines() if line.startswith("p2pmoe: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@pytest.fixture
def taken_port() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_unknown_option_names_the_closest(launch: Launcher) -> None:
    result = launch.run("node", "--lisen", "127.0.0.1:0")
    assert result.returncode == 2
    assert "--listen" in result.stderr


def test_a_grid_that_does_not_parse_is_a_bad_configuration(launch: Launcher) -> None:
    result = launch.run("node", "--new-swarm", "--grid", "ffn.[0:", "--listen", "127.0.0.1:0")
    assert result.returncode == 78
    assert "ffn.[0:" in only_line(result.stderr)


def test_a_port_in_use_is_named(launch: Launcher, taken_port: int) -> None:
    result = launch.run("node", "--new-swarm", "--listen", f"127.0.0.1:{taken_port}")
    assert result.returncode == 98
    assert str(taken_port) in only_line(result.stderr)


def test_a_peer_that_cannot_be_reached_is_one_line(launch: Launcher, closed_port: int) -> None:
    result = launch.run("node", "--peer", f"127.0.0.1:{closed_port}", "--listen", "127.0.0.1:0")
    assert result.returncode == 69
    line = only_line(result.stderr)
    assert "connect" in line
    assert f"127.0.0.1:{closed_port}" in line


def test_status_of_a_peer_that_cannot_be_reached_is_one_line(
    launch: Launcher, closed_port: int
) -> None:
    result = launch.run("status", "--peer", f"127.0.0.1:{closed_port}")
    assert result.returncode == 69
    assert f"127.0.0.1:{closed_port}" in only_line(result.stderr)


def test_a_key_file_that_is_not_a_key_is_refused(launch: Launcher) -> None:
    state = launch.folder / "state"
    state.mkdir()
    (state / "key.pem").write_text("no key at all")
    result = launch.run("node", "--new-swarm", "--listen", "127.0.0.1:0", "--state-dir", str(state))
    assert result.returncode == 73
    assert "key.pem" in only_line(result.stderr)


def test_a_state_folder_in_use_and_a_contradicted_manifest_are_refused(launch: Launcher) -> None:
    state = str(launch.folder / "state")
    first = launch.node(
        *("--new-swarm", "--grid", "ffn.[0:2].[0:2]", "--hidden-dim", "8"),
        *("--experts", "2", "--state-dir", state),
    ).wait_ready()

    same_folder = launch.run("node", "--state-dir", state, "--listen", "127.0.0.1:0")
    assert same_folder.returncode == 73
    assert "in use" in only_line(same_folder.stderr)

    other_grid = launch.run(
        *("node", "--peer", first.address, "--listen", "127.0.0.1:0"),
        *("--grid", "ffn.[0:4].[0:4]", "--experts", "1"),
    )
    assert other_grid.returncode == 78
    assert "ffn" in only_line(other_grid.stderr)
