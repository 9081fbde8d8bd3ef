"""Processes on loopback, and what each of them says of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from p2pmoe.cli.asking import ask_members
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.node import NodeConfig, open_node
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from p2pmoe.wire.status import MemberRow
from tests.scenarios.conftest import Process

View = dict[str, MemberRow]  # by the hex id of the peer


def patience(seconds: float) -> float:
    """So many seconds of a machine that has time for its processes."""
    return seconds * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Observer:
    """Asks all processes whom they see."""

    processes: Sequence[Process]

    def views(self, of: Iterable[int] | None = None) -> list[View]:
        """What each process, or each of these, says now."""
        return trio.run(self._views, self._some(of))

    def wait(self, happened: Callable[[View], bool], of: Iterable[int] | None, within: float):
        """Wait until something is so in the views of all of these."""
        trio.run(self._wait, happened, self._some(of), within)

    def _some(self, of: Iterable[int] | None) -> list[Process]:
        return [self.processes[i] for i in (of if of is not None else range(len(self.processes)))]

    async def _views(self, processes: list[Process]) -> list[View]:
        async with open_node(NodeConfig(client_only=True, stop_within=0.5)) as node:
            with trio.fail_after(patience(20)):
                return [await _view(node, process) for process in processes]

    async def _wait(
        self, happened: Callable[[View], bool], processes: list[Process], within: float
    ) -> None:
        async with open_node(NodeConfig(client_only=True, stop_within=0.5)) as node:
            with trio.fail_after(within):
                for process in processes:
                    while not happened(await _view(node, process)):
                        await trio.sleep(0.05)


async def _view(node, process: Process) -> View:
    """What a process says; a machine that is busy may need some tries."""
    peer = PeerId(bytes.fromhex(str(process.ready["peer"])))
    contact = Contact(peer, (Address.parse(process.address),))
    while True:
        try:
            return {row.peer.hex(): row for row in await ask_members(node.pool, contact)}
        except P2PMoEError:
            await trio.sleep(0.2)
