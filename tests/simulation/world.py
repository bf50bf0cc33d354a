"""A fleet in virtual time: real admission and routing before real simulated schedules, no sockets and no clock.

Engines are `simulator.schedule.Schedule` with the preset sim-20b (64 sequences, 20,000 prompt tokens/s, a step of
8 ms + 0.1 ms per running sequence, 400,000 KV tokens). Everything that happens is an event on one heap; a run is
exactly repeatable from its seed.
"""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log

from simulator.options import Options
from simulator.schedule import Schedule, Sequence
from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.admission import Admission, AdmissionOptions
from vitalis_serve.gateway.routing import policy
from vitalis_serve.gateway.seats import CLASSES, Demand, cost

MODEL = "gpt-oss-20b"
SLO_TTFT, SLO_TPOT = 2.0, 0.040
PRIORITY = {name: rank for rank, name in enumerate(CLASSES)}


@dataclass(slots=True, eq=False)
class Request:
    at: float
    tenant: str
    prompt: int
    output: int
    class_: str = "standard"
    affinity: int = 0
    blocks: tuple[int, ...] = ()
    estimate: int = 0  # of the output; 0: the true one
    obeys: bool = False  # comes back once when it is told when
    arrived: float = 0.0
    tries: int = 0
    granted: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    refused: str = ""
    refused_first: bool = False
    replica: str = ""
    cached: int = 0

    @property
    def demand(self) -> Demand:
        return Demand(
            waiter=self, model=MODEL, tenant=self.tenant, class_=self.class_,
            prompt_tokens=self.prompt, output_tokens=self.estimate or self.output, affinity=self.affinity,
            body_bytes=self.prompt * 4,
        )  # fmt: skip

    @property
    def ttft(self) -> float:
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        return (self.ended - self.first) / (self.output - 1) if self.output > 1 else 0.0

    @property
    def good(self) -> bool:
        return self.ended > 0 and self.ttft <= SLO_TTFT and self.tpot <= SLO_TPOT


