"""The README's form for two machines, between two network namespaces of this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.conftest import Launcher

README = Path(__file__).parents[2] / "README.md"
A, B = f"p2pmoe-{os.getpid()}-a", f"p2pmoe-{os.getpid()}-b"  # so that two runs do not meet
ADDRESSES = {A: "10.77.47.1", B: "10.77.47.2"}


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=10)


def inside(name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name)


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two namespaces with a cable between them: name -> address."""
    if shutil.which("ip") is None:
        pytest.skip("reason: the command `ip` (iproute2) is not installed")
    try:
        for name in ADDRESSES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"reason: network namespaces are not allowed here: {error.stderr!r}")
    try:
        ip("link", "add", "veth-a", "netns", A, "type", "veth",
           "peer", "name", "veth-b", "netns", B)  # fmt: skip
        for name, address in ADDRESSES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"veth-{name[-1]}")
            ip("-n", name, "link", "set", f"veth-{name[-1]}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield ADDRESSES
    finally:
        for name in ADDRESSES:
            ip("netns", "delete", name)


def readme_commands() -> list[list[str]]:
    """The two `p2pmoe node` commands of the README, as words without the program's name."""
    lines = re.findall(r"^\$ p2pmoe (node .*)$", README.read_text(), flags=re.MULTILINE)
    assert len(lines) >= 2
    return [shlex.split(line) for line in lines[:2]]


def test_the_form_for_two_machines_works_between_two_namespaces(
    machines: dict[str, str], launch: Launcher
) -> None:
    first_command, second_command = readme_commands()
    quiet = ("--log-format", "json")
    first = launch.start(*first_command, *quiet, prefix=inside(A)).wait_ready()
    assert first.address.startswith(f"{machines[A]}:4747")

    at = second_command.index("--peer") + 1
    second_command[at] = f"{first.address}/{str(first.ready['peer'])[:32]}"
    second = launch.start(*second_command, *quiet, prefix=inside(B)).wait_ready()
    assert second.address.startswith(f"{machines[B]}:4747")
    assert len(second.ready["experts"]) == len(first.ready["experts"]) == 16
    assert not set(second.ready["experts"]) & set(first.ready["experts"])

    uid = second.ready["experts"][0]
    call = launch.start(
        *("call", uid, "--peer", first.address, "--backward", "--json"), prefix=inside(A)
    )
    answer, _ = call.popen.communicate(timeout=60)
    assert call.popen.returncode == 0, call.log.read_text()
    assert json.loads(answer)["uid"] == uid
