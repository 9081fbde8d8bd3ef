"""A part that a thread asks for alone, and waits for; it may travel with parts of other threads.

Its tensors are made and read in the thread that asks: torch gives up the interpreter's lock at each
step, and Trio's thread would wait for it behind every thread that trains.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from p2pmoe.errors import ConnectionLost, NonFiniteError, P2PMoEError
from p2pmoe.experts.messages import BACKWARD, Answer
from p2pmoe.experts.tensors import all_finite, describe, from_wire, to_wire
from p2pmoe.moe.calls import Ask, Tensors, body_of, check_shape
from p2pmoe.wire.tensor import TensorDescriptor, join_pieces, split


class Alone:
    """What is asked, for how many seconds, and where its answer stands once it has come."""

    __slots__ = (
        "_came",
        "_described",
        "_views",
        "ask",
        "began",
        "deadline",
        "key",
        "kind",
        "method",
        "nbytes",
        "repeated",
        "rows",
        "seconds",
        "step",
    )

    def __init__(self, method: str, ask: Ask, seconds: float) -> None:
        given = (*ask.inputs, *ask.grads)
        self.method, self.ask, self.seconds = method, ask, seconds
        self._described = tuple(map(describe, given))
        self._views = tuple(map(to_wire, given))
        self.rows = self._described[0].shape[0]
        self.key = ask.peer, ask.uid
        self.nbytes = sum(map(len, self._views))
        looks = tuple((one.dtype, *one.shape[1:]) for one in self._described)
        self.kind: Hashable = (ask.peer, method, ask.dry_run, looks)  # what travels together
        self.began = self.deadline = math.inf  # by Trio's clock, once it was begun
        self.repeated = False  # whether its answer was lost, and it is asked once more
        self.step = 0  # updates that its expert has had, when it has answered
        self._came: tuple[Answer, memoryview, int, int] | None = None

    def may_repeat(self, error: P2PMoEError) -> bool:
        """Whether it is to be asked once more after this error. Says so once."""
        lost = self.method == BACKWARD and isinstance(error, ConnectionLost)
        self.repeated, repeats = lost or self.repeated, lost and not self.repeated
        return repeats

    def take(self, answer: Answer, payload: memoryview, before: int, rows: int) -> None:
        """Its answer has come, with so many `rows`, of which so many stand `before` its own."""
        self._came = answer, payload, before, rows

    def tensors(self) -> Tensors:
        """Those of the answer; `MalformedMessage` or `NonFiniteError` where they are none."""
        assert self._came is not None
        answer, payload, before, rows = self._came
        check_shape(self.ask.answer, answer, rows)
        views = split(payload, answer.tensors)
        if rows != self.rows:
            cut = slice(before, before + self.rows)
            views = [_rows_of(view, rows, cut) for view in views]
        described = _with_rows(answer.tensors, self.rows)
        tensors = tuple(map(from_wire, described, views))
        if not all(map(all_finite, tensors)):
            raise NonFiniteError(f"{self.ask.uid} answered with NaN or infinity")
        return tensors

    @staticmethod
    def request(parts: Sequence[Alone]) -> tuple[bytes, list[memoryview]]:
        """The body and the payload of one call for parts of one kind.

        The payload of several is a copy: who gives up may write to its tensors, and others wait.
        """
        described = _with_rows(parts[0]._described, sum(part.rows for part in parts))
        columns = list(zip(*(part._views for part in parts), strict=True))
        payload = join_pieces(described, columns)
        if len(parts) > 1:
            payload = [memoryview(b"".join(payload))]
        return body_of([part.ask for part in parts], described), payload


def _rows_of(view: memoryview, rows: int, cut: slice) -> memoryview:
    size = len(view) // rows
    return view[cut.start * size : cut.stop * size]


def _with_rows(described: tuple[TensorDescriptor, ...], rows: int) -> tuple[TensorDescriptor, ...]:
    """The same tensors with so many rows."""
    if all(one.shape[:1] == (rows,) for one in described):
        return described
    return tuple(
        TensorDescriptor(dtype=one.dtype, shape=(rows, *one.shape[1:]), codec=one.codec)
        for one in described
    )
