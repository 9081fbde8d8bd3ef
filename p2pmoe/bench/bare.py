"""The other limit: the block behind a TLS stream that knows no peers, experts, calls or deadlines.

One process computes, as `python -m p2pmoe.bench.bare HIDDEN THREADS PEM`. This one sends it rows
and gets rows back: sockets that block, a thread and a connection for each caller, one computation
at a time. What a server of experts adds to that is ours.
"""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import torch
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from p2pmoe.bench.experts import Ffn
from p2pmoe.bench.work import Metrics, hammer, record
from p2pmoe.identity import KeyPair
from p2pmoe.net.certificates import make_authority

HEAD = struct.Struct("!BI")  # what to do, and how many rows follow
FORWARD, BACKWARD = range(2)
LEARNING_RATE = 1e-3  # of the block, as its servers have it
VALID = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BareParams:
    """One block of `hidden` features, asked for `batch` rows by so many callers at once."""

    hidden: int = 1024
    batch: int = 2048
    threads: int = 2
    concurrency: tuple[int, ...] = (1, 4)
    seconds: float = 4.0


def run(params: BareParams) -> Metrics:
    """Rows a second: forward, and forward with backward, which computes forward again."""
    torch.set_num_threads(1)
    metrics: Metrics = {}
    x = torch.randn(params.batch, params.hidden)
    with _computing(params) as connect, ExitStack() as ends:
        callers = [ends.enter_context(connect()) for _ in range(max(params.concurrency))]
        for name, orders in (("forward", [FORWARD]), ("train", [FORWARD, BACKWARD])):
            for count in params.concurrency:
                free = callers[:count]
                tally = hammer(partial(_call, free, orders, x), count, params.seconds)
                metrics[f"{name}_batch{params.batch}_c{count}"] = tally.summary(params.batch)
    return record("bare_tls", asdict(params), metrics, by="torch")


@contextmanager
def _computing(params: BareParams) -> Iterator[Callable[[], ssl.SSLSocket]]:
    """A process that computes until the block ends; how to connect to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # its cost is no call's
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder) / "both.pem"
        pem.write_bytes(_certificate())
        command = [
            sys.executable,
            "-m",
            __name__,
            str(params.hidden),
            str(params.threads),
            str(pem),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  this module
            assert process.stdout is not None
            address = ("127.0.0.1", int(process.stdout.readline()))
            try:
                yield lambda: context.wrap_socket(socket.create_connection(address))
            finally:
                process.kill()


def _call(free: list[ssl.SSLSocket], orders: list[int], x: torch.Tensor) -> None:
    """What one caller does, over a connection that nobody uses."""
    stream = free.pop()
    for order in orders:
        stream.sendall(HEAD.pack(order, len(x)))
        for _ in range(1 + order):  # backward sends the gradient, too
            stream.sendall(x.numpy().data.cast("B"))
        _receive(stream, len(x), x.shape[1])
    free.append(stream)


def _receive(stream: ssl.SSLSocket, rows: int, hidden: int) -> torch.Tensor:
    """So many rows, in place."""
    x = torch.empty(rows, hidden)
    left = x.numpy().data.cast("B")
    while left:
        if not (got := stream.recv_into(left)):
            raise EOFError
        left = left[got:]
    return x


def _certificate() -> bytes:
    """A key and a certificate, as PEM."""
    key, today = KeyPair.generate(), datetime.now(UTC)
    certificate = make_authority(key, today - VALID, today + VALID)
    private = key.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private + certificate.public_bytes(Encoding.PEM)


class Computer:
    """The block, and who asks it."""

    def __init__(self, hidden: int) -> None:
        self._hidden, self.block, self._turn = hidden, Ffn(hidden), threading.Lock()
        self._sgd = torch.optim.SGD(self.block.parameters(), lr=LEARNING_RATE)

    def serve(self, stream: ssl.SSLSocket) -> None:
        """Answer one caller until it leaves."""
        head = bytearray(HEAD.size)
        while stream.recv_into(head) == HEAD.size:
            order, rows = HEAD.unpack(head)
            x, *gradient = (_receive(stream, rows, self._hidden) for _ in range(1 + order))
            with self._turn:
                y = self.backward(x, *gradient) if order == BACKWARD else self.forward(x)
            stream.sendall(y.numpy().data.cast("B"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows to rows, (T, D)."""
        with torch.no_grad():
            y: torch.Tensor = self.block(x)
        return y

    def backward(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the rows (T, D), computed anew from them; the block takes a step."""
        x.requires_grad_(True)
        self._sgd.zero_grad(set_to_none=True)
        torch.autograd.backward(self.block(x), gradient)
        self._sgd.step()
        assert x.grad is not None
        return x.grad


def main(hidden: int, threads: int, pem: str) -> None:
    """Compute for whoever connects, until killed."""
    torch.set_num_threads(threads)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(pem)
    computer = Computer(hidden)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)  # noqa: T201  for whoever started it
        while True:
            stream = context.wrap_socket(listener.accept()[0], server_side=True)
            threading.Thread(target=computer.serve, args=(stream,), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
