"""Any bytes are a message that can be written again, or a typed error. Byte 0 chooses which."""

from fuzz.checks import read
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.schema import Message
from p2pmoe.wire.status import StatusRequest
from p2pmoe.wire.tensor import TensorDescriptor

MAX_INPUT = 640  # bytes; the longest peer record has 600


class Ask(Message, frozen=True, kw_only=True, tag_field="t", tag="ask"):
    n: schema.U32


class Tell(Message, frozen=True, kw_only=True, tag_field="t", tag="tell"):
    token: schema.Bytes16


MESSAGES = (TensorDescriptor, PeerRecord, Ask, StatusRequest, Ask | Tell)


def fuzz_one(data: bytes) -> None:
    match read(data, MESSAGES):
        case Ask(n=n):
            assert 0 <= n < 2**32
        case Tell(token=token):
            assert len(token) == 16
        case TensorDescriptor() as tensor:
            assert len(tensor.dtype) <= 24
            assert len(tensor.shape) <= 8
            assert all(0 <= size <= 2**24 for size in tensor.shape)
        case PeerRecord() as record:
            assert 0 <= min(record.order) <= max(record.order) < 2**63
            assert min(record.version_min, record.version_max) >= 0
            assert max(record.version_min, record.version_max) < 2**16
            assert len(record.addresses) <= 4
            assert max(map(len, (record.capabilities, record.grids))) <= 8
            assert len(record.meta) <= 64
