"""A fleet in virtual time: simulated schedules behind a gateway of the plainest kind. No sockets, no clock. Pure.

How it works: arrivals and ends of steps are events on one heap. A request waits at the gateway, by class and then by
arrival, until a replica has a seat for it: a seat of `max_num_seqs`, less those kept for the first class, KV blocks for
its context with some headroom, and fewer prompt tokens under way than half a second of prefill. Requests that share a
prefix go to the same replica while that has a seat (rendezvous hashing), others to the one with the fewest.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from simulator.options import Options
from simulator.schedule import Schedule
from simulator.schedule import Sequence as Work

RESERVED = 0.1  # of a replica's seats, for the first class alone
HEADROOM = 0.2  # of the KV pool, left for answers that grow
PREFILL_SECONDS = 0.5  # of prompt tokens that may be under way at one replica


@dataclass(slots=True, eq=False)
class Job:
    """A request, and what became of it. Seconds; 0: not yet. `rank`: of its class, 0 is the first."""

    at: float
    prompt: int
    output: int
    rank: int = 0
    kind: str = ""
    group: int = -1  # of those that share a prefix; -1: it shares none
    names: tuple[int, ...] = ()  # of the prompt's blocks, where they can be shared
    admitted: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    cached: int = 0

    @property
    def ttft(self) -> float:
        return self.first - self.at

    @property
    def tpot(self) -> float:
        return (self.ended - self.first) / (self.output - 1) if self.output > 1 else 0.0


class Replica:
    """One schedule, and what the gateway knows of it."""

    def __init__(self, number: int, options: Options) -> None:
        self.number = number
        self.schedule = Schedule(options)
        self.stepping = False
        self.jobs = 0
        self.kv_tokens = 0
        self.prefill = 0
        self.busy_seconds = 0.0
        self.seat_seconds = 0.0
        self.kv_peak = 0.0


class Fleet:
    """Replicas and who waits for them. One run: `run` may be called once."""

    def __init__(self, replicas: int, options: Options) -> None:
        self.options = options
        self.replicas = [Replica(number, options) for number in range(replicas)]
        self.now = 0.0
        self.waiting: list[tuple[int, float, int, Job]] = []
        self.longest_queue = 0
        speed = options.speed.prefill_tokens_per_second
        self._prefill_cap = PREFILL_SECONDS * speed if speed else float("inf")
        self._reserve = round(options.max_num_seqs * RESERVED)
        self._kv_cap = options.kv_cache_tokens * (1 - HEADROOM)
        self._events: list[tuple[float, int, Replica]] = []
        self._count = 0
        self._orders: dict[int, list[Replica]] = {}

    def run(self, jobs: Sequence[Job], until: float) -> Iterator[float]:
        """Serves the jobs, which come in the order of `at`. Yields the time every few thousand events, so that
        somebody can be told or stop it. Nothing happens after `until`: what has not ended then stays as it is."""
        coming = iter(jobs)
        following = next(coming, None)
        events = 0
        while following is not None or self._events:
            if following is not None and (not self._events or following.at <= self._events[0][0]):
                self.now = following.at
                self._arrive(following)
                following = next(coming, None)
            else:
                self.now, _, replica = heapq.heappop(self._events)
                self._end_step(replica)
            if self.now > until:
                return
            events += 1
            if not events % 4096:
                yield self.now

    def _arrive(self, job: Job) -> None:
        self._count += 1
        heapq.heappush(self.waiting, (job.rank, job.at, self._count, job))
        self._admit()
        self.longest_queue = max(self.longest_queue, len(self.waiting))

    def _admit(self) -> None:
        while self.waiting:
            job = self.waiting[0][-1]
            replica = self._choose(job)
            if replica is None:
                return
            heapq.heappop(self.waiting)
            job.admitted = self.now
            replica.jobs += 1
            replica.kv_tokens += job.prompt + job.output
            replica.prefill += job.prompt
            work = Work(job, job.prompt, job.output, priority=job.rank, block_hashes=job.names)
            replica.schedule.add(work)
            if not replica.stepping:
                self._step(replica)

    def _choose(self, job: Job) -> Replica | None:
        if job.group < 0:
            free = [replica for replica in self.replicas if self._has_room(replica, job)]
            return min(free, key=lambda replica: (replica.jobs, replica.prefill), default=None)
        order = self._orders.get(job.group)
        if order is None:
            order = sorted(self.replicas, key=lambda replica: _draw(job.group, replica.number))
            self._orders[job.group] = order
        return next((replica for replica in order if self._has_room(replica, job)), None)

    def _has_room(self, replica: Replica, job: Job) -> bool:
        if not replica.jobs:
            return True
        seats = self.options.max_num_seqs - (self._reserve if job.rank else 0)
        return (
            replica.jobs < seats
            and replica.kv_tokens + job.prompt + job.output <= self._kv_cap
            and (not replica.prefill or replica.prefill + job.prompt <= self._prefill_cap)
        )

    def _step(self, replica: Replica) -> None:
        schedule = replica.schedule
        replica.stepping = schedule.has_work()
        if replica.stepping:
            seconds = schedule.begin(self.now)
            replica.busy_seconds += seconds
            replica.seat_seconds += seconds * len(schedule.running)
            self._count += 1
            heapq.heappush(self._events, (self.now + seconds, self._count, replica))

    def _end_step(self, replica: Replica) -> None:
        schedule = replica.schedule
        replica.kv_peak = max(replica.kv_peak, schedule.kv_usage())
        changed = False
        for work in schedule.finish():
            job: Job = work.owner
            if work.generated == 1:
                job.first, job.cached, changed = self.now, work.cached, True
                replica.prefill -= job.prompt
            if work.generated >= work.target:
                schedule.remove(work)
                job.ended, changed = self.now, True
                replica.jobs -= 1
                replica.kv_tokens -= job.prompt + job.output
        self._step(replica)
        if changed and self.waiting:
            self._admit()


def _draw(group: int, replica: int) -> bytes:
    return blake2b(b"%d %d" % (group, replica), digest_size=8).digest()
