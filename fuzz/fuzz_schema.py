"""Any bytes are a message that can be written again, or a typed error. Byte 0 chooses which."""

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.schema import Message
from p2pmoe.wire.status import NodeStatus, StatusRequest
from p2pmoe.wire.tensor import TensorDescriptor


class Ask(Message, frozen=True, kw_only=True, tag_field="t", tag="ask"):
    n: schema.U32


class Tell(Message, frozen=True, kw_only=True, tag_field="t", tag="tell"):
    token: schema.Bytes16


MESSAGES = (TensorDescriptor, PeerRecord, NodeStatus, StatusRequest, Ask | Tell)


def fuzz_one(data: bytes) -> None:
    message = MESSAGES[data[0] % len(MESSAGES)] if data else StatusRequest
    try:
        value = schema.decode(data[1:], message)
    except MalformedMessage as error:
        why, said = error.why, str(error)
        assert why == "schema.mismatch" or why.startswith("cbor.")
        assert said.isprintable()
        return
    again = schema.encode(value)
    assert schema.decode(again, message) == value
    assert schema.encode(schema.decode(again, message)) == again
