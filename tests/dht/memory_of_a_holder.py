"""How much memory a holder takes: `python -m tests.dht.memory_of_a_holder`.

Fills one peer's cores as strangers fill them, and prints by how much the process grew: 10,000
records of 100 publishers and 1,000 contacts, and then what one publisher that offers 100,000
uids adds.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from p2pmoe.dht.contacts import ContactParams, Contacts
from p2pmoe.dht.messages import Lease
from p2pmoe.dht.records import Others, RecordParams, RecordStore
from p2pmoe.identity import KeyPair
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.peer_record import PeerRecord, seal_record
from tests.dht.swarm_of_ids import GRID, NETWORK, dice

RECORDS, PUBLISHERS, CONTACTS, FLOOD = 10_000, 100, 1_000, 100_000
MIB = 1 << 20


def resident() -> float:
    """Memory of this process in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def main(flood: int = FLOOD) -> dict[str, float]:
    """The figures, in MiB."""
    rng = dice(1)
    people = [KeyPair.from_seed(rng.randbytes(32)) for _ in range(CONTACTS)]
    store = RecordStore(RecordParams(leases_per_grid=RECORDS), started_at=0.0)
    contacts = Contacts(KeyPair.from_seed(bytes(32)).peer_id, ContactParams(), now=0.0)
    before = resident()
    for number, keys in enumerate(people):
        addresses = (f"10.0.{number // 250}.{number % 250 + 1}:4747",)
        record = PeerRecord(epoch=1, incarnation=1, addresses=addresses)
        contacts.learn(seal_record(keys, record, NETWORK))
        contacts.dialled(keys.peer_id, 0.0)
    with_contacts = resident()
    for number in range(RECORDS):
        uid = f"ffn.{number // 100}.{number % 100}"
        body = Lease(grid=GRID, uid=uid, number=1, epoch=1, incarnation=1, ttl_ms=30_000)
        lease = seal(people[number % PUBLISHERS], body, kind=Kind.LEASE, network=NETWORK)
        store.decide(lease, Others(), 0.0)
    with_records, held = resident(), len(store)
    eve = KeyPair.from_seed(b"e" * 32).peer_id
    for number in range(flood):
        uid = f"ffn.{number % 60_000}.{number // 60_000}"
        body = Lease(
            grid=rng.randbytes(32), uid=uid, number=1, epoch=1, incarnation=1, ttl_ms=30_000
        )
        # Verified elsewhere: a store takes it as signed.
        store.decide(Signed(eve, eve.raw, Kind.LEASE, body, rng.randbytes(310)), Others(), 0.0)
    flooded = resident()
    return {
        "contacts": with_contacts - before,
        "records": with_records - with_contacts,
        "held": held,
        "counted": store.shelves.bytes / MIB,
        "flood": flooded - with_records,
    }


if __name__ == "__main__":
    for name, figure in main().items():
        sys.stdout.write(f"{name:<10}{figure:.1f}\n")
