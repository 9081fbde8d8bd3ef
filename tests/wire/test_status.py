"""What a node says of itself: bounded in all directions."""

import pytest

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import schema
from p2pmoe.wire.status import NodeStatus, StatusRequest, StatusRow


def status(**fields):
    return NodeStatus(
        **(
            {"peer": bytes(32), "version": "0.1.0", "uptime_ms": 1, "figures": {}, "sections": {}}
            | fields
        )
    )


def test_a_status_comes_back_as_it_was():
    row = StatusRow(name="ffn.3.7", values={"updates": 12, "state": "serving", "debt": -1})
    for message in (
        StatusRequest(),
        status(),
        status(figures={"calls": 3}, sections={"experts": (row,), "empty": ()}),
    ):
        assert schema.decode(schema.encode(message), type(message)) == message


@pytest.mark.parametrize(
    "fields",
    [
        {"peer": bytes(31)},
        {"version": "v" * 65},
        {"uptime_ms": -1},
        {"figures": {"f" * 257: 1}},
        {"figures": {"calls": "3"}},
        {"sections": {"s" * 65: ()}},
        {"sections": {"experts": (StatusRow(name="n" * 65, values={}),)}},
        {"sections": {"experts": (StatusRow(name="n", values={"v": "x" * 257}),)}},
        {"sections": {"experts": (StatusRow(name="n", values={str(i): 0 for i in range(33)}),)}},
    ],
    ids=repr,
)
def test_every_field_has_its_bounds(fields):
    with pytest.raises(MalformedMessage, match=r"^schema\.mismatch"):
        schema.decode(schema.encode(status(**fields)), NodeStatus)
