"""The verbs: their names, how one is imported, and what all of them share.

A verb is a file of this folder whose `command` is a `Verb`. It imports click and the standard
library alone; what it needs to do its work, it imports when it is called.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from p2pmoe.cli.settings import (
    CONFIG_FILE,
    PREFIX,
    Options,
    config_folder,
    load,
    spelling,
    values_for,
)

VERBS = {
    "node": "Serve experts of a swarm, or help its members to find each other.",
    "demo": "Train on real digits over a swarm of processes on this machine.",
    "status": "Ask a node what it sees and what it does.",
    "experts": "List who serves which expert of a swarm, under which lease.",
    "records": "Show which peers hold what under a key, and where they disagree.",
    "call": "Send random rows to one expert and print what comes back.",
    "peers": "List the members of the swarm, as a node sees them.",
    "ping": "Reach a peer step by step, and say how long each step takes.",
    "bench": "Measure how fast this installation is, and compare it to others.",
    "simulate": "Run the membership or the DHT of thousands of peers in virtual time.",
    "drain": "Ask this machine's node to leave: save, hand its experts over, end.",
    "export": "Save the newest state of every expert of a swarm in a folder.",
    "import": "Put an export into the state folder of a node that is not running.",
    "key": "Print the public key and the id of this machine's node.",
    "version": "Print the versions of p2pmoe and of what it stands on.",
}
FILES = {"import": "import_swarm"}  # whose name is a word of Python


class Verb(click.Command):
    """A verb of the command line. It has `--config` and takes what is not given from settings."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        config = click.Option(
            ["--config"],
            type=click.Path(path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            metavar="FILE",
            help=f"TOML file with options; by default {CONFIG_FILE} in the configuration folder.",
        )
        attributes["params"] = [*attributes.get("params", ()), config]
        attributes["context_settings"] = {
            "auto_envvar_prefix": PREFIX,
            "help_option_names": ["-h", "--help"],
            "max_content_width": 100,
            "show_default": True,
            "token_normalize_func": spelling,
        }
        super().__init__(*args, **attributes)

    @property
    def options(self) -> Options:
        """The options that a file may set."""
        found = [param for param in self.params if isinstance(param, click.Option)]
        return {spelling(o.opts[0].lstrip("-")): o for o in found if o.expose_value}


def _read_config(ctx: click.Context, _param: click.Parameter, given: Path | None) -> None:
    file = given or config_folder() / CONFIG_FILE
    if given is None and not file.is_file():
        return
    known = {name: load_verb(name).options for name in VERBS}
    ctx.default_map = values_for(str(ctx.command.name), load(file), known, file)


def load_verb(name: str) -> Verb:
    """Import a verb of the table."""
    verb: Verb = importlib.import_module(f"p2pmoe.cli.{FILES.get(name, name)}").command
    return verb
