"""What callers get of a server: right answers, typed errors a part, and nobody else's trouble."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import trio
import trio.testing
from structlog.testing import capture_logs

from p2pmoe import telemetry
from p2pmoe.errors import ConfigurationError, LocalProtocolError, MalformedMessage
from p2pmoe.experts import grouped
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.jobs import Asked
from p2pmoe.experts.messages import (
    INFO,
    ExpertInfo,
    ForwardPart,
    ForwardRequest,
    InfoReply,
    InfoRequest,
    TensorSpec,
)
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import TensorDescriptor, layout
from tests.experts.calls import LEASE, FakeCall, Server, backward, forward, offer

UID, OTHER = "ffn.0.1", "ffn.3.3"


def rows(count: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
async def server(nursery: trio.Nursery) -> Server:
    return await Server().open(nursery, UID, OTHER)


async def together(server: Server, *calls: FakeCall) -> None:
    """Answer calls at once; they lie in the queue together."""
    async with trio.open_nursery() as answers:
        for call in calls:
            answers.start_soon(server.answer, call)


# ------------------------------------------------------------------ what is asked for
async def test_info_tells_what_is_held_and_nothing_of_the_rest(server: Server) -> None:
    body = schema.encode(InfoRequest(uids=(UID, "ffn.2.2", OTHER, UID)))
    server.leases.lost.add(OTHER)
    call = await server.answer(FakeCall(INFO, body, memoryview(b"")))
    row = (TensorSpec(dtype="float32", shape=(4,)),)
    assert schema.decode(call.parts[0][0], InfoReply).experts == (
        ExpertInfo(
            uid=UID,
            lease=LEASE,
            step=0,
            max_batch=16,
            expert_class="ffn",
            inputs=row,
            outputs=row,
        ),
    )


async def test_forward_answers_every_part_with_its_experts_outputs(server: Server) -> None:
    call = await server.answer(forward((UID, rows(3)), (OTHER, rows(2, seed=1))))
    assert call.codes == ["", ""]
    for index, (uid, x) in enumerate([(UID, rows(3)), (OTHER, rows(2, seed=1))]):
        _, (y,) = call.replies[index]
        assert torch.allclose(y, server.module(uid)(x), atol=1e-6)


async def test_backward_answers_input_gradients_and_counts_the_step(server: Server) -> None:
    x = rows(3).requires_grad_()
    server.module(UID)(x).backward(rows(3, seed=1))
    call = await server.answer(backward((UID, rows(3), rows(3, seed=1))))
    reply, (gradient,) = call.replies[0]
    assert torch.allclose(gradient, x.grad, atol=1e-6)
    assert reply.step == 1


async def test_calls_of_many_clients_for_one_expert_take_one_step(server: Server) -> None:
    calls = [backward((UID, rows(2, seed=n), rows(2, seed=n)), peer=n) for n in range(1, 6)]
    await together(server, *calls)
    assert [call.replies[0][0].step for call in calls] == [1] * 5
    assert server.service.experts[UID].backend.step == 1


async def test_a_repeated_update_is_answered_and_not_applied_again(server: Server) -> None:
    for expected, counter in ((1, 7), (1, 7), (2, 8)):
        call = await server.answer(backward((UID, rows(2), rows(2)), counter=counter))
        assert call.codes == [""]
        assert call.replies[0][0].step == expected
    call = await server.answer(backward((UID, rows(2), rows(2)), counter=8, peer=2))
    assert call.replies[0][0].step == 3, "ids of different clients are different"


async def test_a_dry_run_changes_nothing(server: Server) -> None:
    call = await server.answer(backward((UID, rows(2), rows(2)), dry_run=True))
    assert call.codes == [""]
    assert server.service.experts[UID].backend.step == 0


async def test_a_transformer_merges_sequences_of_one_length_only(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    spec = ExpertClass(name="transformer", hidden_dim=4)
    server = await Server().open(nursery, UID, expert_class=spec)
    inputs = [torch.randn(n, length, 4) for n, length in ((2, 3), (1, 5), (3, 3))]
    calls = [forward((UID, x), peer=n) for n, x in enumerate(inputs)]
    await together(server, *calls)
    for call, x in zip(calls, inputs, strict=True):
        assert torch.allclose(call.replies[0][1][0], server.module(UID)(x), atol=1e-5)
    call = await server.answer(backward((UID, torch.randn(2, 3, 4), torch.randn(2, 5, 4))))
    assert call.codes == ["schema"]


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("call", "code", "detail"),
    [
        (forward((UID, rows(2, width=5))), "schema", "[rows, 4], not [2, 5]"),
        (forward((UID, rows(2).double())), "schema", "float32, not float64"),
        (forward((UID, rows(17))), "schema", "takes 16 at once"),
        (forward((UID, torch.randn(4))), "schema", "[rows, 4], not [4]"),
        (forward((UID, torch.randn(2, 4, 1))), "schema", "not [2, 4, 1]"),
        (forward((UID, rows(2)), lease=4), "lease", "number 5, not 4"),
        (forward(("ffn.2.2", rows(2))), "unavailable", "does not serve ffn.2.2"),
        (forward(("\n", rows(2))), "unavailable", "does not serve \\n"),
        (forward((UID, rows(2) * float("nan"))), "nonfinite", "not all finite"),
        (backward((UID, rows(2), rows(2, width=3))), "schema", "gradients are [rows, 4]"),
        (backward((UID, rows(2), rows(2) * float("inf"))), "nonfinite", "not all finite"),
        (backward((UID, rows(2), rows(2)), lease=6), "lease", "number 5, not 6"),
    ],
)
async def test_a_bad_part_is_refused_by_a_typed_error(
    server: Server, call: FakeCall, code: str, detail: str
) -> None:
    call.parts.clear()
    await server.answer(call)
    reply, tensors = call.replies[0]
    assert reply.code == code
    assert detail in reply.detail
    assert tensors == []
    assert server.service.experts[UID].backend.step == 0


async def test_a_bad_part_harms_no_other_part_of_its_call(server: Server) -> None:
    call = await server.answer(
        forward((UID, rows(2)), (UID, rows(17)), ("ffn.9.9", rows(1)), (OTHER, rows(1)))
    )
    assert call.codes == ["", "schema", "unavailable", ""]
    assert torch.allclose(call.replies[3][1][0], server.module(OTHER)(rows(1)), atol=1e-6)


async def test_bad_callers_beside_eight_good_ones_harm_nobody(server: Server) -> None:
    good = [forward((UID, rows(2, seed=n)), peer=n) for n in range(1, 9)]
    bad = [
        forward((UID, rows(2, width=7)), peer=9),
        forward((UID, rows(2).long()), peer=10),
        forward((UID, rows(2) / 0), peer=12),
    ]
    for _ in range(3):
        for call in (*good, *bad):
            call.parts.clear()
        await together(server, *bad[:2], *good, *bad[2:])
        for n, call in enumerate(good, 1):
            expected = server.module(UID)(rows(2, seed=n))
            assert torch.allclose(call.replies[0][1][0], expected, atol=1e-6)
        assert [call.codes for call in bad] == [["schema"], ["schema"], ["nonfinite"]]


@pytest.mark.parametrize("call", [forward((UID, rows(2))), backward((UID, rows(2), rows(2)))])
async def test_a_payload_of_another_length_than_described_breaks_the_protocol(
    server: Server, call: FakeCall
) -> None:
    short = FakeCall(call.method, call.body, call.payload[:-4])
    with pytest.raises(MalformedMessage, match=r"tensor\.length"):
        await server.answer(short)
    assert short.parts == []


@pytest.mark.parametrize(
    "tensors",
    [
        (TensorDescriptor(dtype="float32", shape=(3, 4)),),
        (TensorDescriptor(dtype="float32", shape=()),),
        (
            TensorDescriptor(dtype="float32", shape=(2, 4)),
            TensorDescriptor(dtype="bool", shape=(1,)),
        ),
    ],
)
async def test_tensors_of_other_rows_than_the_parts_together_break_the_protocol(
    server: Server, tensors: tuple[TensorDescriptor, ...]
) -> None:
    part = ForwardPart(uid=UID, lease=LEASE, rows=2)
    body = schema.encode(ForwardRequest(parts=(part,), inputs=tensors))
    call = FakeCall("expert.forward", body, memoryview(bytearray(layout(tensors).total)))
    with pytest.raises(MalformedMessage, match=r"expert\.rows"):
        await server.answer(call)


@pytest.mark.parametrize("method", ["expert.info", "expert.forward", "expert.backward"])
async def test_a_request_that_is_no_message_breaks_the_protocol(
    server: Server, method: str
) -> None:
    for body in (b"", b"\xff", schema.encode(InfoReply(experts=()))):
        with pytest.raises(MalformedMessage):
            await server.answer(FakeCall(method, body, memoryview(b"")))


# ------------------------------------------------------------------ leases
async def test_without_its_lease_an_expert_is_not_served(server: Server) -> None:
    server.leases.lost.add(UID)
    call = await server.answer(forward((UID, rows(2)), (OTHER, rows(2))))
    assert call.codes == ["lease", ""]
    server.leases.lost.clear()
    call = await server.answer(forward((UID, rows(2))))
    assert call.codes == [""]


async def test_what_waits_for_an_expert_that_is_given_up_is_told(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    server = Server()
    await server.service.build(offer(), UID)
    call = forward((UID, rows(2)))
    nursery.start_soon(server.answer, call)
    await trio.testing.wait_all_tasks_blocked()
    server.service.remove(UID)
    await trio.testing.wait_all_tasks_blocked()
    assert call.codes == ["lease"]
    assert (await server.answer(forward((UID, rows(2))))).codes == ["unavailable"]


async def test_two_grids_of_one_name_are_not_served_side_by_side(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="served already"):
        await server.service.build(offer(grid="ffn.[0:9].[0:9]"), UID)


# ------------------------------------------------------------------ cancelled calls
async def test_a_cancelled_call_takes_its_parts_from_the_queue(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    server = Server()
    await server.service.build(offer(), UID)
    before = telemetry.counters().get('p2pmoe_parts_dropped_total{when="queued"}', 0)
    with trio.move_on_after(1):
        await server.answer(backward((UID, rows(2), rows(2)), (UID, rows(1), rows(1))))
    await nursery.start(server.service.run)
    call = await server.answer(forward((UID, rows(2))))
    assert call.codes == [""]
    assert server.service.experts[UID].backend.step == 0
    assert server.service.section()[UID]["dropped"] == 2
    after = telemetry.counters()['p2pmoe_parts_dropped_total{when="queued"}']
    assert after - before == 2


async def test_the_result_of_a_running_part_whose_call_is_cancelled_is_dropped(
    nursery: trio.Nursery,
) -> None:
    server = await Server(threaded=True).open(nursery, UID)
    begun, gate = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def hold(*_: object) -> None:
        token.run_sync_soon(begun.set)
        gate.wait(10)

    hook = server.module(UID).register_forward_pre_hook(hold)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as answers:
            answers.start_soon(server.answer, forward((UID, rows(2))))
            await begun.wait()
            scope.cancel()
    hook.remove()
    gate.set()
    assert (await server.answer(forward((UID, rows(2))))).codes == [""]
    assert server.service.section()[UID]["dropped"] == 1


async def test_an_answer_that_cannot_be_sent_ends_its_call_and_no_other(server: Server) -> None:
    class Unsendable(FakeCall):
        def post(self, body: bytes, payload: object = ()) -> None:
            raise LocalProtocolError("too long for this connection")

    good = forward((UID, rows(2)), peer=2)
    bad = Unsendable(good.method, good.body, good.payload)
    async with trio.open_nursery() as answers:
        answers.start_soon(server.answer, good)
        with pytest.raises(LocalProtocolError, match="too long"):
            await server.answer(bad)
    assert good.codes == [""]
    assert server.service.idle


async def test_a_call_that_has_ended_is_freed_without_the_garbage_collector(
    server: Server,
) -> None:
    gc.collect()
    gc.disable()
    try:
        await server.answer(forward((UID, rows(2)), ("ffn.2.2", rows(2))))
        assert not [one for one in gc.get_objects() if type(one) is Asked]
    finally:
        gc.enable()


async def test_parts_that_come_after_their_call_was_dropped_are_not_answered(
    server: Server,
) -> None:
    call = forward((UID, rows(2)), (OTHER, rows(2)))
    server.handlers[call.method].begin(call)
    call.dropped()
    call.dropped()
    await server.answer(forward((UID, rows(2))))
    assert call.parts == []
    assert not call.over.is_set()
    assert [server.service.section()[uid]["dropped"] for uid in (UID, OTHER)] == [1, 1]


async def test_experts_that_fail_together_are_computed_one_by_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("of torch")

    monkeypatch.setattr(grouped, "forward", fail)
    call = await server.answer(forward((UID, rows(2)), (OTHER, rows(1))))
    assert call.codes == ["", ""]
    assert torch.allclose(call.replies[1][1][0], server.module(OTHER)(rows(1)), atol=1e-6)


# ------------------------------------------------------------------ figures
async def test_the_status_tells_what_each_expert_has_done(server: Server) -> None:
    await server.answer(forward((UID, rows(3)), (UID, rows(2) * float("nan"))))
    await server.answer(backward((UID, rows(3), rows(3))))
    row = dict(server.service.section()[UID])
    row.pop("mean_us")
    assert row == {"calls": 3, "rows": 6, "updates": 1, "failed": 1, "dropped": 0, "lease": LEASE}
    assert server.service.section()[OTHER]["calls"] == 0


async def test_an_error_inside_an_expert_is_told_to_its_operator_too(
    nursery: trio.Nursery,
) -> None:
    alone = ExpertClass(name="nop", hidden_dim=4)
    server = await Server().open(nursery, UID, OTHER, expert_class=alone)

    def fail(*_: object) -> None:
        raise KeyError("of the module")

    server.module(UID).register_forward_pre_hook(fail)
    with capture_logs() as events:
        call = await server.answer(forward((UID, rows(2)), (OTHER, rows(2))))
    assert call.codes == ["internal", ""]
    assert [(event["event"], event["expert"]) for event in events] == [("expert.failed", UID)]


async def test_answers_of_a_real_compute_thread_are_the_same(nursery: trio.Nursery) -> None:
    server = await Server(threaded=True).open(nursery, UID, OTHER)
    calls = [forward((UID, rows(2, seed=n)), (OTHER, rows(1, seed=n)), peer=n) for n in range(1, 9)]
    await together(server, *calls)
    for n, call in enumerate(calls, 1):
        for index, (uid, count) in enumerate([(UID, 2), (OTHER, 1)]):
            expected = server.module(uid)(rows(count, seed=n))
            assert torch.allclose(call.replies[index][1][0], expected, atol=1e-6)
