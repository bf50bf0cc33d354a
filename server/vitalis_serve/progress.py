"""Lines of progress for a person: one bar that is drawn over on a terminal, a line every few seconds elsewhere.

What prepares a model runs in a process of its own and says plain lines, some with a share in them: "(42 %)".
"""

import re
import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

LINE_SECONDS: Final = 10.0
WIDTH: Final = 30
_SHARE = re.compile(r"\((\d{1,3}) %\)")


class ProgressLines:
    """`say` gets the lines that are kept; `screen` is drawn on if it is a terminal."""

    def __init__(
        self,
        say: Callable[[str], None],
        screen: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._screen = sys.stderr if screen is None else screen
        self._terminal = self._screen.isatty()
        self._now = now
        self._said_at = float("-inf")
        self._drawn = False

    def __call__(self, line: str) -> None:
        share = _SHARE.search(line)
        if share is None:
            self.end()
            self._say(line)
        elif self._terminal:
            self._draw(line, min(100, int(share[1])))
        elif self._now() - self._said_at >= LINE_SECONDS:
            self._said_at = self._now()
            self._say(line)

    def end(self) -> None:
        """Leaves the bar as it stands and goes to the next line."""
        if self._drawn:
            self._screen.write("\n")
            self._screen.flush()
            self._drawn = False

    def _draw(self, line: str, percent: int) -> None:
        full = WIDTH * percent // 100
        self._screen.write(f"\r\x1b[K{'█' * full}{'░' * (WIDTH - full)} {line}")
        self._screen.flush()
        self._drawn = True
