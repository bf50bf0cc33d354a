"""How many tokens a request will generate: the lesser of its own `max_tokens` and what its kind used so far. Pure.

How it works: for each (route, tenant) the last WINDOW answers are kept, and whenever a fifth of them is new they are
sorted for their p90: 25 us, 0.2 us for each answer. A window rather than P2 or counts that decay: P2 forgets
nothing, and what decays needs more than twice its own memory to forget a tail of long answers, at the same noise.
Here what was before is gone after WINDOW answers and a fifth, and the estimate of answers that are log-normal with
p95 = 3.3 x median has a standard error of 5 %.

An entry takes 3 KiB at most; the least recently renewed go when there are too many.
"""

from array import array
from collections import OrderedDict
from typing import Final

WINDOW: Final = 640
LEARNT_FROM: Final = 10  # the p90 of fewer would only be the longest of them
DEFAULT_TOKENS: Final = 256
LONG: Final = 1024
_LONGEST: Final = (1 << 32) - 1  # whatever an engine may say


class _Window:
    """The last answers of one kind. `fresh`: how many more answers until the estimate is renewed."""

    __slots__ = ("estimate", "fresh", "longest", "next", "tokens")

    def __init__(self, estimate: int) -> None:
        self.tokens = array("I")
        self.next = 0
        self.fresh = LEARNT_FROM
        self.estimate = estimate
        self.longest = 0

    def add(self, tokens: int) -> bool:
        """True where the estimate was renewed."""
        place = self.next
        if place < len(self.tokens):
            self.tokens[place] = tokens
        else:
            self.tokens.append(tokens)
        self.next = place + 1 if place + 1 < WINDOW else 0
        if tokens > self.longest:
            self.longest = tokens
        self.fresh -= 1
        if self.fresh:
            return False
        size = len(self.tokens)
        by_length = sorted(self.tokens.tolist())
        self.estimate, self.longest = by_length[(9 * size - 1) // 10], by_length[-1]
        self.fresh = size // 5
        return True


class Estimates:
    """`error_tokens` over `settled`: the mean error in tokens of what was expected, for the metrics."""

    def __init__(self, *, default: int = DEFAULT_TOKENS, entries: int = 1024) -> None:
        self._default = default
        self._entries = entries
        self._windows: OrderedDict[tuple[str, str], _Window] = OrderedDict()
        self.error_tokens = 0
        self.settled = 0

    def __len__(self) -> int:
        return len(self._windows)

    def expect(self, route: str, tenant: str, max_tokens: int | None) -> int:
        """Output tokens to expect. `max_tokens`: the request's own limit, None where it has none."""
        window = self._windows.get((route, tenant))
        learnt = self._default if window is None else window.estimate
        return learnt if max_tokens is None or learnt < max_tokens else max_tokens

    def longest(self, route: str, tenant: str) -> int:
        """As many tokens as an answer is likely to have at most: as the longest of the last, and LONG at least."""
        window = self._windows.get((route, tenant))
        return LONG if window is None else max(LONG, window.longest)

    def learn(self, route: str, tenant: str, expected: int, actual: int) -> None:
        """An answer came to its end. `actual`: its tokens as the engine counted them; an abandoned one teaches
        nothing and is not told."""
        self.error_tokens += abs(expected - actual)
        self.settled += 1
        key = (route, tenant)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(self._default)
            if len(self._windows) > self._entries:
                self._windows.popitem(last=False)
        if window.add(actual if 0 <= actual <= _LONGEST else _LONGEST):
            self._windows.move_to_end(key)
