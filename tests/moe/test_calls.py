"""Requests carry what their parts say, and an answer that is not what was asked for is refused."""

from dataclasses import replace

import pytest
import torch

from p2pmoe.errors import MalformedMessage, NonFiniteError, RemoteError, SchemaMismatch
from p2pmoe.experts.messages import (
    Answer,
    BackwardRequest,
    ForwardRequest,
    PartReply,
    TensorSpec,
)
from p2pmoe.experts.tensors import from_wire, rows_to_wire
from p2pmoe.identity import PeerId
from p2pmoe.moe.calls import Ask, read_answer, request, spec_of
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import split
from tests.moe.fakes import done

ROW = TensorSpec(dtype="float32", shape=(3,))


def ask(uid: str, rows: int, **more: object) -> Ask:
    return Ask(PeerId(bytes(32)), uid, 9, (torch.randn(rows, 3),), (ROW,), **more)


def answer(*tensors: torch.Tensor, parts: int = 1) -> tuple[Answer, memoryview]:
    described, payload = rows_to_wire([(one,) for one in tensors])
    replies = tuple(done(index) for index in range(parts))
    return Answer(parts=replies, tensors=described), memoryview(bytearray(b"".join(payload)))


def failed(code: str, index: int = 0) -> Answer:
    return Answer(parts=(PartReply(index=index, step=0, code=code, detail="too wide"),))


def refusal(made: Answer, payload: memoryview) -> str:
    """Why the tensors for a part of four rows are not taken."""
    answers, errors = read_answer({0: ask("ffn.0", 4)}, made, payload)
    assert not answers
    assert isinstance(errors[0], MalformedMessage)
    return errors[0].why


def test_a_forward_request_names_leases_and_carries_the_rows_of_each_part() -> None:
    asks = [ask("ffn.0", 2), ask("ffn.1", 5)]
    body, payload = request(asks)
    sent = schema.decode(body, ForwardRequest)
    assert [(part.uid, part.lease, part.rows) for part in sent.parts] == [
        ("ffn.0", 9, 2),
        ("ffn.1", 9, 5),
    ]
    (piece,) = split(memoryview(bytearray(b"".join(payload))), sent.inputs)
    rows = torch.cat([one.inputs[0] for one in asks])
    assert torch.equal(from_wire(sent.inputs[0], piece), rows)
    assert sum(one.nbytes for one in asks) >= sum(len(piece) for piece in payload)


def test_rows_that_lie_side_by_side_are_sent_from_their_own_memory() -> None:
    x = torch.randn(7, 3)
    asks = [replace(ask("ffn.0", 1), inputs=(part,)) for part in x.split([2, 5])]
    _, (piece,) = request(asks)
    x[6, 2] = 5.0
    assert bytes(piece) == bytes(x.numpy().data)


def test_a_backward_request_carries_inputs_gradients_and_the_updates_id() -> None:
    asks = [
        ask(f"ffn.{n}", 2, grads=(torch.randn(2, 3),), update=bytes(15) + bytes([n]), dry_run=True)
        for n in range(2)
    ]
    body, payload = request(asks)
    sent = schema.decode(body, BackwardRequest)
    assert ([part.update[15] for part in sent.parts], sent.dry_run) == ([0, 1], True)
    described = (*sent.inputs, *sent.grads)
    assert len(described) == 2
    pieces = split(memoryview(bytearray(b"".join(payload))), described)
    grads = torch.cat([one.grads[0] for one in asks])
    assert torch.equal(from_wire(described[1], pieces[1]), grads)


def test_an_answer_is_read_as_tensors_and_errors_of_its_parts() -> None:
    tensor = torch.randn(7, 3)
    asks = {0: ask("ffn.0", 4), 1: ask("ffn.1", 9), 2: ask("ffn.2", 3)}
    (come, payload), bad = answer(tensor), failed("schema", 1).parts
    parts = (*come.parts, *bad, done(2))
    answers, errors = read_answer(asks, Answer(parts=parts, tensors=come.tensors), payload)
    assert list(answers) == [0, 2]
    assert torch.equal(torch.cat([*answers[0], *answers[2]]), tensor)
    assert isinstance(errors[1], SchemaMismatch)


@pytest.mark.parametrize("index", [1, 0])
def test_an_answer_for_a_part_that_was_not_asked_or_twice_is_refused(index: int) -> None:
    twice = Answer(parts=(*failed("busy").parts, *failed("busy", index).parts))
    with pytest.raises(MalformedMessage, match=r"answer\.index"):
        read_answer({0: ask("ffn.0", 4)}, twice, memoryview(b""))


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (torch.zeros(4, 3), torch.zeros(4, 3)),
        (torch.zeros(4, 2),),
        (torch.zeros(4, 3, 1),),
        (torch.zeros(4, 3, dtype=torch.float64),),
    ],
)
def test_an_answer_of_another_shape_is_refused(tensors: tuple[torch.Tensor, ...]) -> None:
    assert refusal(*answer(*tensors)) == "answer.shape"


def test_an_answer_for_another_number_of_rows_is_refused() -> None:
    assert refusal(*answer(torch.zeros(5, 3))) == "answer.rows"


def test_an_answer_whose_payload_is_too_short_is_refused() -> None:
    made, payload = answer(torch.zeros(4, 3))
    assert refusal(made, payload[:-1]) == "tensor.length"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_answer_that_is_not_finite_fails_its_own_part_alone(bad: float) -> None:
    tensor = torch.zeros(6, 3)
    tensor[2, 1] = bad
    asks = {0: ask("ffn.0", 4), 1: ask("ffn.1", 2)}
    answers, errors = read_answer(asks, *answer(tensor, parts=2))
    assert list(answers) == [1]
    assert isinstance(errors[0], NonFiniteError)


@pytest.mark.parametrize(("code", "kind"), [("schema", SchemaMismatch), ("what", RemoteError)])
def test_an_error_that_an_answer_reports_is_the_parts(code: str, kind: type[Exception]) -> None:
    answers, errors = read_answer({0: ask("ffn.0", 4)}, failed(code), memoryview(b""))
    assert not answers
    assert isinstance(errors[0], kind)
    assert "too wide" in str(errors[0])


def test_a_tensor_is_described_without_its_rows() -> None:
    assert spec_of(torch.zeros(2, 7, 3)) == TensorSpec(dtype="float32", shape=(7, 3))


def test_an_answer_without_tensors_is_right_where_none_are_due() -> None:
    bare = Ask(PeerId(bytes(32)), "ffn.0", 9, (torch.zeros(2, dtype=torch.long),), ())
    assert read_answer({0: bare}, *answer()) == ({0: ()}, {})
