"""The master's part of a repeat (or the only process's): when it begins and ends, what its workers hand over, who of
them was lost, and the repeat's folder, which nobody else writes."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import gevent
from gevent.event import Event

from vitalis_load import sampling
from vitalis_load.errors import LoadFailure
from vitalis_load.meter import Batch
from vitalis_load.order import Order
from vitalis_load.recorder import Recorder
from vitalis_load.records import RepeatEnd

LAST_SECONDS = 8.0  # for workers to hand over the last of what they have
RATE_SECONDS = 10.0  # a slow engine's tokens, which are counted when answers end, come a few times in that
SILENT_SECONDS = 6.0  # a worker that hands over nothing for so long is lost
LATE_SECONDS = 5.0  # beyond the last deadline; then the repeat ends whatever is in flight


class Conductor:
    """One repeat of `processes` processes that begins at `zero` (`time.monotonic`).

    `dismiss` tells them all to finish; `say` gets a line `every` so many seconds. Times are seconds since the begin.
    """

    def __init__(
        self, order: Order, processes: int, zero: float, *, dismiss: Callable[[], None], say: Callable[[str], None],
        every: float = 2.0,
    ) -> None:  # fmt: skip
        self.scenario = order.scenario_made()
        self.failure: LoadFailure | None = None
        self.reason = ""  # why it is not complete
        self.finished = False
        self.lost: list[int] = []
        self._recorder = Recorder(Path(order.folder)) if order.folder else None
        self.processes = processes
        self._zero = zero
        self._repeat = order.salt
        self._began_unix = time.time() + zero - time.monotonic()
        self._dismiss = dismiss
        self._say = say
        self._every = every
        self._latest: dict[int, Batch] = {}
        self._heard: dict[int, float] = dict.fromkeys(range(processes), max(0.0, time.monotonic() - zero))
        self._finishing = False
        self._done = Event()
        self._told = deque([(0.0, 0)])  # when, and how many tokens until then
        self._sources = sampling.sources(order.target) if order.folder else []
        self._gpus = sampling.Gpus() if order.folder else None
        self._sampler = gevent.spawn(self._sample) if order.folder else None

    def clock(self) -> float:
        return time.monotonic() - self._zero

    # what comes in

    def take(self, batch: Batch) -> None:
        """What a process hands over; of one that came later than the beginning too."""
        if batch.repeat != self._repeat:
            return
        self._latest[batch.process] = batch
        self._heard[batch.process] = self.clock()
        if batch.process in self.lost:
            self.lost.remove(batch.process)
        if self._recorder is None or self.finished:
            return
        try:
            self._recorder.take(batch)
        except LoadFailure as failure:
            self.fail(failure)

    def fail(self, failure: LoadFailure) -> None:
        """Measuring ends here; what there is stays."""
        if self.failure is None:
            self.failure = failure
            self._say(failure.message)
            self.stop(failure.message)

    def lose(self, process: int) -> None:
        """A worker is gone."""
        last = self._latest.get(process)
        if process not in self.lost and not (last is not None and last.last):
            self.lost.append(process)
            self._say(f"worker {process} is lost, and with it what it had in flight; the others go on")

    def stop(self, reason: str) -> None:
        """Before its end, and why. The next `due_to_end` says so."""
        if not self.reason and not self.finished:
            self.reason = reason

    # when it ends

    def due_to_end(self) -> bool:
        """Asked every second: everything was sent and answered, or it must not go on."""
        self._watch()
        now = self.clock()
        if self.reason:
            return True
        left = [process for process in range(self.processes) if process not in self.lost]
        if not left:
            self.stop("every worker was lost")
            return True
        if now < self.scenario.seconds:
            return False
        idle = all(process in self._latest and self._latest[process].idle for process in left)
        return idle or now > self.scenario.seconds + self.scenario.deadline_seconds + LATE_SECONDS

    def finish(self) -> None:
        """Ends the repeat: workers hand over what they have, the folder gets its end.json. Blocks until that is done,
        whoever does it."""
        if self._finishing:
            self._done.wait()
            return
        self._finishing = True
        now = self.clock()
        if not self.reason and now < self.scenario.seconds:
            self.reason = f"interrupted after {max(0.0, now):.0f} s of {self.scenario.seconds:.0f} s"
        self._dismiss()
        deadline = time.monotonic() + LAST_SECONDS
        while time.monotonic() < deadline and not self._all_in():
            gevent.sleep(0.02)
        for process in range(self.processes):
            last = self._latest.get(process)
            if last is None or not last.last:
                self.lose(process)
        if self._sampler is not None:
            self._sampler.kill()
        if self._gpus is not None:
            self._gpus.close()
        ended = self.clock()
        self._progress(last=True)
        self._write_end(ended)
        self.finished = True
        self._done.set()

    def _all_in(self) -> bool:
        return all(
            process in self.lost or (process in self._latest and self._latest[process].last)
            for process in range(self.processes)
        )

    def _write_end(self, seconds: float) -> None:
        reason = self.reason
        if self.lost and not reason:
            named = ", ".join(str(process) for process in sorted(self.lost))
            reason = (
                f"{len(self.lost)} of {self.processes} workers were lost (process {named}): what was theirs to send or "
                "in flight then is not in the result"
            )
        end = RepeatEnd(
            began_at=self._began_unix,
            seconds=max(0.0, seconds),
            complete=not reason,
            reason=reason,
            lost_processes=sorted(self.lost),
        )
        self.reason = reason
        if self._recorder is None:
            return
        try:
            self._recorder.end(end)
        except LoadFailure as failure:
            self.failure = self.failure or failure

    # every second

    def _watch(self) -> None:
        now = self.clock()
        for process, heard in self._heard.items():
            if now - heard > SILENT_SECONDS and process < self.processes:
                self.lose(process)
        self._progress()

    def _progress(self, *, last: bool = False) -> None:
        now = self.clock()
        if now - self._told[-1][0] < (0.5 if last else self._every):
            return
        batches = list(self._latest.values())
        tokens = sum(batch.tokens for batch in batches)
        while len(self._told) > 1 and self._told[1][0] <= now - RATE_SECONDS:
            self._told.popleft()
        began, had = self._told[0]
        rate = (tokens - had) / max(0.001, now - began)
        self._told.append((now, tokens))
        flying = sum(batch.in_flight for batch in batches)
        behind = max((batch.behind for batch in batches), default=0.0)
        parts = [
            f"{min(max(now, 0.0), self.scenario.seconds):.0f} s of {self.scenario.seconds:.0f} s",
            f"{sum(batch.scheduled for batch in batches)} sent",
            f"{sum(batch.ended for batch in batches)} ended",
            f"{sum(batch.failed for batch in batches)} failed",
            f"{flying} in flight",
            f"{rate:,.0f} tokens/s",
        ]
        if behind > 0.1:
            parts.append(f"sending {behind:.1f} s late")
        if now > self.scenario.seconds and flying and not last:
            parts.append("waiting for the last answers")
        self._say(", ".join(parts))

    def _sample(self) -> None:
        """What the other side says of itself, at each second."""
        if (early := -self.clock()) > 0:
            gevent.sleep(early)
        while True:
            at = self.clock()
            answers: dict[str, object] = {}
            asking = [gevent.spawn(_keep, answers, name, ask) for name, ask in self._sources]
            gevent.joinall(asking, timeout=sampling.ANSWER_SECONDS)
            gevent.killall(asking, block=False)
            gpus = self._gpus.sample() if self._gpus is not None else []
            if self._recorder is not None and (answers or gpus):
                try:
                    self._recorder.sample(sampling.together(at, answers, gpus))
                except LoadFailure as failure:
                    self.fail(failure)
                    return
            gevent.sleep(max(0.0, int(at) + 1 - self.clock()))


def _keep(answers: dict[str, object], name: str, ask: Callable[[], object]) -> None:
    """Silence is no answer; it shows as a gap."""
    try:
        answers[name] = ask()
    except (OSError, ValueError):
        return
