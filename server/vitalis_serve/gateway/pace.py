"""What an admission measures of its engines: how fast slots come back, how fast prompts are read. Pure."""

from collections import deque
from collections.abc import Hashable
from typing import Final

_SLOWEST: Final = 0.02  # slots per second; below it every answer would be 60 s anyway
_FLOOR: Final = 4096.0  # tokens per second: below it a measurement is of something else than prefill
SHARE_FOR_THE_RETURNING: Final = 0.35
# Where another gateway has part of the fleet: half of them come back to the one that does not know them.
SHARE_BESIDE_OTHERS: Final = 0.25
_EARLY: Final = 1.0  # clients are told whole seconds
_LATE: Final = 10.0
_NONE: Final[deque[float]] = deque(maxlen=0)


class DrainRate:
    """Slots given back per second, and the turns of those who were told to come again, who get `share` of it."""

    def __init__(self, share: float = SHARE_FOR_THE_RETURNING) -> None:
        self._share = share
        self._left = 0
        self._since: float | None = None
        self._saturated = True  # all through the window just running
        self._rate = 0.0
        self._turns: dict[int, float] = {}
        self._due: dict[Hashable, deque[float]] = {}  # who was told to come, and when; told last comes last

    def left(self, now: float, *, saturated: bool) -> None:
        """One slot came back. `saturated`: somebody waited for it. Otherwise the rate is only what was asked for,
        and says no more than that the engines can do at least this."""
        if self._since is None:
            self._since = now
        self._left += 1
        self._saturated = self._saturated and saturated
        elapsed = now - self._since
        if elapsed >= 1.0:
            rate = self._left / elapsed
            if not self._rate or rate > self._rate:
                self._rate = rate
            elif self._saturated:
                self._rate = 0.7 * self._rate + 0.3 * rate
            self._left, self._since, self._saturated = 0, now, True

    def scale(self, factor: float) -> None:
        """The fleet grew or shrank by this factor."""
        self._rate *= factor

    def rate(self, now: float) -> float:
        """The smoothed rate, or that of the window just running where it is higher."""
        elapsed = max(now - self._since, 1.0) if self._since is not None else 1.0
        return max(self._rate, self._left / elapsed, _SLOWEST)

    def turn(self, rank: int, ahead: int, now: float, jitter: float, whose: Hashable) -> float:
        """Seconds until this one's turn, 1 to 60. Turns of one class follow each other at `share` of the drain rate:
        the rest is for those who come for the first time, who will be there by then.

        `whose`: it is known by this when it comes, and is then due (`is_due`)."""
        rate = self.rate(now)
        earliest = now + (ahead + 1) / rate
        turn = max(self._turns.get(rank, 0.0) + 1.0 / (self._share * rate), earliest)
        self._turns[rank] = min(turn, now + 60.0)
        seconds = (turn - now) * (1.0 + 0.1 * jitter)
        if seconds > 60.0:  # too many to give each a turn: at least not all in the same second
            return 60.0 - 15.0 * jitter
        seconds = max(1.0, seconds)
        due = self._due.pop(whose, None) or deque()
        while due and due[0] < now - _LATE:
            due.popleft()
        due.append(now + seconds)
        self._due[whose] = due
        while (first := next(iter(self._due))) != whose and self._due[first][-1] < now - _LATE:
            del self._due[first]
        return seconds

    def is_due(self, whose: Hashable, now: float) -> bool:
        """Whether it was told to come about now. Said once for each time it was told."""
        due = self._due.get(whose, _NONE)
        while due and due[0] < now - _LATE:
            due.popleft()
        comes = bool(due) and due[0] <= now + _EARLY
        if comes:
            due.popleft()
        if not due:
            self._due.pop(whose, None)
        return comes


class PrefillRate:
    """Prompt tokens per second while any are being read. Smoothed over windows of one busy second.

    What is not busy does not count, so an idle engine is not taken for a slow one."""

    def __init__(self, initial: float = 10_000) -> None:
        self.rate = initial
        self._busy_since = 0.0
        self._busy = 0.0
        self._tokens = 0

    def begun(self, now: float) -> None:
        """The first prompt after none."""
        self._busy_since = now

    def ended(self, tokens: int, outstanding: int, now: float) -> bool:
        """`tokens` have been read, `outstanding` still are. True where the rate was renewed."""
        self._tokens += tokens
        self._busy += now - self._busy_since
        self._busy_since = now
        if self._busy < 1.0:
            return False
        self.rate = max(0.7 * self.rate + 0.3 * self._tokens / self._busy, _FLOOR)
        self._tokens, self._busy = 0, 0.0
        return True
