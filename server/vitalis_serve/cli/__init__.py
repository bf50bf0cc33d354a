"""The command line: argv in, exit code out. Importing this costs nothing; `application.py` has the commands.

A process that runs `main` is told to end at any moment, from its first line on: Ctrl-C is no fault, and no traceback.
"""

import os
import signal
from types import FrameType

# SIGHUP too: the terminal was closed.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. What is wrong is said in one line on standard error.

    Without `arguments` this process's own are taken, and the process is ours: SIGINT, SIGTERM and SIGHUP end it quietly
    with 128 and their number, until the supervisor takes them over.
    """
    ours = arguments is None
    if ours:
        _answer_signals(_leave)  # importing takes the better part of a second
    from vitalis_serve.cli.application import run

    if ours:
        _answer_signals(_unwind)
    try:
        return run(arguments)
    finally:
        if ours:
            _answer_signals(signal.SIG_IGN)  # it ends already


def _answer_signals(answer: "signal._HANDLER") -> None:
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or `&` in a script
            signal.signal(number, answer)


def _leave(number: int, _frame: FrameType | None) -> None:
    # Nothing has been begun. An exception could get lost: one out of a destructor is printed and forgotten.
    os._exit(128 + number)


def _unwind(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
