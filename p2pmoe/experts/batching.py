"""Which waiting requests run together on a device. A core: `now` comes in, decisions go out.

A batch holds requests of one expert, of one kind and of one shape, never more rows than the
maximum. Clients share the device by what their requests cost: the client that had least so far
begins the next batch, with the oldest of its requests whose expert is free, and the rest of that
batch is filled in the same order. Who is a whole batch ahead of the others waits, so that neither
many requests nor many experts get a client more than its share; who comes back after a while
begins where the others are. (Start-time fair queueing: Goyal, Vin, Cheng, SIGCOMM 1996.) Requests
that were cancelled, or whose deadline has passed, are never in a batch.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator, Set
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar


class Kind(Enum):
    """What is to be done. A dry run computes gradients without an update."""

    FORWARD = "forward"
    BACKWARD = "backward"
    DRY_RUN = "dry_run"

    __hash__ = object.__hash__  # there is one of each; an enum's own is a function in Python


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingParams:
    """Bounds of one device's queue."""

    max_batch: int = 4096  # rows; the peer system's default is the same
    max_waiting: int = 8192  # requests of all clients; a guess
    max_waiting_of_client: int = 2048  # requests; a guess: 32 calls of 64 parts
    start_rows: int = 32  # what it costs a client to begin a batch, in rows; a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One request in the queue. `schema` is equal for requests that may be merged.

    Experts of one `family` can be computed side by side; None is no family.
    """

    number: int  # never used again
    uid: str
    kind: Kind
    schema: Hashable
    rows: int
    client: Hashable
    arrived: float
    deadline: float = math.inf
    family: Hashable = None

    @property
    def group(self) -> Hashable:
        """Requests of one group may run together."""
        return self.uid, self.kind, self.schema

    def beside(self, other: Waiting) -> bool:
        """Whether another expert's batch with this request can run beside one with the other."""
        alike = (self.family, self.kind, self.schema) == (other.family, other.kind, other.schema)
        return alike and self.family is not None


Request = TypeVar("Request", bound=Waiting)


_Clients = dict[Hashable, OrderedDict[int, Request]]  # each client's by arrival


class Batching(Generic[Request]):
    """The queue in front of one device."""

    def __init__(self, params: BatchingParams) -> None:
        self.params = params
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by arrival
        self._groups: dict[Hashable, _Clients[Request]] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; entries of those gone are stale
        self._of_client: _Clients[Request] = {}
        self._had: dict[Hashable, float] = {}  # rows, of the clients above `_floor`
        self._floor = 0.0  # nobody counts as less; it rises by the mean of what clients get

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> bool:
        """Take a request in; `False` when there is no room for it, or for this client's."""
        if not 0 < request.rows <= self.params.max_batch:
            raise ValueError(f"{request.rows} rows of at most {self.params.max_batch}")
        if request.number in self._waiting:
            raise ValueError(f"request {request.number} is waiting already")
        mine = len(self._of_client.get(request.client, ()))
        if len(self) >= self.params.max_waiting or mine >= self.params.max_waiting_of_client:
            return False
        self._waiting[request.number] = request
        for clients in (self._of_client, self._groups.setdefault(request.group, {})):
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

    def next_wave(self, running: Set[str] = frozenset()) -> list[Request]:
        """What to run now: the next batch, and one of each expert that can run beside it.

        Another is begun while there are fewer rows in the wave than in the largest batch.
        """
        wave = batch = self.next_batch(running)
        rows = 0
        while batch and self._waiting and wave[0].family is not None:
            rows += sum(request.rows for request in batch)
            if rows >= self.params.max_batch:
                break
            running = running | {batch[0].uid}
            batch = self.next_batch(running, beside=wave[0])
            wave = wave + batch
        return wave

    def next_batch(
        self, running: Container[str] = (), *, beside: Request | None = None
    ) -> list[Request]:
        """What to run now, removed from the queue; empty when nothing can. `tick` comes first.

        Experts in `running` are left out, and all that cannot run `beside` another request.
        """
        if len(self._waiting) == 1:
            return self._only_one(running, beside)
        first = min(self._firsts(running, beside), key=self._turn, default=None)
        if first is None:
            return []
        clients_waiting = len(self._of_client)
        self._floor = self._share(first.client)
        self._charge(first.client, self.params.start_rows)
        batch, room = [first], self.params.max_batch - first.rows
        self._take(first)
        clients = self._groups.get(first.group, {})
        turns = [(*self._turn(one), one) for one in map(_oldest, clients.values())]
        heapq.heapify(turns)
        while turns and room:
            *_, one = heapq.heappop(turns)
            if one.rows <= room and self._share(one.client) <= self._floor + self._lead:
                batch.append(one)
                room -= one.rows
                self._take(one)
                if more := clients.get(one.client):
                    heapq.heappush(turns, (*self._turn(_oldest(more)), _oldest(more)))
        cost = self.params.start_rows + self.params.max_batch - room
        self._floor += cost / clients_waiting
        self._forget_those_behind()
        return batch

    def _only_one(self, running: Container[str], beside: Request | None) -> list[Request]:
        """The same when nothing needs an order: half the cost, each call of a quiet server."""
        (one,) = self._waiting.values()
        if not _fits(one, running, beside):
            return []
        self._remove(one)
        self._floor = self._share(one.client) + self.params.start_rows + one.rows
        self._forget_those_behind()
        return [one]

    def _forget_those_behind(self) -> None:
        self._had = {client: had for client, had in self._had.items() if had > self._floor}

    @property
    def _lead(self) -> int:
        """By how many rows a client may be ahead of the one that has had least."""
        return self.params.max_batch + self.params.start_rows

    def _firsts(self, running: Container[str], beside: Request | None) -> Iterator[Request]:
        """The oldest request of each client whose expert is free."""
        for mine in self._of_client.values():
            fit = (request for request in mine.values() if _fits(request, running, beside))
            yield from itertools.islice(fit, 1)

    def _share(self, client: Hashable) -> float:
        return max(self._floor, self._had.get(client, 0))

    def _charge(self, client: Hashable, rows: int) -> None:
        self._had[client] = self._share(client) + rows

    def _turn(self, request: Request) -> tuple[float, int]:
        """Whose turn it is: the client's that has had least, the oldest request's among equals."""
        return self._share(request.client), request.number

    def _take(self, request: Request) -> None:
        self._remove(request)
        self._charge(request.client, request.rows)

    def _remove(self, request: Request) -> None:
        del self._waiting[request.number]
        groups = self._groups[request.group]
        for clients in (self._of_client, groups):
            del clients[request.client][request.number]
            if not clients[request.client]:
                del clients[request.client]
        if not groups:
            del self._groups[request.group]


def _oldest(requests: OrderedDict[int, Request]) -> Request:
    return next(iter(requests.values()))


def _fits(request: Waiting, running: Container[str], beside: Waiting | None) -> bool:
    return request.uid not in running and (beside is None or request.beside(beside))
