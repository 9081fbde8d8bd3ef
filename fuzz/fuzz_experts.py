"""What callers and experts say to each other. Byte 0 chooses which.

Tensors that are announced are compared with what an expert takes, which the caller does not know.
"""

from fuzz.checks import read
from p2pmoe.errors import MalformedMessage, SchemaMismatch
from p2pmoe.experts.messages import (
    Answer,
    BackwardPart,
    BackwardRequest,
    ExpertInfo,
    ForwardPart,
    ForwardRequest,
    InfoReply,
    InfoRequest,
    TensorSpec,
    check_rows,
    fitting_rows,
)
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import TensorDescriptor

MAX_INPUT = 512  # bytes; a backward request of two parts
MESSAGES = (ForwardRequest, BackwardRequest, Answer, InfoRequest, InfoReply)
SPECS = (TensorSpec(dtype="float32", shape=(8, None)), TensorSpec(dtype="int64", shape=()))

TAKEN = (
    TensorDescriptor(dtype="float32", shape=(3, 8, 2)),
    TensorDescriptor(dtype="int64", shape=(3,)),
)
SEEDS = [
    b"\0"
    + schema.encode(ForwardRequest(parts=(ForwardPart(uid="f.0", lease=1, rows=3),), inputs=given))
    for given in (
        TAKEN,
        TAKEN[:1],
        TAKEN[1:],
        (TAKEN[0], TensorDescriptor(dtype="int64", shape=(2,))),
    )
]


def fits(specs: tuple[TensorSpec, ...], tensors: tuple[TensorDescriptor, ...]) -> bool:
    """The rule once more: dtypes and sizes as the expert says, and one number of rows above 0."""
    if [one.dtype for one in tensors] != [spec.dtype for spec in specs]:
        return False
    for spec, tensor in zip(specs, tensors, strict=True):
        wanted = [size or -1 for size in spec.shape]  # -1: any size but 0
        given = [
            size if want > 0 else -min(size, 1)
            for want, size in zip(wanted, tensor.shape[1:], strict=False)
        ]
        if len(tensor.shape) != 1 + len(wanted) or given != wanted:
            return False
    rows = {tensor.shape[0] for tensor in tensors}
    return len(rows) == 1 and rows != {0}


def check_fit(tensors: tuple[TensorDescriptor, ...]) -> None:
    assert len(tensors) <= 8
    for specs in (SPECS, SPECS[:1], SPECS[1:]):
        try:
            rows = fitting_rows(specs, tensors, "inputs")
        except SchemaMismatch as error:
            assert str(error).isprintable()
            assert not fits(specs, tensors)
            continue
        assert fits(specs, tensors)
        assert {tensor.shape[0] for tensor in tensors} == {rows}


def check_info(info: ExpertInfo) -> None:
    assert max(map(len, (info.uid, info.expert_class))) <= 64
    assert 0 <= min(info.lease, info.step) <= max(info.lease, info.step) < 2**63
    assert 0 <= info.max_batch < 2**32
    for spec in (*info.inputs, *info.outputs):
        assert len(spec.shape) <= 7
        assert all(size is None or 1 <= size <= 2**24 for size in spec.shape)


def check_call(
    parts: tuple[ForwardPart | BackwardPart, ...], tensors: tuple[TensorDescriptor, ...]
) -> None:
    """All tensors have the rows of all parts, or the call is refused."""
    assert 1 <= len(parts) <= 64
    for part in parts:
        assert 0 <= part.lease < 2**63
        assert 1 <= part.rows <= 2**24
    rows = sum(part.rows for part in parts)
    try:
        check_rows(parts, tensors)
    except MalformedMessage as error:
        assert error.why == "expert.rows"
        assert any(not tensor.shape or tensor.shape[0] != rows for tensor in tensors)
    else:
        assert all(tensor.shape and tensor.shape[0] == rows for tensor in tensors)
    check_fit(tensors[:8])


def fuzz_one(data: bytes) -> None:
    match read(data, MESSAGES):
        case ForwardRequest(parts=parts, inputs=inputs):
            check_call(parts, inputs)
        case BackwardRequest(parts=parts, inputs=inputs, grads=grads):
            assert all(len(part.update) == 16 for part in parts)
            check_call(parts, inputs + grads)
        case Answer(parts=parts, tensors=tensors, retry_after_ms=hint):
            assert 1 <= len(parts) <= 64
            assert 0 <= hint < 2**32
            for reply in parts:
                assert 0 <= reply.index < 64
                assert len(reply.code) <= 24
                assert len(reply.detail) <= 256
            check_fit(tensors)
        case InfoRequest(uids=uids):
            assert len(uids) <= 64
        case InfoReply(experts=experts, trainers=trainers):
            assert len(experts) <= 64
            assert 0 <= trainers < 2**32
            for info in experts:
                check_info(info)
