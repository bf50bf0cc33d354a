"""Whole numbers on the command line, refused in words of ours."""

from vitalis_serve.errors import ConfigurationError


def whole(what: str, text: str, least: int, most: int, example: str) -> int:
    """`text` as a number from `least` to `most`. Raises ConfigurationError: what is accepted, and an example."""
    # int() takes signs, underscores and every script's digits; of longer ones none is meant.
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if number is None or not least <= number <= most:
        raise ConfigurationError(f"{what} {text!r}: give a whole number from {least} to {most}, for example {example}")
    return number
