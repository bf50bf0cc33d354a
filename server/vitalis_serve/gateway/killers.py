"""Requests that were running when engines died, so that one that kills every engine it meets is met twice only. Pure.

How it works, in two steps, because vLLM answers what it held with errors first and is gone up to 7 s later: `failed`
notes the digest of a request whose try ended as a death looks (`retries.LOOKS_DEAD`); `died` turns those notes into
a mark each, once somebody who knows says that this process crashed. Two marks from two deaths, and `check` refuses
that very request for an hour. Whoever only ran beside it is marked as well; an answer that then comes to a good end
clears it (`cleared`).

A request is hashed when its try fails, or at its first token, with which its body goes; and before it is sent only
while one of the same length is refused.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from vitalis_serve.errors import ServeError

DEATHS: Final = 2
NOTE_SECONDS: Final = 30.0  # from a failed try to the word that its engine is dead; the slowest seen took 7


def digest(encoded: bytes) -> bytes:
    """What a request is known by: 16 bytes of its body as engines get it. 1 us, and 0.8 us more for each KiB."""
    return sha256(encoded).digest()[:16]


@dataclass(slots=True)
class _Mark:
    deaths: int
    engine: tuple[str, int]  # the last that died
    until: float
    length: int


class Killers:
    """`entries` bounds notes and marks, each; the oldest go first. `seconds`: how long a mark stays."""

    def __init__(self, *, seconds: float = 3600.0, entries: int = 4096) -> None:
        self._seconds = seconds
        self._entries = entries
        self._notes: OrderedDict[tuple[str, int, bytes], tuple[int, float]] = OrderedDict()  # -> length, when
        self._dead: dict[str, int] = {}  # replica -> the last incarnation of which the death is known
        self._marks: OrderedDict[bytes, _Mark] = OrderedDict()  # by last death, oldest first
        self.refused: Counter[int] = Counter()  # lengths of the bodies that are refused, empty as a rule; never 0
        self.refusals = 0

    def __len__(self) -> int:
        """How many requests are marked, once or more."""
        return len(self._marks)

    def check(self, encoded: bytes, now: float) -> None:
        """Before admission, with the body as an engine would get it. ServeError invalid_request where it is known to
        have been running when two engines died: of all statuses this is the one that no client, and no gateway
        in front, tries again on other engines."""
        if len(encoded) not in self.refused:
            return
        mark = self._marks.get(digest(encoded))
        if mark is None or mark.deaths < DEATHS or mark.until <= now:
            return
        self.refusals += 1
        minutes = max(1, round((mark.until - now) / 60))
        raise ServeError(
            "invalid_request",
            f"This very request was running each time when {mark.deaths} engines crashed, so it is refused for another"
            f" {minutes} min. Change it, or report it with its request id.",
        )

    def failed(self, replica: str, incarnation: int, known: bytes, length: int, now: float) -> None:
        """A try of this request ended as a death looks. `known`: its digest, `length` that of its body."""
        if self._dead.get(replica) == incarnation:  # the news was faster than the lost connection
            self._mark(known, (replica, incarnation), length, now)
            return
        self._notes[replica, incarnation, known] = (length, now)
        if len(self._notes) > self._entries:
            self._notes.popitem(last=False)

    def died(self, replica: str, incarnation: int, now: float) -> int:
        """This process crashed, or was killed because it hung (not: was stopped by somebody). Returns how many
        requests were marked for it. May be said more than once."""
        self._dead[replica] = incarnation
        held = [note for note in self._notes if note[:2] == (replica, incarnation)]
        marked = 0
        for note in held:
            length, when = self._notes.pop(note)
            if now - when <= NOTE_SECONDS:
                self._mark(note[2], (replica, incarnation), length, now)
                marked += 1
        return marked

    def cleared(self, known: bytes) -> None:
        """After a failed try this request came to a good end elsewhere: it is not what kills."""
        for note in [note for note in self._notes if note[2] == known]:
            del self._notes[note]
        mark = self._marks.get(known)
        if mark is not None and mark.deaths < DEATHS:
            del self._marks[known]

    def expire(self, now: float) -> None:
        """Forgets what is over. Once a second or so is enough."""
        while self._notes and now - next(iter(self._notes.values()))[1] > NOTE_SECONDS:
            self._notes.popitem(last=False)
        while self._marks and next(iter(self._marks.values())).until <= now:
            self._forget(next(iter(self._marks)))

    def keep(self, replicas: frozenset[str]) -> None:
        """The replicas that there are: of others nothing more will be heard."""
        for name in self._dead.keys() - replicas:
            del self._dead[name]

    def _mark(self, known: bytes, engine: tuple[str, int], length: int, now: float) -> None:
        mark = self._marks.get(known)
        if mark is not None and mark.engine == engine:
            return  # two equal requests were running there: one death all the same
        deaths = 1
        if mark is not None:
            deaths = mark.deaths + 1 if mark.until > now else 1
            self._forget(known)
        self._marks[known] = _Mark(deaths, engine, now + self._seconds, length)
        if deaths >= DEATHS:
            self.refused[length] += 1
        if len(self._marks) > self._entries:
            self._forget(next(iter(self._marks)))

    def _forget(self, known: bytes) -> None:
        mark = self._marks.pop(known)
        if mark.deaths >= DEATHS:
            self.refused[mark.length] -= 1
            if not self.refused[mark.length]:
                del self.refused[mark.length]
