"""When gevent's loop learned that bytes had come, rather than when the greenlet that waits for them had its turn.

For connections without the kernel's stamps (see stamps.py). Less exact: what comes while greenlets run is known only
when the loop polls again.
"""

import functools
import time

import gevent


class Wakes:
    """Counts the loop's turns. `at` is when the last one began, by `time.monotonic`."""

    def __init__(self) -> None:
        self.turn = 0
        self.at = time.monotonic()
        # libev calls these (which keep no loop going) after it has polled and before anything that was found
        self._watcher = gevent.get_hub().loop.check(ref=False)
        self._watcher.start(self._woke)

    def _woke(self) -> None:
        self.turn += 1
        self.at = time.monotonic()

    def since(self, turn: int) -> float:
        """Seconds since the loop woke whoever began to wait in turn `turn`; 0 where it did not have to wait."""
        return time.monotonic() - self.at if self.turn != turn else 0.0


@functools.cache
def of_this_process() -> Wakes:
    """Made at the first call: after Locust has forked its workers."""
    return Wakes()
