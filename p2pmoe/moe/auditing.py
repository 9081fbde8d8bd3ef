"""Computes some answers again, from the weights that their expert's server saved and signed.

Rows of sampled answers wait here for a saved state that is no more than a few updates away from
them (`moe.audit`): servers save now and then, so the audits of an expert that learns fast come with
its next save. The file is fetched from its server or a keeper, checked like any, and computed in a
thread. Who is caught with a wrong answer is asked last for long, and one warning says why.

Rules: a few samples an expert, a few experts' weights at once; nothing here holds up a pass. An
expert class that this program does not know is never imported because a peer names it.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import trio

from p2pmoe import telemetry
from p2pmoe.dht.directory import GridWatch
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import ConfigurationError, P2PMoEError
from p2pmoe.experts.archive import check_size
from p2pmoe.experts.backend import Backend, TrainParams
from p2pmoe.experts.copies_placing import Copies
from p2pmoe.experts.jobs import build
from p2pmoe.experts.manifest import Offer, offer_for
from p2pmoe.experts.snapshot import Disk, layout_of, unpack
from p2pmoe.identity import PeerId
from p2pmoe.moe.audit import FEW, Audits, Verdict
from p2pmoe.moe.calls import Ask, Tensors
from p2pmoe.moe.standing import Key, Standing
from p2pmoe.node import Node
from p2pmoe.wire.envelope import Signed

Statement = Signed[SnapshotRecord]

PERIOD = 10.0  # seconds between two looks for saved states; a guess
ROWS = 8  # of an answer that are computed again; a guess
SAMPLES = 4  # of one expert that wait, the latest; a guess
EXPERTS = 64  # that have samples; a guess
WEIGHTS = 4  # experts whose weights are kept; a guess


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Some rows of an answer. The expert had `step` updates under this lease."""

    lease: int
    step: int
    inputs: Tensors
    outputs: Tensors


@dataclass
class Auditor:
    """The audits of one grid."""

    node: Node
    watch: GridWatch
    standing: Standing
    rng: random.Random
    disk: Disk = field(default_factory=Disk)
    audits: Audits = field(init=False)
    _samples: OrderedDict[Key, deque[Sample]] = field(default_factory=OrderedDict)
    _weights: OrderedDict[bytes | str, Backend] = field(default_factory=OrderedDict)
    _arrived: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.audits = Audits(0.0, self.rng)
        self._copies = Copies(self.node.pool, self.node.dht.contact, lambda _: (), self.rng)

    async def run(self) -> None:
        """Audit what was sampled, until cancelled."""
        while True:
            await self._arrived.wait()
            await trio.sleep(PERIOD)
            self._arrived = trio.Event()
            try:
                offer = self._offer()
            except ConfigurationError as error:
                telemetry.emit(
                    "moe.audit.impossible", level="warning", error=error,
                    advice="register the experts' class here, or train without `audit`",
                )  # fmt: skip
                return
            for key in list(self._samples):
                await self._look(key, offer)
            if self._samples:
                self._arrived.set()

    def saw(self, ask: Ask, answer: Tensors, step: int, share: float) -> None:
        """A good answer came; keep some of its rows if it is to be audited."""
        self.audits.share, key = share, (ask.peer, ask.uid)
        if not self.audits.wanted(key):
            return
        rows = torch.tensor(self.rng.sample(range(ask.rows), min(ROWS, ask.rows)))
        inputs, outputs = (
            tuple(one.index_select(0, rows) for one in some) for some in (ask.inputs, answer)
        )
        kept = self._samples.setdefault(key, deque())
        kept.append(Sample(ask.lease, step, inputs, outputs))
        if len(kept) > SAMPLES:
            kept.popleft()
            self._unsure()
        if len(self._samples) > EXPERTS:
            self._samples.popitem(last=False)
        self._arrived.set()

    def _offer(self) -> Offer:
        assert self.watch.current is not None, "answers come from a grid that was read"
        return offer_for(self.watch.current.manifest, 0)

    async def _look(self, key: Key, offer: Offer) -> None:
        """Audit the samples of one expert that its latest saved state is near to."""
        peer, uid = key
        samples = self._samples[key]
        try:
            found = await self.node.dht.snapshots(offer.digest, uid)
            lease = samples[-1].lease
            own = (one for one in found if (one.signer, one.body.lease) == (peer, lease))
            saved = next(own, None)
            step = saved.body.step if saved else 0  # the first weights follow from the manifest
            for old in [one for one in samples if one.step < step - FEW]:
                samples.remove(old)
                self._unsure()
            for sample in [one for one in samples if one.step <= step + FEW]:
                backend = await self._weights_of(uid, saved, offer)
                cosine = await self.disk.run(_compare, backend, sample)
                self._judge(key, cosine, abs(step - sample.step))
                samples.remove(sample)
        except P2PMoEError as error:
            telemetry.emit("moe.audit.failed", peer=peer, expert=uid, error=error)
        if not samples:
            self._samples.pop(key, None)

    async def _weights_of(self, uid: str, saved: Statement | None, offer: Offer) -> Backend:
        """An expert as it was saved, or as it began; the error of the last source that failed."""
        name = saved.body.hash if saved else uid
        if name not in self._weights:
            device = torch.device("cpu")
            made = await self.disk.run(build, offer, uid, TrainParams(), device)
            if saved is not None:
                check_size(saved.body.bytes, layout_of(made.backend))
                sources = [saved.signer, *map(PeerId, saved.body.keepers)]
                data = await self._fetched(sources, saved.body)
                await self.disk.run(unpack, made.backend, data, saved.body)
            self._weights[name] = made.backend
            if len(self._weights) > WEIGHTS:
                self._weights.popitem(last=False)
        self._weights.move_to_end(name)
        return self._weights[name]

    async def _fetched(self, sources: Sequence[PeerId], record: SnapshotRecord) -> bytes:
        for source in sources[:-1]:
            try:
                return await self._copies.fetch(source, record)
            except P2PMoEError as error:
                telemetry.emit("moe.audit.failed", peer=source, expert=record.uid, error=error)
        return await self._copies.fetch(sources[-1], record)

    def _judge(self, key: Key, cosine: float, updates: int) -> None:
        peer, uid = key
        if self.audits.judge(cosine, updates) is Verdict.WRONG:
            seconds = self.standing.lied(key, trio.current_time())
            telemetry.emit(
                "moe.expert.lies", level="warning", peer=peer, expert=uid,
                cosine=round(cosine, 3), updates_apart=updates, asked_last_for_s=seconds,
                advice="its answer is not that of the weights its server saved: tell its operator",
            )  # fmt: skip

    def _unsure(self) -> None:
        """No saved state came near enough."""
        self.audits.verdicts[Verdict.UNSURE] += 1


def _compare(backend: Backend, sample: Sample) -> float:
    """The least cosine of a row's answer and what it should have been."""
    (outputs,) = backend.forward([sample.inputs])
    if isinstance(outputs, P2PMoEError):
        raise outputs
    pairs = zip(outputs, sample.outputs, strict=True)
    return min(
        float(torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1).min())
        for a, b in pairs
    )
