"""Which waiting requests run together on a device. A core: `now` comes in, decisions go out.

A batch holds requests of one expert, of one kind and of one shape, never more rows than the
maximum. The oldest request of all whose expert is free is always in the next batch; the rest of
that batch is filled by the clients in turn, one request each, so that a busy client does not crowd
out the others. Requests that were cancelled, or whose deadline has passed, are never in a batch.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Container, Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar


class Kind(Enum):
    """What is to be done. A dry run computes gradients without an update."""

    FORWARD = "forward"
    BACKWARD = "backward"
    DRY_RUN = "dry_run"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingParams:
    """Bounds of one device's queue."""

    max_batch: int = 4096  # rows; the peer system's default is the same
    max_waiting: int = 8192  # requests of all clients; a guess
    max_waiting_of_client: int = 2048  # requests; a guess: 32 calls of 64 parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One request in the queue. `schema` is equal for requests that may be merged."""

    number: int  # never used again
    uid: str
    kind: Kind
    schema: Hashable
    rows: int
    client: Hashable
    arrived: float
    deadline: float = math.inf

    @property
    def group(self) -> Hashable:
        """Requests of one group may run together."""
        return self.uid, self.kind, self.schema


Request = TypeVar("Request", bound=Waiting)


_Clients = OrderedDict[Hashable, OrderedDict[int, Request]]  # by whose turn it is; by arrival


class Batching(Generic[Request]):
    """The queue in front of one device."""

    def __init__(self, params: BatchingParams) -> None:
        self.params = params
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by arrival
        self._groups: dict[Hashable, _Clients[Request]] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; entries of those gone are stale
        self._of_client: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> bool:
        """Take a request in; `False` when there is no room for it, or for this client's."""
        if not 0 < request.rows <= self.params.max_batch:
            raise ValueError(f"{request.rows} rows of at most {self.params.max_batch}")
        if request.number in self._waiting:
            raise ValueError(f"request {request.number} is waiting already")
        mine = self._of_client.get(request.client, 0)
        if len(self) >= self.params.max_waiting or mine >= self.params.max_waiting_of_client:
            return False
        self._waiting[request.number] = request
        self._of_client[request.client] = mine + 1
        clients = self._groups.setdefault(request.group, OrderedDict())
        clients.setdefault(request.client, OrderedDict())[request.number] = request
        if request.deadline < math.inf:
            heapq.heappush(self._deadlines, (request.deadline, request.number))
        return True

    def cancel(self, number: int) -> bool:
        """Forget a request; `False` when it is not waiting, because it ran or was dropped."""
        if number not in self._waiting:
            return False
        self._remove(self._waiting[number])
        if len(self._deadlines) > 2 * len(self) + 64:  # mostly stale: cancelling must not pile up
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)
        return True

    def waiting_for(self, uid: str) -> list[Request]:
        """The requests that wait for one expert, the oldest first."""
        return [request for request in self._waiting.values() if request.uid == uid]

    def tick(self, now: float) -> list[Request]:
        """Drop and return the requests whose deadline has passed."""
        dropped = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            if number in self._waiting:
                dropped.append(self._waiting[number])
                self._remove(dropped[-1])
        return dropped

    def next_deadline(self) -> float:
        """When `tick` has something to drop, unless that request is gone by then."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def next_batch(self, running: Container[str] = ()) -> list[Request]:
        """What to run now, removed from the queue; empty when nothing can. `tick` comes first.

        Experts in `running` are left out.
        """
        fit = (request for request in self._waiting.values() if request.uid not in running)
        oldest = next(fit, None)
        if oldest is None:
            return []
        batch, room = [oldest], self.params.max_batch - oldest.rows
        self._take(oldest)
        turns = list(self._groups.get(oldest.group, ()))
        while turns and room:
            again = []
            for client in turns:
                first = next(iter(self._groups[oldest.group][client].values()))
                if first.rows <= room:
                    batch.append(first)
                    room -= first.rows
                    if self._take(first):
                        again.append(client)
            turns = again
        return batch

    def _take(self, request: Request) -> bool:
        """Remove a request; its client's next turn comes last. Whether that client has more."""
        self._remove(request)
        clients = self._groups.get(request.group)
        if clients is None or request.client not in clients:
            return False
        clients.move_to_end(request.client)
        return True

    def _remove(self, request: Request) -> None:
        del self._waiting[request.number]
        clients = self._groups[request.group]
        del clients[request.client][request.number]
        if not clients[request.client]:
            del clients[request.client]
        if not clients:
            del self._groups[request.group]
        self._of_client[request.client] -= 1
        if not self._of_client[request.client]:
            del self._of_client[request.client]
