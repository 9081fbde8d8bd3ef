"""What is said between callers and experts survives its bytes, and stays within its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage, SchemaMismatch
from p2pmoe.experts.messages import (
    MAX_PARTS,
    MAX_TENSORS,
    Answer,
    BackwardPart,
    BackwardRequest,
    ExpertInfo,
    ForwardPart,
    ForwardRequest,
    InfoReply,
    InfoRequest,
    PartReply,
    TensorSpec,
    fitting_rows,
)
from p2pmoe.net.messages import MAX_BODY_BYTES
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import TensorDescriptor
from tests.strategies import descriptors, u64

uids = st.from_regex(r"[a-z]{1,8}(\.[0-9]{1,3}){1,3}", fullmatch=True)
tensors = st.lists(descriptors, max_size=3).map(tuple)
specs = st.builds(
    TensorSpec,
    dtype=st.sampled_from(["float32", "int64"]),
    shape=st.lists(st.none() | st.integers(1, 9), max_size=3).map(tuple),
)
several_specs = st.lists(specs, max_size=3).map(tuple)
rows = st.integers(1, 2**24)
forward_parts = st.builds(ForwardPart, uid=uids, lease=u64, rows=rows)
backward_parts = st.builds(
    BackwardPart,
    uid=uids,
    lease=u64,
    rows=rows,
    update=st.binary(min_size=16, max_size=16),
)
part_replies = st.builds(
    PartReply,
    index=st.integers(0, MAX_PARTS - 1),
    step=u64,
    code=st.text(max_size=24),
    detail=st.text(max_size=256),
)
infos = st.builds(
    ExpertInfo,
    uid=uids,
    lease=u64,
    step=u64,
    max_batch=st.integers(0, 2**32 - 1),
    expert_class=st.text(max_size=64),
    inputs=several_specs,
    outputs=several_specs,
)
messages = st.one_of(
    st.builds(InfoRequest, uids=st.lists(uids, max_size=5).map(tuple)),
    st.builds(InfoReply, experts=st.lists(infos, max_size=3).map(tuple)),
    st.builds(
        ForwardRequest,
        parts=st.lists(forward_parts, min_size=1, max_size=4).map(tuple),
        inputs=tensors,
    ),
    st.builds(
        BackwardRequest,
        parts=st.lists(backward_parts, min_size=1, max_size=4).map(tuple),
        inputs=tensors,
        grads=tensors,
        dry_run=st.booleans(),
    ),
    st.builds(
        Answer, parts=st.lists(part_replies, min_size=1, max_size=4).map(tuple), tensors=tensors
    ),
)

ROW = TensorDescriptor(dtype="float32", shape=(2, 4))
FORWARD = ForwardPart(uid="ffn.0", lease=1, rows=2)
BACKWARD = BackwardPart(uid="ffn.0", lease=1, rows=2, update=bytes(16))


@given(messages)
def test_a_message_survives_its_bytes(message: object) -> None:
    assert schema.decode(schema.encode(message), type(message)) == message


def test_the_largest_calls_and_answers_fit_one_header() -> None:
    """Sequences in and out, long uids, large numbers, long errors: 64 parts travel at once."""
    row = TensorDescriptor(dtype="bfloat16", shape=(2**24,) * 8)
    part = BackwardPart(
        uid="a" * 30 + ".65535" * 4, lease=2**63 - 1, rows=2**18, update=b"\xff" * 16
    )
    grads = (row,) * MAX_TENSORS
    request = BackwardRequest(parts=(part,) * MAX_PARTS, inputs=grads, grads=grads)
    failed = PartReply(index=63, step=2**63 - 1, code="c" * 24, detail="\N{SNOWMAN}" * 256)
    for message in (request, Answer(parts=(failed,) * MAX_PARTS, tensors=grads)):
        assert len(schema.encode(message)) <= MAX_BODY_BYTES
        assert schema.decode(schema.encode(message), type(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        ForwardRequest(parts=(), inputs=(ROW,)),
        ForwardRequest(parts=(FORWARD,) * (MAX_PARTS + 1), inputs=(ROW,)),
        ForwardRequest(parts=(FORWARD,), inputs=(ROW,) * (MAX_TENSORS + 1)),
        ForwardRequest(parts=(ForwardPart(uid="u" * 65, lease=1, rows=1),), inputs=()),
        ForwardRequest(parts=(ForwardPart(uid="ffn.0", lease=-1, rows=1),), inputs=()),
        ForwardRequest(parts=(ForwardPart(uid="ffn.0", lease=1, rows=0),), inputs=()),
        BackwardRequest(parts=(), inputs=(ROW,), grads=(ROW,)),
        BackwardRequest(
            parts=(BackwardPart(uid="ffn.0", lease=1, rows=2, update=bytes(15)),),
            inputs=(ROW,),
            grads=(ROW,),
        ),
        InfoRequest(uids=("ffn.0",) * (MAX_PARTS + 1)),
        Answer(parts=()),
        Answer(parts=(PartReply(index=MAX_PARTS, step=0, code="", detail=""),)),
        Answer(parts=(PartReply(index=0, step=0, code="", detail="d" * 257),)),
    ],
)
def test_a_message_beyond_its_bounds_is_refused(message: object) -> None:
    with pytest.raises(MalformedMessage, match=r"schema\.mismatch"):
        schema.decode(schema.encode(message), type(message))


def test_a_key_that_a_request_does_not_have_is_refused() -> None:
    with pytest.raises(MalformedMessage, match=r"schema\.mismatch"):
        schema.convert({"uids": [], "more": True}, InfoRequest)


# ------------------------------------------------------------------ fitting
SPEC = TensorSpec(dtype="float32", shape=(4,))
SEQUENCE = TensorSpec(dtype="float32", shape=(None, 4))
WORD = TensorSpec(dtype="int64", shape=())


def tensor(*shape: int, dtype: str = "float32") -> TensorDescriptor:
    return TensorDescriptor(dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("wanted", "given", "rows"),
    [
        ((SPEC,), (tensor(3, 4),), 3),
        ((SEQUENCE,), (tensor(2, 9, 4),), 2),
        ((SPEC, WORD), (tensor(5, 4), tensor(5, dtype="int64")), 5),
    ],
)
def test_tensors_that_fit_have_their_rows_counted(
    wanted: tuple[TensorSpec, ...], given: tuple[TensorDescriptor, ...], rows: int
) -> None:
    assert fitting_rows(wanted, given, "inputs") == rows


@pytest.mark.parametrize(
    ("wanted", "given", "why"),
    [
        ((SPEC,), (), r"1 inputs are needed, not 0"),
        ((SPEC,), (tensor(3, 4), tensor(3, 4)), r"1 inputs are needed, not 2"),
        ((SPEC,), (tensor(3, 5),), r"inputs are \[rows, 4\], not \[3, 5\]"),
        ((SPEC,), (tensor(3, 1, 4),), r"inputs are \[rows, 4\], not \[3, 1, 4\]"),
        ((SPEC,), (tensor(),), r"inputs are \[rows, 4\], not \[\]"),
        ((SPEC,), (tensor(3, 4, dtype="float16"),), r"of float32, not float16"),
        ((SPEC,), (tensor(3, 4, dtype="\x1b"),), r"of float32, not \\x1b"),
        ((SEQUENCE,), (tensor(3, 0, 4),), r"inputs are \[rows, any, 4\], not \[3, 0, 4\]"),
        ((SPEC,), (tensor(0, 4),), r"one number of rows above 0, not \[0\]"),
        ((SPEC, WORD), (tensor(3, 4), tensor(2, dtype="int64")), r"above 0, not \[2, 3\]"),
        ((WORD,), (tensor(dtype="int64"),), r"inputs are \[rows\], not \[\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    wanted: tuple[TensorSpec, ...], given: tuple[TensorDescriptor, ...], why: str
) -> None:
    with pytest.raises(SchemaMismatch, match=why):
        fitting_rows(wanted, given, "inputs")
