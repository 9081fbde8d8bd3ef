"""What a holder has comes back after a restart, never with a longer life than was signed."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pmoe.dht.contacts import ContactParams, Contacts
from p2pmoe.dht.keeping import FILE, Clocks, Keeper
from p2pmoe.dht.records import Others, RecordParams, RecordStore, Stored
from p2pmoe.wire.envelope import Signed
from tests.dht.swarm_of_ids import NETWORK, PEOPLE, card, dictionary, lease, manifest, snapshot

OWN, ANN, BOB = PEOPLE[:3]


@dataclass
class Machine:
    """Clocks that only the test moves."""

    wall: float = 1_000_000.0
    running: float = 500.0

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.wall, lambda: self.running)

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.running += seconds


@dataclass
class Life:
    """One run of a holder, from start to end."""

    store: RecordStore
    contacts: Contacts
    keeper: Keeper

    def held(self, record: Signed) -> float | None:
        """Seconds that a record has left; None when it is not valid."""
        now = trio.current_time()
        found = [each for each in self.store.get(record.body.key, now) if each.signed == record]
        return found[0].expires_at - now if found else None


def live(folder: Path, machine: Machine) -> Life:
    now = trio.current_time()
    store = RecordStore(RecordParams(), started_at=now)
    contacts = Contacts(OWN.peer_id, ContactParams(), now)
    return Life(store, contacts, Keeper(folder, store, contacts, NETWORK, machine.clocks()))


async def end(life: Life) -> None:
    """Stop in good order: what changed is written."""
    async with trio.open_nursery() as parts:
        parts.start_soon(life.keeper.run)
        await trio.testing.wait_all_tasks_blocked()
        parts.cancel_scope.cancel()


async def filled(folder: Path, machine: Machine) -> Life:
    life = live(folder, machine)
    now = trio.current_time()
    life.store.put(dictionary(ANN, 1, 2), now)
    life.store.put(manifest(ANN), now)
    assert isinstance(life.store.decide(lease(BOB, number=7), Others(), now), Stored)
    life.contacts.learn(card(ANN, "10.0.0.1:1"))
    life.contacts.dialled(ANN.peer_id, now)
    life.contacts.learn(card(BOB, "10.0.0.2:1"))  # never reached: not worth keeping
    return life


async def again(folder: Path, machine: Machine) -> Life:
    life = live(folder, machine)
    await life.keeper.restore()
    return life


async def test_records_and_contacts_come_back_with_what_is_left_of_them(tmp_path: Path) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    machine.passes(20)
    life = await again(tmp_path, machine)
    assert life.held(dictionary(ANN, 1, 2)) == pytest.approx(40, abs=1)
    assert life.held(lease(BOB, number=7)) == pytest.approx(10, abs=1)
    assert life.held(manifest(ANN)) == pytest.approx(3580, abs=1)
    assert life.contacts.record(ANN.peer_id) == card(ANN, "10.0.0.1:1")
    assert life.contacts.record(BOB.peer_id) is None
    assert len(life.contacts.table) == 0  # until they are reached


async def test_what_was_saved_is_known_after_a_night(tmp_path: Path) -> None:
    machine = Machine()
    life = await filled(tmp_path, machine)
    life.store.put(snapshot(BOB, number=7), trio.current_time())
    await end(life)
    machine.passes(36_000)
    life = await again(tmp_path, machine)
    assert life.held(snapshot(BOB, number=7)) == pytest.approx(50_400, abs=1)
    assert life.held(lease(BOB, number=7)) is None
    assert life.store.number(lease(BOB).body.key) == 7  # and is not given again


async def test_what_has_ended_meanwhile_leaves_its_number(tmp_path: Path) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    machine.passes(31)
    life = await again(tmp_path, machine)
    assert life.held(lease(BOB, number=7)) is None
    assert life.store.number(lease(BOB).body.key) == 7
    assert life.held(dictionary(ANN, 1, 2)) is not None


async def test_what_may_be_forgotten_does_not_come_back(tmp_path: Path) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    machine.passes(700)
    life = await again(tmp_path, machine)
    assert life.store.number(lease(BOB).body.key) == 0
    assert life.held(manifest(ANN)) == pytest.approx(2900, abs=1)


@pytest.mark.parametrize("passed", [5.0, 20.0])
async def test_a_clock_set_back_gives_no_record_a_longer_life(
    tmp_path: Path, passed: float
) -> None:
    """Set back by less than has passed, the machine's clock shows it; by more, the record ends."""
    machine = Machine()
    await end(await filled(tmp_path, machine))
    machine.running += 20
    machine.wall += 20 - passed
    life = await again(tmp_path, machine)
    left = life.held(dictionary(ANN, 1, 2))
    assert left is not None
    assert left == pytest.approx(40, abs=1)
    machine.wall -= 3600
    life = await again(tmp_path, machine)
    assert life.held(dictionary(ANN, 1, 2)) is None
    assert life.store.number(lease(BOB).body.key) == 7


