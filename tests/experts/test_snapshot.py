"""An expert comes back from its file bit for bit, and from nothing else."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from p2pmoe.errors import NonFiniteError, SnapshotRefused
from p2pmoe.experts import snapshot
from p2pmoe.experts.backend import Backend, TrainParams
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.snapshot import Disk, Packed, layout_of, pack, unpack
from tests.experts.saved import backend, equal, file_of, learn, statement, weights


def restored(packed: Packed, into: Backend) -> Backend:
    unpack(into, packed.data, statement(packed).body)
    return into


def refusal(into: Backend, data: bytes, packed: Packed) -> str:
    """Why a file is refused that is signed as `packed`; the expert stays as it was."""
    before, step = weights(into), into.step
    with pytest.raises(SnapshotRefused) as caught:
        unpack(into, data, statement(packed).body)
    assert equal(weights(into), before)
    assert into.step == step
    return caught.value.why


def signed_anew(data: bytes, packed: Packed) -> Packed:
    """What a lying owner signs: other bytes, and their hash."""
    return Packed(data, snapshot.hashlib.sha256(data).digest(), packed.step)


# ------------------------------------------------------------------ there and back
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_expert_and_its_next_steps_are_equal_bit_for_bit(
    optimizer: str, dtype: str, steps: int
) -> None:
    small = ExpertClass(name="ffn", hidden_dim=2, dtype=dtype)
    one = backend(optimizer, small, warmup=5)
    learn(one, steps)
    other = restored(pack(one), backend(optimizer, small, warmup=5))
    assert equal(weights(one), weights(other))
    assert (one.step, one.learning_rate) == (other.step, other.learning_rate)
    learn(one, 2)
    learn(other, 2)
    assert equal(weights(one), weights(other))
    assert pack(one) == pack(other)


def test_the_same_state_is_the_same_file() -> None:
    assert pack(learn(backend(), 2)) == pack(learn(backend(), 2))


@pytest.mark.parametrize("name", ["ffn", "transformer", "nop"])
def test_every_class_of_this_package_can_be_saved(name: str) -> None:
    made = ExpertClass(name=name, hidden_dim=8)
    packed = pack(backend(expert_class=made))
    restored(packed, backend(expert_class=made))
    assert len(packed.data) <= layout_of(backend(expert_class=made)).most_bytes


class Odd(nn.Module):
    """Weights of which one is used twice, one is frozen, one never used, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 2), nn.Linear(2, 2)
        self.down.weight = self.up.weight
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x_RD)) * self.still


def test_buffers_and_weights_that_are_shared_frozen_or_unused_come_back_too() -> None:
    def odd() -> Backend:
        torch.manual_seed(1)
        return Backend(Odd(), TrainParams(), torch.device("cpu"))

    one = learn(odd(), 3)
    one.module.count += 1
    other = restored(pack(one), odd())
    assert other.module.count == 8
    assert other.module.down.weight is other.module.up.weight
    assert equal(weights(learn(one)), weights(learn(other)))


def test_an_expert_without_weights_has_a_file_too() -> None:
    def bare() -> Backend:
        return Backend(nn.Identity(), TrainParams(), torch.device("cpu"))

    assert restored(pack(bare()), bare()).step == 0


def test_the_memory_of_another_optimiser_is_left_out() -> None:
    one = learn(backend("adam"), 2)
    other = restored(pack(one), backend("sgd"))
    assert equal(weights(one), weights(other))
    assert other.step == 2
    assert not other.optimizer.state


# ------------------------------------------------------------------ damage
def test_a_file_cut_at_any_byte_is_refused() -> None:
    packed, into = file_of(), backend()
    for size in range(len(packed.data)):
        assert refusal(into, packed.data[:size], packed) in {"size", "hash"}
    assert refusal(into, packed.data + b"\0", packed) == "hash"
    assert refusal(into, packed.data + bytes(10_000), packed) == "size"


def test_a_file_with_any_bit_flipped_is_refused() -> None:
    packed, into = file_of(), backend()
    body, before = statement(packed).body, weights(into)
    for at in range(8 * len(packed.data)):
        data = bytearray(packed.data)
        data[at // 8] ^= 1 << at % 8
        with pytest.raises(SnapshotRefused, match="hash"):
            unpack(into, bytes(data), body)
    assert equal(weights(into), before)


PACKED, INTO = file_of(), backend()
CHANGES = st.tuples(st.integers(0, len(PACKED.data) - 1), st.integers(0, 255))


@settings(max_examples=100, deadline=None)
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_even_bytes_that_their_owner_signed_make_an_expert_or_a_refusal(
    changes: list[tuple[int, int]],
) -> None:
    changed, into = bytearray(PACKED.data), INTO
    for at, byte in changes:
        changed[at] = byte
    lie = signed_anew(bytes(changed), PACKED)
    before = weights(into)
    try:
        unpack(into, lie.data, statement(lie).body)
    except SnapshotRefused as error:
        assert error.why in {"header", "tensors", "finite"}
        assert equal(weights(into), before)
    else:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(into))


@pytest.mark.parametrize(
    "other",
    [
        ExpertClass(name="ffn", hidden_dim=4, options={"inner_dim": "2"}),
        ExpertClass(name="ffn", hidden_dim=2, options={"inner_dim": "2"}, dtype="bfloat16"),
        ExpertClass(name="nop", hidden_dim=2),
    ],
)
def test_the_file_of_another_expert_is_refused(other: ExpertClass) -> None:
    packed = file_of(0)
    assert refusal(backend(expert_class=other), packed.data, packed) in {"tensors", "size"}


def test_a_step_other_than_the_signed_one_is_refused() -> None:
    packed = file_of(2)
    assert refusal(backend(), packed.data, Packed(packed.data, packed.hash, 3)) == "header"


def test_what_the_format_itself_finds_wrong_is_a_refusal_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(data: bytes) -> None:
        raise snapshot.SafetensorError("no")

    packed, into = file_of(), backend()
    monkeypatch.setattr(snapshot, "load", broken)
    assert refusal(into, packed.data, packed) == "header"


def poison(expert: Backend) -> None:
    with torch.no_grad():
        next(iter(expert.module.parameters())).view(-1)[0] = torch.nan


def test_an_expert_that_is_not_finite_is_not_saved() -> None:
    expert = learn(backend())
    poison(expert)
    with pytest.raises(NonFiniteError):
        pack(expert)


def test_numbers_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as lying:
        lying.setattr(snapshot, "all_finite", lambda tensor: True)
        packed = file_of(change=poison)
    assert refusal(backend(), packed.data, packed) == "finite"


def test_a_file_that_lies_about_its_size_allocates_nothing() -> None:
    record = msgspec.structs.replace(statement(file_of()).body, bytes=2**62)
    with pytest.raises(SnapshotRefused, match="hash"):
        unpack(backend(), file_of().data, record)


# ------------------------------------------------------------------ who waits for whom
def test_a_state_is_copied_only_between_updates() -> None:
    expert, packed = learn(backend()), []
    copying = threading.Thread(target=lambda: packed.append(pack(expert)))
    with expert.lock:
        copying.start()
        copying.join(0.05)
        assert packed == []
    copying.join()
    assert packed[0].step == 1


async def test_a_disk_works_in_a_thread_of_its_own_or_here() -> None:
    here = threading.get_ident()
    assert await Disk(threaded=False).run(threading.get_ident) == here
    assert await Disk().run(threading.get_ident) != here
