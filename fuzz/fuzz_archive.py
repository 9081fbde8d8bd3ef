"""Files of saved experts and the statements beside them: taken only if all of it fits the expert.

The input is a header with byte 0 before it, which says how many bytes of tensors follow, or, if it
is odd, a statement.
"""

from fuzz.checks import NETWORK
from p2pmoe.errors import SnapshotRefused
from p2pmoe.experts.archive import Facts, Layout, Slot, check_header, read_statement
from p2pmoe.wire import cbor

MAX_INPUT = 1024  # bytes; a header of five tensors has 600
LAYOUT = Layout({"b": Slot("F16", ()), "w": Slot("F32", (2,))}, frozenset({"w"}))
FACTS = Facts(3, "adam", 0.001, 0, None)
CODES = {"header", "tensors", "statement"}


def header(facts: str, *slots: tuple[str, str, list[int], int, int]) -> bytes:
    """A header as JSON, written without the code that is tested."""
    parts = [
        f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'
        for name, dtype, shape, begin, end in slots
    ]
    quoted = facts.replace('"', '\\"')
    return (
        '{"__metadata__":{"p2pmoe.expert/1":"' + quoted + '"},' + ",".join(parts) + "}"
    ).encode()


TEXT = next(iter(FACTS.metadata().values()))
WEIGHTS = ("weights/w", "F32", [2], 0, 8), ("weights/b", "F16", [], 8, 10)
MEMORY = (
    ("memory/exp_avg/w", "F32", [2], 10, 18),
    ("memory/exp_avg_sq/w", "F32", [2], 18, 26),
    ("memory/step/w", "F32", [], 26, 30),
)
SEEDS = [
    b"\x14" + header(TEXT, *WEIGHTS),
    b"\x3c" + header(TEXT, *WEIGHTS, *MEMORY),
    b"\x14" + header(TEXT.replace("adam", "sgd"), *WEIGHTS),
    b"\x14" + header(TEXT.replace("3", "-3"), *WEIGHTS),
    b"\x14" + header(TEXT, WEIGHTS[1], WEIGHTS[0]),
    b"\x14" + header(TEXT, *WEIGHTS) + b"   ",
    b"\x12" + header(TEXT, *WEIGHTS[:1]),
    b"\x01" + b'{"expert":"ffn.0","step":3,"record":"oA=="}',
]


def fuzz_one(data: bytes) -> None:
    first, rest = data[:1] or b"\0", data[1:]
    try:
        if first[0] % 2:
            signed = read_statement(rest, NETWORK)
            assert cbor.loads(signed.raw)
            return
        tensors = bytes(first[0] // 2)
        facts = check_header(memoryview(len(rest).to_bytes(8, "little") + rest + tensors), LAYOUT)
    except SnapshotRefused as error:
        assert error.why in CODES
        assert str(error).isprintable()
        return
    assert 0 <= facts.step < 2**63
    assert len(tensors) in {10, 30}
    for name in ("weights/w", "weights/b"):
        assert name.encode() in rest
