"""`p2pmoe demo`: a swarm of processes on this machine trains on real digits and loses one of them.

stdout is for the summary, or with `--json` for one line; what happens meanwhile goes to stderr.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from typing import Any

import click

from p2pmoe.cli.units import DURATION
from p2pmoe.cli.verbs import Verb

STEPS = 300  # enough to learn what can be learnt of 1,437 images
SECONDS = 60.0  # of training, for a machine that is slow or busy; a third of the steps do, too


@click.command("demo", cls=Verb)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help=f"Training steps.  [default: {STEPS}, or as many as {SECONDS:g} s are enough for]",
)
@click.option("--servers", type=click.IntRange(2, 16), default=4, help="Server processes.")
@click.option("--no-kill", is_flag=True, help="Let all servers live.")
@click.option("--seed", type=int, default=0, help="Of the gates' weights and the batches.")
@click.option("--seconds", type=DURATION, help="End the training after so long.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    *, steps: int | None, seconds: float | None, as_json: bool, no_kill: bool, **options: Any
) -> None:
    """Train a mixture of experts over a real swarm on this machine, and kill a server on the way.

    Servers are processes of their own, found and called over encrypted TCP. Beside the model whose
    experts live in them, the same one is trained in plain torch, to compare with. Takes about a
    minute; needs scikit-learn for its 1,797 images of handwritten digits.
    """
    import torch

    from p2pmoe.cli.demo_training import DemoOptions, run_demo
    from p2pmoe.cli.demo_view import open_view, rounded, show_summary
    from p2pmoe.testing.processes import open_servers

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)  # the servers need the other cores
    limit = seconds or (math.inf if steps else SECONDS)
    asked = DemoOptions(steps=steps or STEPS, seconds=limit, kill=not no_kill, **options)
    with open_view(asked.steps) as view, open_servers(view.say) as servers:
        result = run_demo(asked, servers, view)
    show_summary(result, sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(rounded(result)))
