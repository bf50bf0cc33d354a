"""How a command says what is wrong: one line on standard error, always with the program's name before it."""

import sys
from typing import NoReturn

import typer


def complain(sentence: str) -> None:
    sys.stderr.write(f"vitalis-serve: {sentence}\n")


def fail(sentence: str, code: int = 1) -> NoReturn:
    """Ends the command."""
    complain(sentence)
    raise typer.Exit(code)
