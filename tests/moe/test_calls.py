"""Requests carry what their parts say, and an answer that is not what was asked for is refused."""

import pytest
import torch

from p2pmoe.errors import MalformedMessage, NonFiniteError, RemoteError, SchemaMismatch
from p2pmoe.experts.messages import BackwardRequest, ForwardRequest, PartReply, TensorSpec
from p2pmoe.experts.tensors import describe, from_wire, to_wire
from p2pmoe.identity import PeerId
from p2pmoe.moe.calls import Ask, read_answer, request, spec_of
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import join, split

ROW = TensorSpec(dtype="float32", shape=(3,))


def ask(uid: str, rows: int, **more: object) -> Ask:
    return Ask(PeerId(bytes(32)), uid, 9, (torch.randn(rows, 3),), (ROW,), **more)


def reply(*tensors: torch.Tensor) -> tuple[PartReply, memoryview]:
    described = tuple(map(describe, tensors))
    payload = b"".join(join(described, [to_wire(one) for one in tensors]))
    return PartReply(index=0, tensors=described), memoryview(bytearray(payload))


def test_a_forward_request_names_leases_and_carries_the_rows_of_each_part() -> None:
    asks = [ask("ffn.0", 2), ask("ffn.1", 5)]
    body, payload = request(asks)
    parts = schema.decode(body, ForwardRequest).parts
    assert [(part.uid, part.lease) for part in parts] == [("ffn.0", 9), ("ffn.1", 9)]
    tensors = [one for part in parts for one in part.tensors]
    pieces = split(memoryview(bytearray(b"".join(payload))), tensors)
    for one, tensor, piece in zip(asks, tensors, pieces, strict=True):
        assert torch.equal(from_wire(tensor, piece), one.inputs[0])
    assert sum(one.nbytes for one in asks) >= sum(len(piece) for piece in payload)


def test_a_backward_request_carries_inputs_gradients_and_the_updates_id() -> None:
    grads = (torch.randn(2, 3),)
    body, payload = request([ask("ffn.0", 2, grads=grads, update=bytes(16), dry_run=True)])
    (part,) = schema.decode(body, BackwardRequest).parts
    assert (part.update, part.dry_run) == (bytes(16), True)
    described = (*part.inputs, *part.grads)
    assert len(described) == 2
    pieces = split(memoryview(bytearray(b"".join(payload))), described)
    assert torch.equal(from_wire(described[1], pieces[1]), grads[0])


def test_an_answer_is_read_as_tensors() -> None:
    tensor = torch.randn(4, 3)
    assert torch.equal(read_answer(ask("ffn.0", 4), *reply(tensor))[0], tensor)


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
    with pytest.raises(MalformedMessage, match=r"ffn\.0") as caught:
        read_answer(ask("ffn.0", 4), *reply(*tensors))
    assert caught.value.why == "answer.shape"


def test_an_answer_for_another_number_of_rows_is_refused() -> None:
    with pytest.raises(MalformedMessage, match=r"answer\.rows"):
        read_answer(ask("ffn.0", 4), *reply(torch.zeros(5, 3)))


def test_an_answer_whose_payload_is_too_short_is_refused() -> None:
    made, payload = reply(torch.zeros(4, 3))
    with pytest.raises(MalformedMessage, match=r"tensor\.length"):
        read_answer(ask("ffn.0", 4), made, payload[:-1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_answer_that_is_not_finite_is_refused(bad: float) -> None:
    tensor = torch.zeros(4, 3)
    tensor[2, 1] = bad
    with pytest.raises(NonFiniteError):
        read_answer(ask("ffn.0", 4), *reply(tensor))


def test_an_answer_that_reports_an_error_raises_it() -> None:
    with pytest.raises(SchemaMismatch, match="too wide"):
        read_answer(ask("ffn.0", 4), PartReply(index=0, code="schema", detail="too wide"), None)
    with pytest.raises(RemoteError):
        read_answer(ask("ffn.0", 4), PartReply(index=0, code="what"), None)


def test_a_tensor_is_described_without_its_rows() -> None:
    assert spec_of(torch.zeros(2, 7, 3)) == TensorSpec(dtype="float32", shape=(7, 3))


def test_an_answer_without_tensors_is_right_where_none_are_due() -> None:
    bare = Ask(PeerId(bytes(32)), "ffn.0", 9, (torch.zeros(2, dtype=torch.long),), ())
    assert read_answer(bare, *reply()) == ()
