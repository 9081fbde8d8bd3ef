"""Parts that are ready together are answered together, as far as their tensors allow."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2pmoe.errors import RemoteError
from p2pmoe.experts import answering
from p2pmoe.experts.answering import answers
from p2pmoe.experts.jobs import Done
from p2pmoe.experts.messages import Answer
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import split


def ready(*results: Any) -> list[Any]:
    made = [
        one if isinstance(one, RemoteError) else Done(one if isinstance(one, tuple) else (one,), 3)
        for one in results
    ]
    return [(SimpleNamespace(index=index), one) for index, one in enumerate(made)]


def said(*results: Any) -> list[list[int]]:
    """Which parts each answer is about, once its payload is as long as it says."""
    found = []
    for body, payload in answers(ready(*results)):
        answer = schema.decode(body, Answer)
        split(memoryview(b"".join(payload)), answer.tensors)
        found.append([part.index for part in answer.parts])
    return found


def test_parts_of_one_shape_have_one_answer_and_failures_one_more() -> None:
    rows = torch.randn(6, 4)
    assert said(rows[:2], RemoteError("no"), rows[2:], RemoteError("no")) == [[1, 3], [0, 2]]


def test_parts_of_other_shapes_have_answers_of_their_own() -> None:
    assert said(torch.ones(2, 4), torch.ones(2, 5), torch.ones(1, 4), ()) == [[0, 2], [1], [3]]


def test_parts_that_are_too_long_together_are_not_answered_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "MAX_TENSOR_BYTES", 500)
    parts = [torch.ones(1, 40), torch.ones(1, 40), torch.ones(9, 40), torch.ones(1, 40)]
    assert said(*parts) == [[0, 1], [2], [3]]
