"""The engine: the schedule on a clock, and who must hear of each token. One object, one event loop.

A turn of the clock ends every step that fell due, lets each request's exchange note its events, and then has every
connection that got something write once.
"""

import asyncio
import time
from typing import Protocol

from simulator.journal import Journal
from simulator.measures import Measures
from simulator.options import Options
from simulator.schedule import Schedule, Sequence, State

EARLY_SECONDS = 0.0005  # the event loop's timers are whole milliseconds: half of one is as near as it gets
SLIP_SECONDS = 0.25  # a clock that is later than this does not catch up: the machine was busy
MOST_STEPS = 8  # in one turn of the loop: the others get theirs even where steps take no time


class Receiver(Protocol):
    """What a sequence's owner must do."""

    def token(self, sequence: Sequence, now: float) -> None:
        """One more step's token is there."""

    def finished(self, now: float) -> None:
        """The last token was there."""

    def flush(self) -> None:
        """Write what was noted."""


class Engine:
    """Sequences in, tokens out. `frozen`: work stands still, nothing else does."""

    def __init__(self, options: Options, journal: Journal) -> None:
        self.options = options
        self.schedule = Schedule(options)
        self.measures = Measures()
        self.journal = journal
        self.steps = 0
        self.late_steps = 0
        self.frozen = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._due: float | None = None  # when the step under way ends
        self._last = 0.0  # when the last one ended, by plan
        self._began = 0.0
        self._flush_queued = False

    def full(self) -> bool:
        """Whether vLLM's bound on queued requests (running and waiting) is reached."""
        bound = self.options.max_num_queued_requests
        return bound > 0 and len(self.schedule.running) + self.schedule.waiting_count >= bound

    def submit(self, sequence: Sequence) -> None:
        self.schedule.add(sequence)
        self._wake()

    def abort(self, sequence: Sequence) -> None:
        """Frees the sequence at once; harmless where it has already ended."""
        if sequence.state is not State.GONE:
            self.schedule.remove(sequence)

    def freeze(self, frozen: bool) -> None:
        self.frozen = frozen
        if not frozen:
            self._due = None if self._due is None else time.monotonic()
            self._wake()

    def flush_soon(self) -> None:
        """Writes the journal at the end of this turn of the loop."""
        if not self._flush_queued:
            self._flush_queued = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_queued = False
        self.journal.flush()

    def resume(self) -> None:
        """Looks for work again, after a held sequence was let go."""
        self._wake()

    def _wake(self) -> None:
        if self._timer is None and not self.frozen:
            if self._due is None:
                self._last = max(self._last, time.monotonic())
            self._timer = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._timer = None
        if self.frozen:
            return
        now = time.monotonic()
        touched: dict[Receiver, None] = {}
        count = 0
        while self._advance(now, touched):
            count += 1
            if count >= MOST_STEPS:
                break
        for receiver in touched:
            receiver.flush()
        if self.journal.pending:
            self.flush_soon()
        if self._due is None and not self.schedule.has_work():
            return
        wait = 0.0 if self._due is None else self._due - time.monotonic()
        if wait > EARLY_SECONDS:
            self._timer = self._loop.call_later(wait, self._turn)
        else:
            self._timer = self._loop.call_soon(self._turn)

    def _advance(self, now: float, touched: dict[Receiver, None]) -> bool:
        """Begins a step if none is under way, ends it if it is due. False: nothing more to do now."""
        if self._due is None:
            if not self.schedule.has_work():
                return False
            start = self._last
            if now - start > SLIP_SECONDS:
                self.late_steps += 1
                start = now
            self._began = start
            self._due = start + self.schedule.begin(start)
        if self._due > now + EARLY_SECONDS:
            return False
        self._last = self._due
        self._due = None
        self._deliver(now, touched)
        return True

    def _deliver(self, now: float, touched: dict[Receiver, None]) -> None:
        got = self.schedule.finish()
        if self.schedule.step_tokens:
            self.steps += 1
            self.measures.step_tokens.observe(self.schedule.step_tokens)
        later = 0
        for sequence in got:
            owner = sequence.owner
            if sequence.generated == 1:
                sequence.first_token = now
                self.measures.first_token.observe(now - sequence.arrived)
            else:
                later += 1
            owner.token(sequence, now)
            touched[owner] = None
            if sequence.generated >= sequence.target and sequence.state is not State.GONE:
                self.schedule.remove(sequence)
                owner.finished(now)
        if later:
            self.measures.gap.observe(self._last - self._began, later)
