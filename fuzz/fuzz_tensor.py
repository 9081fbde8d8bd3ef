"""Whatever descriptors say of a payload: views that tile it, or a typed error.

Bytes 0 and 1 are the length of an array of descriptors, which follows; the rest is the payload.
"""

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.tensor import ALIGNMENT, MAX_TENSOR_BYTES, TensorDescriptor, join, layout, split


def fuzz_one(data: bytes) -> None:
    end = 2 + int.from_bytes(data[:2], "big")
    payload = memoryview(data)[end:]
    try:
        items = cbor.loads(data[2:end])
        if not isinstance(items, list):
            return
        tensors = [schema.convert(item, TensorDescriptor) for item in items]
        plan = layout(tensors)
        assert all(tensor.nbytes <= MAX_TENSOR_BYTES for tensor in tensors)
        views = split(payload, tensors)
    except MalformedMessage as error:
        why = error.why
        assert why.startswith(("cbor.", "schema.", "tensor."))
        return
    assert plan.total == len(payload)
    assert [view.nbytes for view in views] == [tensor.nbytes for tensor in tensors]
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets)
    again = b"".join(join(tensors, views))
    assert len(again) == len(payload)
    assert split(memoryview(again), tensors) == views
