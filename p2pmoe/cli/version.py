"""`p2pmoe version`: what a bug report begins with."""

from __future__ import annotations

import json
import platform

import click

from p2pmoe.cli.verbs import Verb

BENEATH = ("torch", "trio")


@click.command("version", cls=Verb)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(*, as_json: bool) -> None:
    """Print the versions of p2pmoe, its protocol, Python and what it stands on."""
    from p2pmoe.net.messages import VERSION_MAX
    from p2pmoe.version import __version__

    facts: dict[str, str | int | None] = {
        "p2pmoe": __version__,
        "protocol": VERSION_MAX,
        "python": platform.python_version(),
        **{name: _installed(name) for name in BENEATH},
        "platform": platform.platform(),
    }
    if as_json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<10}{value if value is not None else 'not installed'}")


def _installed(distribution: str) -> str | None:
    """The version of a package, read from its metadata: importing torch takes a second."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
