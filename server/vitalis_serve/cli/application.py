"""The application: each module here adds its commands to it.

What a command needs is imported within it: `vitalis-serve --help` must not wait for a database's library.
Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 could not start, 130 interrupted, 143 terminated.
"""

import sys
from typing import Annotated

import typer

from vitalis_serve import __version__
from vitalis_serve.cli import configuration, fleet, keys, limits, tenants, usage
from vitalis_serve.cli import run as serving
from vitalis_serve.cli.failure import complain
from vitalis_serve.errors import ConfigurationError, StartError

app = typer.Typer(
    name="vitalis-serve",
    help="gpt-oss-20b for Vitalis: vLLM engines kept alive, one authenticated gateway in front.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (serving, fleet, tenants, keys, limits, usage, configuration):
    module.register(app)


def run(arguments: list[str] | None) -> int:
    """Runs one command (None: of sys.argv); returns the exit code."""
    try:
        code = app(arguments, prog_name="vitalis-serve", standalone_mode=False)
    except typer.TyperException as error:
        return _usage(error)
    except ConfigurationError as error:
        return _failed(str(error), 2)
    except StartError as error:
        return _failed(str(error), 3)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return code if isinstance(code, int) else 0


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """What is said before a command."""


def _usage(error: typer.TyperException) -> int:
    message: str = getattr(error, "format_message", error.__str__)()
    if message.startswith("Usage:"):  # a command that needs more words, given none
        sys.stderr.write(f"{message}\n")
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else app.info.name
    return _failed(f"{message.rstrip('.?')}; see `{command} --help`", 2)


def _failed(sentence: str, code: int) -> int:
    complain(sentence)
    return code
