"""The command `vitalis-load`. Each subcommand is a module of `commands`, imported when it is called."""

import importlib
import sys

import typer

from vitalis_load.errors import Exit, LoadFailure

COMMANDS = ("run", "report", "compare", "sweep", "tune", "overhead", "plan", "bench_gpu", "scenarios")


def application(name: str = "") -> typer.Typer:
    """With every subcommand, or with the one that is called (others need not be imported for it)."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_about)
    for command in (name,) if name in COMMANDS else COMMANDS:
        module = importlib.import_module(f"vitalis_load.commands.{command}")
        app.command(command.replace("_", "-"))(getattr(module, command))
    return app


def _about() -> None:
    """Load tests in tokens per second that can be believed, looked at and compared."""


def main() -> None:
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "").replace("-", "_")
    try:
        application(name)()
    except LoadFailure as failure:
        print(f"vitalis-load: {failure.message}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
