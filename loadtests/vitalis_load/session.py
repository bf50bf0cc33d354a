"""One process's part of a repeat, under gevent: closed users ask one after the other, an open loop asks when it is
time. Everything measured goes into a Meter and from there, once a second, to whoever takes it (`hand_over`)."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gevent
from gevent.event import Event
from gevent.pool import Group
from gevent.queue import Queue

from vitalis_load import client, streams, wakes
from vitalis_load.asking import Arrival, Ask, Plan
from vitalis_load.meter import Batch, Meter
from vitalis_load.records import Record
from vitalis_load.scenario import Scenario
from vitalis_load.streams import Reader
from vitalis_load.target import Target

AHEAD_REQUESTS = 256  # of an open loop, made before they are due, so that making them delays none
AHEAD_BYTES = 64 * 1024 * 1024
LAG_SECONDS = 0.01  # how often the event loop is probed
STOP_SECONDS = 2.0  # for requests cut short to hand in their records
PAUSE_SECONDS = 1.0  # of a closed user whose request failed, unless the server says how long


class _Made(NamedTuple):
    arrival: Arrival
    ask: Ask
    request: bytes


class _Flight(NamedTuple):
    greenlet: gevent.Greenlet
    connection: client.Connection
    reader: Reader


class Session:
    """`process` of `processes`. `zero` is the begin of `repeat` by `time.monotonic`; `heard` gets every record."""

    def __init__(
        self, scenario: Scenario, plan: Plan, target: Target, *, process: int, processes: int, zero: float, repeat: str,
        hand_over: Callable[[Batch], None], heard: Callable[[Record], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.scenario = scenario
        self.meter = Meter(process, repeat)
        self.users = 0
        self.over = Event()
        self._plan = plan
        self._target = target
        self._process = process
        self._processes = processes
        self._zero = zero
        self._hand_over = hand_over
        self._heard = heard
        self._end = scenario.seconds
        self._flights: dict[int, _Flight] = {}
        self._idle: list[client.Connection] = []
        self._conversations = Group()
        self._own = Group()
        self._arrived = not scenario.open or process >= processes  # nothing more will arrive
        self._ahead_bytes = 0
        self._numbers = 0
        self._worst_lag = 0.0
        self._finished = False
        parts = target.url.partition("://")
        self._address = target.url if target.url.startswith("unix:") else "://".join([parts[0], parts[2].split("/")[0]])
        self._host = "localhost" if target.url.startswith("unix:") else parts[2].split("/")[0]
        self._prefix = "" if target.url.startswith("unix:") else target.url[len(self._address) :]

    def clock(self) -> float:
        """Seconds since the repeat began."""
        return time.monotonic() - self._zero

    def start(self) -> None:
        self._own.spawn(self._tick)
        self._own.spawn(self._probe)
        if not self._arrived:
            made: Queue[_Made | None] = Queue()
            self._own.spawn(self._make, made)
            self._own.spawn(self._arrive, made)

    def connection(self) -> client.Connection:
        return client.Connection(self._address, wakes=wakes.of_this_process(), stamped=self._target.stamps)

    def user_number(self) -> int:
        """Of one more closed user, over all processes."""
        self._numbers += 1
        return self._process + (self._numbers - 1) * max(1, self._processes)

    def turn(self, user: int, turn: int, connection: client.Connection) -> float:
        """A closed user's next request, to its end. Returns how long the user pauses then; waits for the repeat's begin
        before, and for ever after its end."""
        if (early := -self.clock()) > 0:
            gevent.sleep(early)
        if self.clock() >= self._end or self.over.is_set():
            self.over.wait()
            return 0.0
        ask = self._plan.next_request(user, turn)
        record = self._measure(ask, self._request(ask), None, connection)
        if not record.error:
            return ask.pause
        # Whoever is refused and asks again at once measures refusals and nothing else.
        return max(ask.pause, PAUSE_SECONDS if record.retry_after is None else record.retry_after)

    @property
    def idle(self) -> bool:
        """Past the end, and nothing is in flight."""
        return self.clock() >= self._end and self._arrived and not self._flights and not len(self._conversations)

    def finish(self) -> None:
        """Cuts short what is still going, and hands over the last of what was measured. Again: nothing."""
        if self._finished:
            return
        self._finished = True
        self._arrived = True
        self.over.set()
        self._end = min(self._end, self.clock())
        for flight in list(self._flights.values()):
            flight.connection.abandon()
        deadline = time.monotonic() + STOP_SECONDS
        while self._flights and time.monotonic() < deadline:
            gevent.sleep(0.01)
        # Whoever still waits for a connection to open is not heard by `abandon`.
        gevent.killall([flight.greenlet for flight in self._flights.values()], block=True, timeout=STOP_SECONDS)
        self._conversations.kill(block=True, timeout=STOP_SECONDS)
        self._own.kill(block=True, timeout=STOP_SECONDS)
        for connection in self._idle:
            connection.close()
        self._hand_over(self.meter.batch(self.clock(), idle=True, last=True))

    # one request

    def _request(self, ask: Ask) -> bytes:
        return client.request(
            ask.api, ask.document, host=self._host, path_prefix=self._prefix, key=self._target.key(ask.key)
        )

    def _measure(
        self, ask: Ask, request: bytes, scheduled: float | None, connection: client.Connection | None
    ) -> Record:
        """`scheduled` None: now, as closed users have it. `connection` None: an idle one, or one more."""
        task = ask.task
        reader = streams.reader(ask.api, task.stream, self.meter.gap)
        used = connection or (self._idle.pop() if self._idle else self.connection())
        sent = self.clock()
        due = sent if scheduled is None else scheduled
        record: Record | None = None
        self.meter.begin(sent - due)
        number = id(reader)
        self._flights[number] = _Flight(gevent.getcurrent(), used, reader)
        try:
            deadline = due + self.scenario.deadline_seconds
            record = used.ask(request, reader, scheduled=due, deadline=deadline, clock=self.clock)
        finally:
            del self._flights[number]
            if record is None:  # this greenlet is being ended
                record = Record(task="", api=ask.api, scheduled=due, sent=sent, ended=self.clock(), unfinished=True)
                reader.fill(record)
                used.close()
            elif scheduled is None:
                record.scheduled = record.sent
            record.task, record.tenant, record.klass = task.name, task.tenant, task.klass
            record.stream, record.turn, record.process = task.stream, ask.turn, self._process
            record.wanted_tokens = ask.wanted_tokens
            self.meter.end(record)
            self._heard(record)
        if connection is None:
            self._idle.append(used)
        return record

    # an open loop

    def _make(self, made: "Queue[_Made | None]") -> None:
        """Makes requests ahead of their time, as many as may wait."""
        for arrival in self._plan.split(self._processes, self._process):
            while made.qsize() >= AHEAD_REQUESTS or (self._ahead_bytes > AHEAD_BYTES and made.qsize()):
                gevent.sleep(0.005)
            ask = self._plan.request(arrival)
            request = self._request(ask)
            self._ahead_bytes += len(request)
            made.put(_Made(arrival, ask, request))
            gevent.sleep(0)
        made.put(None)

    def _arrive(self, made: "Queue[_Made | None]") -> None:
        """Each at its time, whatever became of those before; one that is late goes at once and keeps its time."""
        for one in _until_none(made):
            self._ahead_bytes -= len(one.request)
            while (early := one.arrival.at - self.clock()) > 0:
                gevent.sleep(early)
            self._conversations.add(gevent.spawn(self._converse, one))
        self._arrived = True

    def _converse(self, one: _Made) -> None:
        """An arrival's request, and the further turns where its task has some: those wait for their answers."""
        try:
            record = self._measure(one.ask, one.request, one.arrival.at, None)
            ask = one.ask
            for turn in range(1, one.arrival.task.turns):
                if record.error or record.unfinished:
                    return
                gevent.sleep(ask.pause)
                if self.clock() >= self._end:
                    return
                ask = self._plan.request(one.arrival, turn)
                record = self._measure(ask, self._request(ask), None, None)
        except gevent.GreenletExit:
            return

    # every second

    def _tick(self) -> None:
        """Closes each second and hands over what came in it."""
        if (early := -self.clock()) > 0:
            gevent.sleep(early)
        cpu, since = time.process_time(), time.monotonic()
        second = int(self.clock())
        while True:
            gevent.sleep(max(0.0, second + 1 - self.clock()))
            now = time.monotonic()
            used = (time.process_time() - cpu) / max(0.001, now - since)
            cpu, since = time.process_time(), now
            lag, self._worst_lag = self._worst_lag, 0.0
            events = sum(flight.reader.chunks for flight in self._flights.values())
            self.meter.second(second, used, lag * 1000, 0 if self.scenario.open else self.users, events)
            self._hand_over(self.meter.batch(self.clock(), idle=self.idle))
            second = max(second + 1, int(self.clock()))

    def _probe(self) -> None:
        """How long a greenlet that is ready waits for its turn."""
        while True:
            began = time.monotonic()
            gevent.sleep(LAG_SECONDS)
            self._worst_lag = max(self._worst_lag, time.monotonic() - began - LAG_SECONDS)


def _until_none(made: "Queue[_Made | None]") -> Iterator[_Made]:
    while (one := made.get()) is not None:
        yield one
