"""`p2pmoe call`: random rows for one expert, to see whether and how it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.settings import NETWORK
from p2pmoe.cli.units import DURATION
from p2pmoe.cli.verbs import Verb

if TYPE_CHECKING:
    import torch

    from p2pmoe.experts.messages import TensorSpec

ANY_SIZE = 8  # where an expert takes any, such as the length of a sequence


@click.command("call", cls=Verb)
@click.argument("uid")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    required=True,
    metavar="HOST:PORT[/ID]",
    help="A peer of the swarm, not necessarily the expert's server. May be repeated.",
)
@click.option("--network", default=NETWORK, help="The swarm's network.")
@click.option("--rows", type=click.IntRange(min=1), default=4, help="How many rows to send.")
@click.option("--backward", is_flag=True, help="Ask for gradients too; changes nothing.")
@click.option("--apply", is_flag=True, help="Let the backward pass update the expert.")
@click.option("--timeout", type=DURATION, default="10s", help="Give up after so long.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(uid: str, **options: Any) -> None:
    """Send random rows to the expert UID, such as ffn.2.5, and print what comes back."""
    if options["apply"] and not options["backward"]:
        raise click.UsageError("--apply goes with --backward", click.get_current_context())
    facts = _call(uid, options)
    if options["as_json"]:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<16}{value}")


def _call(uid: str, options: dict[str, Any]) -> dict[str, Any]:
    """Call the expert; what there is to say of it."""
    from p2pmoe.errors import ExpertUnavailable
    from p2pmoe.experts.uid import ExpertUid
    from p2pmoe.moe.link import open_link
    from p2pmoe.moe.remote import RemoteExpert
    from p2pmoe.swarm import connect

    timeout = options["timeout"]
    expert_uid = ExpertUid.parse(uid)
    with connect(options["peers"], network=options["network"], timeout=timeout) as swarm:
        link = open_link(swarm, expert_uid.name, timeout)
        if expert_uid not in link.grid:
            raise ExpertUnavailable(f"there is no {uid}: the grid is {link.grid}", expert=uid)
        view = link.view(timeout, uid=uid)
        expert = RemoteExpert(swarm, uid, timeout=timeout).train(options["apply"])
        inputs = [_random(spec, options["rows"]) for spec in link.inputs]
        outputs, seconds = _timed(lambda: expert(*inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        facts = {
            "uid": uid,
            "peer": view.peers[view.uids.index(uid)].hex,
            "rows": options["rows"],
            "shapes": [list(output.shape) for output in outputs],
            "output_norms": [_norm(output) for output in outputs],
            "forward_ms": round(seconds * 1000, 2),
        }
        if options["backward"]:
            facts |= _backward(inputs, outputs) | {"applied": options["apply"]}
        return facts


def _backward(inputs: list[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Ask for the gradient of the outputs' sum."""
    import torch

    loss = torch.stack([output.sum() for output in outputs if output.is_floating_point()]).sum()
    _, seconds = _timed(loss.backward)
    norms = [_norm(one.grad) for one in inputs if one.grad is not None]
    return {"gradient_norms": norms, "backward_ms": round(seconds * 1000, 2)}


def _random(spec: TensorSpec, rows: int) -> torch.Tensor:
    """Rows that an expert takes: normally distributed, or zeros where it wants integers."""
    import torch

    from p2pmoe.experts.tensors import TORCH_DTYPES

    dtype = TORCH_DTYPES[spec.dtype]
    shape = (rows, *(ANY_SIZE if size is None else size for size in spec.shape))
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape).to(dtype).requires_grad_()


def _norm(tensor: torch.Tensor) -> float:
    return round(float(tensor.detach().double().norm()), 6)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began
