"""One process of the peer system: a server of experts or, without any, an idle peer of its DHT.

It prints two lines of JSON: when hivemind is loaded, and where it listens when it can be used. It
ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial

import hivemind
import torch
from hivemind.moe.server.layers import register_expert_class
from torch import nn

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


class Nop(nn.Module):
    """Gives back what it gets. Its weight is there for the optimiser."""

    def __init__(self, _hidden: int) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 * self.unused if torch.is_grad_enabled() else x.clone()


def ffn(hidden: int, inner: int) -> nn.Module:
    """Two linear maps."""
    return nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))


def serve(given: argparse.Namespace) -> hivemind.moe.Server:
    """A server of the experts that the command line names, ready to be asked."""
    inner = given.inner or 4 * given.hidden
    for name, block in (("bench_nop", Nop), ("bench_ffn", partial(ffn, inner=inner))):
        register_expert_class(name, lambda rows, hidden: torch.empty(rows, hidden))(block)
    server = hivemind.moe.Server.create(
        expert_uids=given.uids,
        expert_cls=given.cls,
        hidden_dim=given.hidden,
        num_handlers=given.handlers if given.handlers > 0 else None,
        max_batch_size=given.max_batch,
        optim_cls=partial(torch.optim.SGD, lr=1e-3),
        device="cpu",
        initial_peers=given.peers,
        host_maddrs=LOOPBACK,
        start=False,
    )
    server.run_in_background(await_ready=True)
    return server


def main() -> None:
    """Say what is up, and wait for the end."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--uids", nargs="*", default=[])
    words.add_argument("--cls", default="bench_ffn")
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--inner", type=int, default=0)
    words.add_argument("--handlers", type=int, default=-1)
    words.add_argument("--max-batch", type=int, default=4096)
    words.add_argument("--threads", type=int, default=0)
    words.add_argument("--peers", nargs="*", default=[])
    given = words.parse_args()
    print(json.dumps({"imported": True}), flush=True)
    if given.threads:
        torch.set_num_threads(given.threads)
    server = serve(given) if given.uids else None
    dht = server.dht if server else hivemind.DHT(start=True, host_maddrs=LOOPBACK)
    where = {"peers": [*map(str, dht.get_visible_maddrs())], "id": dht.peer_id.to_base58()}
    print(json.dumps(where), flush=True)
    sys.stdin.read()
    if server:
        server.shutdown()
    os._exit(0)  # hivemind's threads would go on


if __name__ == "__main__":
    main()