async def test_a_clock_set_forward_only_shortens(tmp_path: Path) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    machine.wall += 3600
    life = await again(tmp_path, machine)
    assert life.held(dictionary(ANN, 1, 2)) is None


async def test_after_the_machine_was_started_anew_the_wall_clock_counts(tmp_path: Path) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    machine.wall += 20
    machine.running = 1.0
    life = await again(tmp_path, machine)
    assert life.held(dictionary(ANN, 1, 2)) == pytest.approx(40, abs=1)


async def test_no_edit_of_the_file_makes_a_record_live_longer_or_another_say_it(
    tmp_path: Path,
) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    with sqlite3.connect(tmp_path / FILE) as file:
        file.execute("UPDATE records SET left_ms = 9000000, forget_ms = 9000000")
        forged = dictionary(ANN, 9).raw.replace(b"\x09", b"\x08")
        file.execute("UPDATE records SET record = ? WHERE kind = 'prefix'", (forged,))
    file.close()
    life = await again(tmp_path, machine)
    assert len(life.store) == 2
    assert life.held(lease(BOB, number=7)) == pytest.approx(30, abs=1)
    assert life.held(manifest(ANN)) == pytest.approx(3600, abs=1)


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(5000)])
async def test_a_file_that_cannot_be_read_is_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    machine = Machine()
    life = await again(tmp_path, machine)
    assert len(life.store) == 0
    assert (tmp_path / "dht.damaged").read_bytes() == content
    life.store.put(dictionary(ANN, 1), trio.current_time())
    await end(life)
    assert (await again(tmp_path, machine)).held(dictionary(ANN, 1)) is not None


async def test_a_file_of_another_layout_is_set_aside(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as file:
        file.execute("PRAGMA user_version = 77")
    file.close()
    assert len((await again(tmp_path, Machine())).store) == 0
    assert (tmp_path / "dht.damaged").exists()


async def test_what_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    machine = Machine()
    life = await filled(tmp_path, machine)
    (tmp_path / FILE).mkdir()  # no file can be made there
    await end(life)
    (tmp_path / FILE).rmdir()
    await end(life)
    assert len((await again(tmp_path, machine)).store) == 3


async def test_what_is_removed_here_is_removed_there(tmp_path: Path) -> None:
    machine = Machine()
    life = await filled(tmp_path, machine)
    await end(life)
    life.store.expire(trio.current_time() + 7200)
    await end(life)
    assert len((await again(tmp_path, machine)).store) == 0


async def test_a_restored_record_does_not_replace_one_that_came_since(tmp_path: Path) -> None:
    machine = Machine()
    await end(await filled(tmp_path, machine))
    life = live(tmp_path, machine)
    newer = dictionary(ANN, 5, version=2)
    life.store.put(newer, trio.current_time())
    await life.keeper.restore()
    assert life.held(newer) is not None
    assert life.held(dictionary(ANN, 1, 2)) is None
