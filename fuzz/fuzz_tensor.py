"""Whatever descriptors say of a payload: views that tile it, or a typed error.

Byte 0 says whether the payload is the rest of the input, or zeros of the length that they ask for.
Bytes 1 and 2 are the length of an array of descriptors, which follows.
"""

import math

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.tensor import TensorDescriptor, join, layout, split

MAX_INPUT = 512  # bytes
ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
ELEMENT |= {"int64": 8, "int32": 4, "uint8": 1, "bool": 1}
ZEROS = memoryview(bytes(2**16))  # a longer payload is not tried


def descriptors(data: bytes) -> list[TensorDescriptor]:
    items = cbor.loads(data)
    if not isinstance(items, list):
        raise MalformedMessage("cbor.shape")
    return [schema.convert(item, TensorDescriptor) for item in items]


def fuzz_one(data: bytes) -> None:
    end = 3 + int.from_bytes(data[1:3], "big")
    payload = memoryview(data)[end:]
    try:
        tensors = descriptors(data[3:end])
        plan = layout(tensors)
        sizes = [math.prod(one.shape) * ELEMENT[one.dtype] for one in tensors]
        assert max(sizes, default=0) <= 64 * 2**20
        assert {one.codec for one in tensors} <= {"none"}
        if data[0] % 2 and plan.total <= len(ZEROS):
            payload = ZEROS[: plan.total]
        views = split(payload, tensors)
    except MalformedMessage as error:
        why = error.why
        assert why.startswith(("cbor.", "schema.", "tensor."))
        return
    check_plan(plan.offsets, sizes, len(payload))
    assert [view.nbytes for view in views] == sizes
    again = b"".join(join(tensors, views))
    assert len(again) == len(payload)
    assert split(memoryview(again), tensors) == views
    try:
        join(tensors, [ZEROS] * len(tensors))
    except ValueError:
        return
    assert all(size == len(ZEROS) for size in sizes)


def check_plan(offsets: tuple[int, ...], sizes: list[int], total: int) -> None:
    end = 0
    for offset, size in zip(offsets, sizes, strict=True):
        assert offset % 64 == 0
        assert 0 <= offset - end < 64
        end = offset + size
    assert end == total
