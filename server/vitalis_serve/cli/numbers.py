"""Whole numbers and times on the command line, refused in words of ours."""

import re

from vitalis_serve.errors import ConfigurationError


def whole(what: str, text: str, least: int, most: int, example: str) -> int:
    """`text` as a number from `least` to `most`. Raises ConfigurationError: what is accepted, and an example."""
    # int() takes signs, underscores and every script's digits; of longer ones none is meant.
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if number is None or not least <= number <= most:
        raise ConfigurationError(f"{what} {text!r}: give a whole number from {least} to {most}, for example {example}")
    return number


def duration(what: str, text: str, most: int, example: str) -> int:
    """`text` (90s, 30m, 24h, 7d) in seconds, 0 to `most`. Raises ConfigurationError: what is accepted."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    seconds = None if found is None else int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]
    if seconds is None or seconds > most:
        raise ConfigurationError(
            f"{what} {text[:40]!r}: give a number with s, m, h or d behind it, at most {most // 86_400}d, for example "
            f"{example}"
        )
    return seconds
