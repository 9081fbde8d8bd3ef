"""What the file of a saved expert may look like, and which of two is newer. A core.

A snapshot is a safetensors file: 8 bytes of length, a JSON header, the tensors behind each other.
`weights/NAME` is a tensor of the module's state, `memory/KEY/NAME` what the optimiser remembers of
a weight. Its metadata names the step and the optimiser. A file comes from a disk that may be
damaged or from a peer that may lie, so its size and its header are compared with what the expert
itself has before anything is made of it.

Beside a file stands its statement: the owner's signed words about it, as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn

import msgspec

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import MalformedMessage, SnapshotRefused, printable
from p2pmoe.wire.envelope import Kind, Signed, open_envelope
from p2pmoe.wire.schema import MAX_ENVELOPE_BYTES

FORMAT = "p2pmoe.expert/1"  # the one key of a file's metadata
LENGTH_BYTES = 8  # of the header's length, little-endian
ENTRY_BYTES = 192  # of JSON that one tensor may take beside its name; safetensors uses 90
METADATA_BYTES = 1024  # of JSON beside the tensors; this package uses 150
MAX_STATEMENT_BYTES = (
    2 * MAX_ENVELOPE_BYTES
)  # base64 takes a third more, and there is a little text
ITEM_BYTES = {  # by safetensors' names of dtypes
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
LIKE_WEIGHT, SCALAR = True, False
MEMORY = {  # what an optimiser remembers of each weight that it has changed
    "adam": {"step": SCALAR, "exp_avg": LIKE_WEIGHT, "exp_avg_sq": LIKE_WEIGHT},
    "adamw": {"step": SCALAR, "exp_avg": LIKE_WEIGHT, "exp_avg_sq": LIKE_WEIGHT},
    "sgd": {},
}


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a header; `data_offsets` count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one expert: all of its state, and of them those that are trained."""

    state: Mapping[str, Slot]
    trained: frozenset[str] = frozenset()

    @property
    def most_bytes(self) -> int:
        """How long a file of this expert is at most."""
        slots = {**self.weights(), **self.memory("adam", self.trained)}
        header = sum(len(name.encode()) + ENTRY_BYTES for name in slots)
        return LENGTH_BYTES + METADATA_BYTES + header + sum(slot.size for slot in slots.values())

    def weights(self) -> dict[str, Slot]:
        """What every file has."""
        return {f"weights/{name}": slot for name, slot in self.state.items()}

    def memory(self, optimizer: str, names: Iterable[str]) -> dict[str, Slot]:
        """What the optimiser remembers of these weights."""
        return {
            f"memory/{key}/{name}": self.state[name] if like_weight else Slot("F32", ())
            for name in names
            for key, like_weight in MEMORY[optimizer].items()
        }


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a header says: updates applied, by which optimiser, and the numbers of its training.

    Those are for people, as whoever restores the expert has options of its own.
    """

    step: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    optimizer: Literal["adam", "adamw", "sgd"]
    lr: float
    warmup: int
    clip_grad_norm: float | None

    def metadata(self) -> dict[str, str]:
        """As a header has it: one entry, because safetensors writes several in any order."""
        return {FORMAT: msgspec.json.encode(self).decode()}


def check_size(size: int, layout: Layout) -> None:
    """Refuse a file that no snapshot of this expert can be, before it is fetched or read."""
    if not LENGTH_BYTES < size <= layout.most_bytes:
        _refuse("size", f"{size} bytes: this expert takes at most {layout.most_bytes}")


def check_header(file: memoryview, layout: Layout) -> Facts:
    """What the header of a whole file says, once its tensors are those of the expert."""
    length = int.from_bytes(file[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    if start > len(file):
        _refuse("header", f"{length} bytes in a file of {len(file)}")
    try:
        parts = msgspec.json.decode(file[LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(parts.pop("__metadata__", b"{}"), type=dict[str, str])
        facts = msgspec.json.decode(metadata.get(FORMAT, ""), type=Facts)
        slots = {name: msgspec.json.decode(raw, type=Slot) for name, raw in parts.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse("header", printable(str(error)))
    remembered = {name for name in layout.trained if f"memory/exp_avg/{name}" in slots}
    wanted = layout.weights() | layout.memory(facts.optimizer, remembered)
    if slots.keys() != wanted.keys():
        odd = min(slots.keys() ^ wanted.keys())
        _refuse("tensors", f"{printable(odd)} is missing, or is none of this expert's")
    end = 0
    for name, slot in sorted(slots.items(), key=lambda item: item[1].data_offsets):
        if (slot.dtype, slot.shape) != (wanted[name].dtype, wanted[name].shape):
            _refuse("tensors", f"{name} is not {wanted[name].dtype} {list(wanted[name].shape)}")
        if slot.data_offsets != (end, end + slot.size):
            _refuse("header", f"{name} does not lie where the tensor before it ends")
        end += slot.size
    if start + end != len(file):
        _refuse("header", f"{start + end} bytes are described, and there are {len(file)}")
    return facts


# ------------------------------------------------------------------ statements
class _Statement(msgspec.Struct, frozen=True):
    """The JSON beside a file. Only the envelope counts; the rest is for people."""

    expert: str
    step: int
    record: bytes


def write_statement(signed: Signed[SnapshotRecord]) -> bytes:
    """The JSON that stands beside a file."""
    body = signed.body
    return msgspec.json.encode(_Statement(body.uid, body.step, signed.raw))


def read_statement(data: bytes, network: bytes) -> Signed[SnapshotRecord]:
    """The owner's signed words about a file; `SnapshotRefused` when they are not that."""
    try:
        raw = msgspec.json.decode(data, type=_Statement).record
        return open_envelope(raw, SnapshotRecord, kind=Kind.SNAPSHOT, network=network)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MalformedMessage) as error:
        _refuse("statement", printable(str(error)))


def rank(record: SnapshotRecord) -> tuple[int, int, int]:
    """The higher one is newer: first by who owned the expert last, then by updates."""
    return record.lease, record.step, record.saved_ms


def _refuse(why: str, detail: str) -> NoReturn:
    raise SnapshotRefused(why, detail)