class Draw:
    """Sizes as design section 11 has them: log-normal, by median and 95th percentile."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def lognormal(self, median: float, p95: float, most: int) -> int:
        return max(1, min(most, round(self.random.lognormvariate(log(median), log(p95 / median) / 1.645))))

    def prompt(self) -> int:
        return self.lognormal(400, 2000, 30_000)

    def output(self) -> int:
        return self.lognormal(150, 500, 4000)

    def arrivals(self, rate: float, seconds: float, start: float = 0.0) -> Iterable[float]:
        now = start
        while (now := now + self.random.expovariate(rate)) < start + seconds:
            yield now

    def stream(self, tenant: str, rate: float, seconds: float, start: float = 0.0, **more: object) -> list[Request]:
        return [
            Request(at, tenant, self.prompt(), self.output(), affinity=self.random.getrandbits(63), **more)  # type: ignore[arg-type]
            for at in self.arrivals(rate, seconds, start)
        ]


# Requests per second that one sim-20b engine carries with this workload, all its ordinary slots in use (measured
# by `capacity`, and near 1 / (645 / 20000 + 196 * 0.0138 / 58)).
CAPACITY = 12.3


class Engine:
    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.schedule = Schedule(options)
        self.stepping = False
        self.busy = 0.0
        self.tokens = 0


LINE_SECONDS = 0.001  # from a worker to the one that owns admission, or back: a turn of a busy loop


class World:
    """One fleet behind one or more gateways, each with an admission of its own, which its first worker owns; what
    another worker's client asks gets there later, and so does the answer."""

    def __init__(
        self,
        replicas: int = 2,
        *,
        options: AdmissionOptions | None = None,
        routing: str = "affinity",
        gateways: int = 1,
        workers: int = 1,
        seed: int = 1,
        plain: bool = False,
    ) -> None:
        engine = Options(scheduling_policy="priority")
        self.now = 0.0
        self.plain = plain  # no admission: round robin straight into the engines
        self.engines = {f"engine-{i}": Engine(f"engine-{i}", engine) for i in range(replicas)}
        states = tuple(
            Replica(name, f"unix:/{name}", ReplicaState.READY, (MODEL,), 64, 1, kv_tokens=400_000)
            for name in self.engines
        )
        self.admissions = [
            Admission(options, routing=policy(routing, seed + i), share=1 / gateways) for i in range(gateways)
        ]
        for admission in self.admissions:
            admission.update(Fleet(1, states), 0.0)
        self.random = random.Random(seed)
        self.finished: list[Request] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._gateway: dict[Request, Admission] = {}
        self._turn = 0
        self._workers = workers
        self._guests: set[Request] = set()

    def run(self, requests: Iterable[Request], until: float) -> list[Request]:
        """Everything that was asked, answered or not. What has not ended by then stays as it is."""
        requests = list(requests)
        for request in requests:
            request.arrived = request.at
            self._at(request.at, lambda request=request: self._arrive(request))
        self._at(0.05, self._sweep)
        while self._events and self._events[0][0] <= until:
            self.now, _, act = heapq.heappop(self._events)
            act()
        return requests

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, act))

    def _arrive(self, request: Request) -> None:
        request.tries += 1
        request.arrived = self.now
        if self.plain:
            self._turn += 1
            self._start(request, f"engine-{self._turn % len(self.engines)}")
            return
        self._gateway[request] = self.random.choice(self.admissions)
        if self._workers > 1 and self.random.randrange(self._workers):
            self._guests.add(request)
            self._at(self.now + LINE_SECONDS, lambda: self._enter(request))
        else:
            self._enter(request)

    def _enter(self, request: Request) -> None:
        admission = self._gateway[request]
        try:
            entered = admission.enter(request.demand, self.now, self.random.random())
        except ServeError as error:
            self._refuse(request, error.code, error.retry_after or 1.0)
            return
        for waiter in entered.shed:
            self._send_away(waiter, "queue_full")
        if entered.seat is not None:
            self._granted(request, entered.seat.replica.name)
        self._dispatch(entered.grants)

    def _send_away(self, request: Request, code: str) -> None:
        self._refuse(request, code, self._gateway[request].retry_after(request.demand, self.now, self.random.random()))

    def _refuse(self, request: Request, code: str, retry_after: float) -> None:
        if request.obeys and request.tries == 1:
            request.refused_first = True
            whole = max(1, min(60, round(retry_after)))  # as the header says it
            self._at(self.now + whole, lambda: self._arrive(request))
        else:
            request.refused = code

    def _dispatch(self, grants: Iterable) -> None:
        for grant in grants:
            self._granted(grant.waiter, grant.seat.replica.name)

    def _granted(self, request: Request, name: str) -> None:
        self._later(request, lambda: self._start(request, name))

    def _later(self, request: Request, act: Callable[[], None]) -> None:
        if request in self._guests:
            self._at(self.now + LINE_SECONDS, act)
        else:
            act()

    def _start(self, request: Request, name: str) -> None:
        engine = self.engines[name]
        request.granted, request.replica = self.now, name
        sequence = Sequence(
            request, request.prompt, request.output, priority=PRIORITY[request.class_], block_hashes=request.blocks
        )
        engine.schedule.add(sequence)
        if not engine.stepping:
            self._step(engine)

    def _step(self, engine: Engine) -> None:
        engine.stepping = engine.schedule.has_work()
        if engine.stepping:
            seconds = engine.schedule.begin(self.now)
            engine.busy += seconds
            self._at(self.now + seconds, lambda: self._end_step(engine))

    def _end_step(self, engine: Engine) -> None:
        for sequence in engine.schedule.finish():
            request = sequence.owner
            engine.tokens += 1
            if sequence.generated == 1:
                request.first, request.cached = self.now, sequence.cached
                if not self.plain:
                    self._later(request, lambda request=request: self._first_token(request))
            if sequence.generated >= sequence.target:
                engine.schedule.remove(sequence)
                request.ended = self.now
                self.finished.append(request)
                if not self.plain:
                    self._later(request, lambda request=request: self._leave(request))
        self._step(engine)

    def _first_token(self, request: Request) -> None:
        self._dispatch(self._gateway[request].first_token(request, self.now))

    def _leave(self, request: Request) -> None:
        admission = self._gateway[request]
        if request.estimate:
            used, charged = cost(request.prompt, request.output), cost(request.prompt, request.estimate)
            admission.settle(request.tenant, request.class_, used - charged)
        self._dispatch(admission.leave(request, self.now))

    def _sweep(self) -> None:
        for admission in self.admissions:
            self._dispatch(admission.tick(self.now))
            for request in admission.expired(self.now):
                self._send_away(request, "queue_timeout")
        self._at(self.now + 0.05, self._sweep)


def quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def jain(shares: Iterable[float]) -> float:
    """1 where all are equal, 1/n where one has everything."""
    values = list(shares)
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


def in_window(requests: Iterable[Request], start: float, end: float, tenant: str = "") -> list[Request]:
    """Those that arrived in the steady part."""
    return [r for r in requests if start <= r.at < end and r.tenant.startswith(tenant)]


def ttft_p99(requests: Iterable[Request]) -> float:
    """Of those that got a first token."""
    return quantile((r.ttft for r in requests if r.first), 0.99)


def goodput(requests: Iterable[Request], start: float, end: float) -> float:
    """Requests per second that arrived in the window and met both SLOs."""
    return sum(r.good for r in in_window(requests, start, end)) / (end - start)
