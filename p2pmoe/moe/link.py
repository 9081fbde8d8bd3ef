"""The training thread's end of a grid: its manifest, the view of it, and the way across.

A link is shared by the layers of a grid and by their copies; like the swarm, it is not pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from p2pmoe.bridge import SLACK
from p2pmoe.dht.directory import MOST_CELLS
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.manifest import grid_of, specs_of
from p2pmoe.experts.messages import TensorSpec
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.alone import Alone
from p2pmoe.moe.calls import Ask, Crossing, Outcome, Tensors
from p2pmoe.moe.select import View
from p2pmoe.moe.service import MixtureService
from p2pmoe.swarm import Swarm


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A grid as its manifest describes it, and its experts as this process reaches them."""

    swarm: Swarm
    service: MixtureService
    grid: Grid
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return self

    def view(self, timeout: float, uid: str = "") -> View:
        """The experts that can be asked now, `uid` among them if it is given.

        Waits where there are none; `ExpertUnavailable` after `timeout` seconds.
        """
        view = self.service.view
        if uid in view.uids if uid else view.uids:
            return view
        return self.swarm.call(self.service.refilled, timeout, uid, timeout=timeout + SLACK)

    def search(self, scores: Sequence[torch.Tensor], width: int, timeout: float) -> View:
        """The same, once the best cells by these scores [T, M] of each dimension are in it.

        Only a grid that is too large to be watched whole is searched.
        """
        if self.grid.size > MOST_CELLS:
            rows = [list(row) for row in zip(*(part.tolist() for part in scores), strict=True)]
            search = self.service.search
            self.swarm.call(search, rows, width, timeout, timeout=timeout + SLACK)
        return self.view(timeout)

    def cross(self, crossing: Crossing) -> Outcome:
        """Send the parts, wait as long as the crossing says, and return what came back."""
        return self.swarm.call(self.service.cross, crossing, timeout=crossing.wait.timeout + SLACK)

    def ask(self, method: str, ask: Ask, seconds: float) -> Tensors:
        """Send one part alone; what it is answered, or its error, raised."""
        alone, desk = Alone(method, ask, seconds), self.service.desk
        self.swarm.call(desk.ask, alone, timeout=seconds + SLACK, desk=desk)
        try:
            return alone.tensors()
        except P2PMoEError as error:
            self.swarm.call(desk.regret, alone, error)
            raise

    def next_update(self) -> bytes:
        """An id for one update of one expert."""
        return self.swarm.next_update()


def open_link(swarm: Swarm, name: str, timeout: float) -> Link:
    """The link to a grid; `ExpertUnavailable` when nobody knows it after `timeout` seconds."""
    watch = swarm.watch(name, timeout=timeout)
    service = swarm.keep(
        ("mixture", name), lambda node: MixtureService(node, watch), timeout=timeout
    )
    manifest = swarm.call(service.manifest, timeout, timeout=timeout + SLACK)
    return Link(swarm, service, grid_of(manifest), *specs_of(manifest))
