"""The command line: verbs that are imported when they are called, one line an error, exit codes.

Rules: this file and whatever `--help` reaches import click alone. stdout is for data, everything
else goes to stderr. Exit codes stand in one table, `EXIT_CODES`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import click
from click.core import ParameterSource

from p2pmoe import errors
from p2pmoe.cli.settings import PREFIX, spelling
from p2pmoe.cli.verbs import VERBS, load_verb
from p2pmoe.errors import P2PMoEError

OK, BUG, USAGE, INTERRUPTED = 0, 1, 2, 130
NOT_RUNNING, UNHEALTHY = 3, 4
CONFIGURATION = 78

# The first match counts. Numbers from sysexits.h where it has one.
EXIT_CODES: tuple[tuple[type[P2PMoEError], int], ...] = (
    (errors.DuplicateIdentity, UNHEALTHY),
    (errors.PeerUnreachable, 69),
    (errors.StateError, 73),
    (errors.CallTimeout, 75),
    (errors.ExpertUnavailable, 75),
    (errors.PeerBusy, 75),
    (errors.LeaseLost, 75),
    (errors.QuorumNotReached, 75),
    (errors.NodeClosed, 75),
    (errors.RemoteProtocolError, 76),
    (errors.VersionMismatch, 76),
    (errors.NotAllowed, 77),
    (errors.ConfigurationError, CONFIGURATION),
    (errors.AddressInUse, 98),
    (P2PMoEError, BUG),
)
MESSAGE_LENGTH = 1000  # characters of an error that are printed; a guess


class NotRunning(click.ClickException):
    """Nothing answers where this machine's own node would."""

    exit_code = NOT_RUNNING


class Verbs(click.Group):
    """The group of all verbs. It knows their names and loads one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """In the order in which they matter."""
        return list(VERBS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002  click's signature
        cmd_name: str,
    ) -> click.Command | None:
        """The verb of this name, imported now."""
        return load_verb(cmd_name) if cmd_name in VERBS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown verb names the closest."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"there is no verb {args[0]!r}{_closest(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002  click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        """List the verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _closest(word: str) -> str:
    close = get_close_matches(word, VERBS, n=1)
    return f", did you mean {close[0]!r}?" if close else f": known are {', '.join(VERBS)}"


@click.group(
    cls=Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": spelling,
    },
    epilog="`p2pmoe VERB --help` says what a verb does and takes.",
    subcommand_metavar="VERB [OPTIONS]",
)
def app() -> None:
    """Train mixtures of experts over computers that do not belong to one owner."""


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Errors are one line on stderr."""
    try:
        code = app.main(list(arguments), prog_name="p2pmoe", standalone_mode=False)
    except click.ClickException as error:
        return _refuse(error)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  the last place to report it at
        return _report(error)
    return code if isinstance(code, int) else OK


def _refuse(error: click.ClickException) -> int:
    """Say what is wrong with how a verb was called."""
    ctx = getattr(error, "ctx", None)
    param = getattr(error, "param", None)
    where = ctx.command_path if ctx else "p2pmoe"
    message = " ".join(error.format_message().split())
    if ctx and param and ctx.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT:
        _say(f"p2pmoe: {PREFIX}_{param.name.upper()}: {message}")
        return CONFIGURATION
    hint = f" ({where} --help says more)" if isinstance(error, click.UsageError) else ""
    _say(f"p2pmoe: {message}{hint}")
    return error.exit_code


def _report(error: BaseException) -> int:
    """One line for what is foreseen, a traceback for a bug."""
    causes = list(_leaves(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return INTERRUPTED
    if not all(isinstance(cause, P2PMoEError) for cause in causes):
        traceback.print_exception(error)
        return BUG
    first = causes[0]
    assert isinstance(first, P2PMoEError)
    _say(one_line(first))
    return exit_code(first)


def exit_code(error: P2PMoEError) -> int:
    """The code that the process exits with for an error that reaches the top."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def one_line(error: P2PMoEError) -> str:
    """`p2pmoe: stage address: message`, with what is known of stage and address."""
    where = " ".join(part for part in (error.stage, error.address) if part)
    message = errors.printable(str(error) or type(error).__name__, MESSAGE_LENGTH)
    message = message.removeprefix(f"{error.address}: ").removeprefix(f"{error.stage}: ")
    return f"p2pmoe: {where}: {message}" if where else f"p2pmoe: {message}"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _say(line: str) -> None:
    print(line, file=sys.stderr)
