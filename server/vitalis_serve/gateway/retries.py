"""Whether a request that failed before anything was relayed may be tried again, on another replica. Pure.

How it works: `may_retry` knows what may be repeated at all and how often; `RetryBudget` keeps all retries together
to a share of the traffic, so that a fleet in trouble is not asked twice for everything. Requests and retries are
counted in SLICES slices of the window and the oldest slice is dropped whole: unlike with a bucket that refills, the
share holds exactly for what is counted.

The window is a minute because what fails together lives that long: when a replica dies, all that it held come at
once, and over a few seconds a tenth of the traffic is fewer than one replica holds.
"""

from collections import deque
from typing import Final

MAX_RETRIES: Final = 2
SLICES: Final = 12
# What may be repeated: nothing of it has reached the client, and no other replica has to fail for the same reason.
# `gone`: the replica was taken away before it was asked.
RETRIED: Final = frozenset(
    {
        "gone", "harmony", "connect", "reset", "cut", "protocol", "aborted", "no_token", "in_stream_error",
        "status_500", "status_502", "status_503", "first_token_timeout",
    }
)  # fmt: skip
# How the end of a process looks to what it held; that it is dead is known up to 7 s later only (vLLM 0.32: a worker
# killed gives 500 or an error event, the API process killed gives a lost connection). One that hangs says nothing.
LOOKS_DEAD: Final = frozenset({"reset", "cut", "in_stream_error", "status_500", "first_token_timeout"})


class RetryBudget:
    """At most `share` of the requests of the last `seconds`, and `at_least` where that is fewer."""

    def __init__(self, *, share: float = 0.1, at_least: int = 3, seconds: float = 60.0) -> None:
        self._share = share
        self._at_least = at_least
        self._width = seconds / SLICES
        self._until = float("-inf")  # when the newest slice is over
        self._slices: deque[list[int]] = deque()  # [requests, retries] of each, the newest last
        self._requests = 0
        self._retries = 0

    def came(self, now: float) -> None:
        """A request entered for the first time."""
        if now >= self._until:
            self._turn(now)
        self._slices[-1][0] += 1
        self._requests += 1

    def allows(self, now: float) -> bool:
        """Whether there is room for one more retry."""
        if now >= self._until:
            self._turn(now)
        return self._retries + 1 <= max(self._at_least, self._share * self._requests)

    def spend(self, now: float) -> None:
        """A retry is made."""
        if now >= self._until:
            self._turn(now)
        self._slices[-1][1] += 1
        self._retries += 1

    def _turn(self, now: float) -> None:
        """Begins new slices up to `now`."""
        behind = (now - self._until) / self._width
        if behind >= SLICES:
            self._slices.clear()
            self._requests = self._retries = 0
            self._until, behind = now, 0.0
        for _ in range(int(behind) + 1):
            self._slices.append([0, 0])
            self._until += self._width
            if len(self._slices) > SLICES:
                requests, retries = self._slices.popleft()
                self._requests -= requests
                self._retries -= retries


def may_retry(kind: str, tries: int, engine_died: int, relayed: bool, budget: RetryBudget, now: float) -> bool:
    """Whether the try that just failed may be followed by another; changes nothing (`spend` does, once it is made).

    kind: how it failed, as `vitalis_upstream_failures_total` names it. tries: how many there were, this one too.
    engine_died: the number of the first try that ended as one of LOOKS_DEAD or with its engine's process, 0 for none;
    after that one there is one retry more, so that a request that kills engines meets two at most.
    """
    return (
        not relayed
        and kind in RETRIED
        and tries <= MAX_RETRIES
        and (not engine_died or tries <= engine_died)
        and budget.allows(now)
    )
