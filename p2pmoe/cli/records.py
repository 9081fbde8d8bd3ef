"""`p2pmoe records`: which peers hold what under a key, and where they disagree."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.joining import Joining, joining_options
from p2pmoe.cli.units import seconds_text
from p2pmoe.cli.verbs import Verb

if TYPE_CHECKING:
    from p2pmoe.dht.leases import RecordCopy
    from p2pmoe.dht.reading import Searched
    from p2pmoe.dht.service import DhtService
    from p2pmoe.identity import PeerId
    from p2pmoe.wire.envelope import Kind

_DIGITS = re.compile(r"[0-9a-f]{64}\Z")
COLUMNS = ("holder", "publisher", "says", "version", "left", "differs")


@click.command("records", cls=Verb)
@click.argument("key")
@joining_options
def command(
    *, key: str, peers: tuple[str, ...], network: str, timeout: float, as_json: bool
) -> None:
    """Show who holds what under KEY: a uid, a prefix, a grid's name, or a key in hex."""
    facts = Joining(peers, network, timeout).run(partial(_records, text=key))
    if as_json:
        print(json.dumps({"keys": facts}))
    else:
        for each in facts:
            _show(each)


async def _records(dht: DhtService, text: str) -> list[dict[str, Any]]:
    """What is under each key that the text may mean."""
    import trio

    facts = []
    for name, key in await _keys(dht, text):
        found = await dht.inspect(key)
        facts.append({"name": name, "key": key.hex()} | facts_of(found, trio.current_time()))
    return facts


async def _keys(dht: DhtService, text: str) -> list[tuple[str, bytes]]:
    """What the text may mean, and where that is kept."""
    from p2pmoe.dht.messages import NO_GRID, key_of
    from p2pmoe.errors import ExpertUnavailable
    from p2pmoe.wire.envelope import Kind

    if _DIGITS.match(text):
        return [("key", bytes.fromhex(text))]
    name, *coordinates = text.split(".")
    manifest = await dht.get_manifest(name)
    if manifest is None:
        raise ExpertUnavailable(f"no grid is named {name}")
    keys = [] if coordinates else [(f"manifest {name}", key_of(Kind.MANIFEST, NO_GRID, name))]
    kind = Kind.LEASE if len(coordinates) == len(manifest.body.cells) else Kind.PREFIX
    return [*keys, (f"{kind.value} {text}", key_of(kind, manifest.digest, text))]


def facts_of(found: Searched, now: float) -> dict[str, Any]:
    """What each holder has, and in what it differs from what most of them say."""
    from p2pmoe.dht.reading import wanted_copies

    kinds = dict.fromkeys(copy.signed.kind for copy in found.copies())
    wanted = [copy for kind in kinds for copy in wanted_copies(kind, _only(found, kind), now)]
    holders = [_holder(found, holder, wanted, now) for holder in found.holders]
    return {
        "holders": holders,
        "agreed": sorted({copy.signed.signer.hex for copy in wanted}),
        "disagreements": sum(bool(holder["differs"]) for holder in holders),
    }


def _holder(
    found: Searched, holder: PeerId, wanted: list[RecordCopy[Any]], now: float
) -> dict[str, Any]:
    answer = found.answers.get(holder)
    if answer is None:
        return {"peer": holder.hex, "records": [], "number": 0, "differs": ["no answer"]}
    has = {_about(copy): copy.signed for copy in answer.records}
    differs = []
    for copy in wanted:
        about, publisher = _about(copy), copy.signed.signer.hex[:8]
        if about not in has:
            differs.append(f"lacks {_what(copy)}{publisher}")
        elif has[about].digest != copy.signed.digest:
            differs.append(f"another version of {_what(copy)}{publisher}")
    agreed = set(map(_about, wanted))
    differs += [
        f"names {_what(copy)}{copy.signed.signer.hex[:8]}"
        for copy in answer.records
        if _about(copy) not in agreed
    ]
    records = [_record(copy, now) for copy in answer.records]
    return {"peer": holder.hex, "records": records, "number": answer.number, "differs": differs}


def _only(found: Searched, kind: Kind) -> Searched:
    """What was found of one kind: snapshots lie beside their lease."""
    answers = {
        peer: replace(
            answer, records=tuple(copy for copy in answer.records if copy.signed.kind is kind)
        )
        for peer, answer in found.answers.items()
    }
    return replace(found, answers=answers)


def _about(copy: RecordCopy[Any]) -> tuple[object, ...]:
    """What a record is about: of two about the same one is newer."""
    body = copy.signed.body
    return copy.signed.kind, copy.signed.signer, getattr(body, "step", None)


def _what(copy: RecordCopy[Any]) -> str:
    step = getattr(copy.signed.body, "step", None)
    return "" if step is None else f"step {step} of "


def _record(copy: RecordCopy[Any], now: float) -> dict[str, Any]:
    """One record: who signed it, what it says, which version, how long it lives here."""
    from p2pmoe.dht.messages import Lease, Manifest, SnapshotRecord

    body = copy.signed.body
    match body:
        case Lease():
            says, version = f"lease {body.number}", f"{body.epoch}.{body.incarnation}"
        case Manifest():
            says = f"{'x'.join(map(str, body.cells))} of {body.expert_class}"
            version = copy.signed.digest.hex()[:8]
        case SnapshotRecord():
            says = f"saved step {body.step}, {len(body.keepers)} copies"
            version = body.hash.hex()[:8]
        case _:
            says, version = f"{len(body.coordinates)} served", f"{body.epoch}.{body.incarnation}"
    return {
        "publisher": copy.signed.signer.hex,
        "says": says,
        "version": version,
        "left": round(copy.expires_at - now, 1),
    }


def _show(facts: dict[str, Any]) -> None:
    """A table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    holders = facts["holders"]
    print(
        f"{facts['name']}  key {facts['key'][:16]}  {len(holders)} holders"
        f"  {facts['disagreements']} disagree"
    )
    table = Table(*COLUMNS, box=box.SIMPLE)
    for holder in holders:
        peer, differs = holder["peer"][:8], ", ".join(holder["differs"])
        for row in holder["records"]:
            left = seconds_text(max(0.0, row["left"]))
            table.add_row(peer, row["publisher"][:8], row["says"], row["version"], left, differs)
        if not holder["records"]:
            table.add_row(peer, "", "nothing", "", "", differs)
    Console(highlight=False).print(table)
