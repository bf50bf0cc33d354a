"""How a command ends. Each failure is one sentence: what, where, what to do."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `vitalis-load`."""

    OK = 0
    MISSED = 1  # an SLO was missed, or `compare` found the second run worse
    BAD_INPUT = 2  # a scenario, trace, option or result that cannot be used
    NO_TARGET = 3  # the server is not there, refuses the key, or does not serve the model
    CANNOT_WRITE = 4  # a full disk, a folder that cannot be written
    INTERRUPTED = 130  # what was measured is kept; the report says that it is partial


class LoadFailure(Exception):
    """Ends a command with one sentence for the person at the terminal."""

    def __init__(self, message: str, code: Exit = Exit.BAD_INPUT) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
