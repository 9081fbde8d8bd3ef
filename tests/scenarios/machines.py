"""Machines that are network namespaces, on two switches with a cable between them.

Linux, as root. What is made here is gone when the block ends. Whoever may not do this skips.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000  # Linux, setns(2)
NET = "10.77.48"


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=10)


@dataclass(frozen=True)
class Machines:
    """Namespaces by number. The first `left` of them are on one switch, the rest on the other."""

    prefix: str
    count: int
    left: int

    def name(self, number: int) -> str:
        return f"{self.prefix}{number}"

    def address(self, number: int) -> str:
        return f"{NET}.{number + 1}"

    def inside(self, number: int) -> tuple[str, ...]:
        """What a command begins with that runs there."""
        return ("ip", "netns", "exec", self.name(number))

    def part(self) -> None:
        """The cable between the switches is out: nobody is told, nothing arrives."""
        run("ip", "-n", f"{self.prefix}sw", "link", "set", "trunk0", "down")

    def heal(self) -> None:
        run("ip", "-n", f"{self.prefix}sw", "link", "set", "trunk0", "up")

    def narrow(self, number: int, rate: str) -> None:
        """A machine's line carries so much, such as `1mbit`, each way."""
        shape = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        run(*self.inside(number), "tc", "qdisc", "replace", "dev", "eth0", *shape)
        switch = ("ip", "netns", "exec", f"{self.prefix}sw")
        run(*switch, "tc", "qdisc", "replace", "dev", f"port{number}", *shape)

    def lose(self, number: int, one_in: int) -> None:
        """Of what arrives at a machine, one packet in so many is lost, at random."""
        nft = (*self.inside(number), "nft")
        run(*nft, "add", "table", "inet", "loss")
        run(*nft, "add", "chain", "inet", "loss", "in", "{ type filter hook input priority 0; }")
        drop = ("numgen", "random", "mod", str(one_in), "==", "0", "drop")
        run(*nft, "add", "rule", "inet", "loss", "in", *drop)

    def enter(self, number: int) -> None:
        """This thread, and threads that it begins, are on that machine from now on."""
        with Path(f"/var/run/netns/{self.name(number)}").open() as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def machines(count: int, left: int) -> Iterator[Machines]:
    """So many machines that reach each other, `left` of them beyond the cable that may be out."""
    made = Machines(f"p2pf{os.getpid() % 10_000}-", count, left)
    switch, names = f"{made.prefix}sw", [made.name(number) for number in range(count)]
    if shutil.which("ip") is None:
        pytest.skip("reason: the command `ip` (iproute2) is not installed")
    try:
        for name in (switch, *names):
            run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"reason: network namespaces are not allowed here: {error.stderr!r}")
    try:
        _wire(made, switch)
        yield made
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _wire(made: Machines, switch: str) -> None:
    cable: Sequence[str] = ("type", "veth", "peer", "name")
    for bridge in ("bridge0", "bridge1"):
        run("ip", "-n", switch, "link", "add", bridge, "type", "bridge")
        run("ip", "-n", switch, "link", "set", bridge, "up")
    run("ip", "-n", switch, "link", "add", "trunk0", *cable, "trunk1")
    for end in (0, 1):
        run("ip", "-n", switch, "link", "set", f"trunk{end}", "master", f"bridge{end}", "up")
    for number in range(made.count):
        name, port = made.name(number), f"port{number}"
        run("ip", "-n", switch, "link", "add", port, *cable, "eth0", "netns", name)
        bridge = f"bridge{int(number >= made.left)}"
        run("ip", "-n", switch, "link", "set", port, "master", bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{made.address(number)}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
