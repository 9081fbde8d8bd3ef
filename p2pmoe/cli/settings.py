"""Where options come from: command line > `P2PMOE_<OPTION>` > TOML file > default.

The file is the one of `--config`, else of P2PMOE_CONFIG, else `config.toml` in the user's
configuration folder (XDG); never one of the current folder. P2PMOE_HOME moves that folder and the
state's. A key is an option's long name; at the top level it is meant for every verb that has it,
in a table such as `[node]` for that verb alone. What is wrong with the file is a
`ConfigurationError` that names file, key and the closest name that exists.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from p2pmoe.cli.units import Quantity
from p2pmoe.errors import ConfigurationError

PREFIX = "P2PMOE"
CONFIG_FILE = "config.toml"
NETWORK = "p2pmoe"  # the network that a verb means unless it is told otherwise

Options = Mapping[str, click.Option]  # by their one spelling


def spelling(name: str) -> str:
    """The one spelling of a name that may be written with `_` or `-`."""
    return name.replace("_", "-")


def config_folder() -> Path:
    """Where the configuration is read from; it may not exist."""
    return _home() or _folders().user_config_path


def state_folder() -> Path:
    """Where a node keeps its key, unless it is told otherwise; it may not exist."""
    home = _home()
    return home / "state" if home else _folders().user_state_path


def _home() -> Path | None:
    home = os.environ.get(f"{PREFIX}_HOME")
    return Path(home).expanduser() if home else None


def _folders() -> Any:
    import platformdirs

    return platformdirs.PlatformDirs("p2pmoe", appauthor=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a file, as the file spells it, with an option that it sets."""

    key: str
    verb: str
    option: click.Option
    value: Any


def load(file: Path) -> dict[str, Any]:
    """What a TOML file says, unchecked."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{file} is not TOML: {error}") from None


def values_for(
    verb: str, content: Mapping[str, Any], known: Mapping[str, Options], file: Path
) -> dict[str, Any]:
    """The values that a file has for one verb, by parameter name; every key must be known."""
    try:
        entries = [*_top_level(content, known), *_tables(content, known)]
        return {str(e.option.name): _checked(e) for e in entries if e.verb == verb}
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None


def _top_level(content: Mapping[str, Any], known: Mapping[str, Options]) -> Iterator[Entry]:
    for key, value in content.items():
        if isinstance(value, dict):
            continue
        owners = [verb for verb, options in known.items() if spelling(key) in options]
        if not owners:
            raise _unknown(key, {name for options in known.values() for name in options})
        for verb in owners:
            yield Entry(key, verb, known[verb][spelling(key)], value)


def _tables(content: Mapping[str, Any], known: Mapping[str, Options]) -> Iterator[Entry]:
    for verb, table in content.items():
        if not isinstance(table, dict):
            continue
        if verb not in known:
            raise _unknown(f"[{verb}]", [f"[{name}]" for name in known])
        for key, value in table.items():
            if spelling(key) not in known[verb]:
                raise _unknown(f"{verb}.{key}", [f"{verb}.{name}" for name in known[verb]])
            yield Entry(f"{verb}.{key}", verb, known[verb][spelling(key)], value)


def _unknown(key: str, names: Iterable[str]) -> ConfigurationError:
    close = get_close_matches(spelling(key), sorted(names), n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return ConfigurationError(f"there is no {key}{hint}")


def _checked(entry: Entry) -> Any:
    """The value, if its TOML type suits the option and it makes sense; click converts it later."""
    option, value = entry.option, entry.value
    items = value if option.multiple and isinstance(value, list) else [value]
    for item in items:
        if not _suits(item, option):
            wanted = "true or false" if option.is_flag else f"a {option.type.name}"
            many = " or a list of them" if option.multiple else ""
            raise ConfigurationError(f"{entry.key} is {wanted}{many}, not {item!r}")
        try:
            option.type.convert(item, option, None)
        except click.BadParameter as error:
            raise ConfigurationError(f"{entry.key}: {error.message}") from None
    return items if option.multiple else value


def _suits(value: Any, option: click.Option) -> bool:
    if option.is_flag or isinstance(value, bool):
        return option.is_flag and isinstance(value, bool)
    if isinstance(option.type, click.types.IntParamType):
        return isinstance(value, int)
    if isinstance(option.type, click.types.FloatParamType):
        return isinstance(value, int | float)
    takes_numbers = isinstance(option.type, Quantity)
    return isinstance(value, str) or (takes_numbers and isinstance(value, int | float))
