"""What all connections of one worker share, with one writer for each: the event loop."""

import asyncio
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.access import AccessLog
from vitalis_serve.gateway.admission import Admission, AdmissionOptions, ClassLimits, Grant
from vitalis_serve.gateway.breaker import BreakerOptions, Breakers, State
from vitalis_serve.gateway.counters import Counters
from vitalis_serve.gateway.estimates import Estimates
from vitalis_serve.gateway.guest import GuestAdmission, GuestBreakers
from vitalis_serve.gateway.keys import KeyTable
from vitalis_serve.gateway.killers import Killers
from vitalis_serve.gateway.limiting import GuestLimiting, Limiting, LocalLimiting, RedisLimiting
from vitalis_serve.gateway.limits import Limits
from vitalis_serve.gateway.options import WorkerOptions
from vitalis_serve.gateway.owner_line import Cleared, Message, Noted
from vitalis_serve.gateway.pool import EnginePool
from vitalis_serve.gateway.retries import RetryBudget
from vitalis_serve.gateway.routing import policy
from vitalis_serve.gateway.seats import CLASSES, Demand, Seat
from vitalis_serve.gateway.usage import Rates
from vitalis_serve.spool.record import MAX_FRAME_BYTES
from vitalis_serve.spool.spent import seed
from vitalis_serve.spool.writer import SpoolWriter

if TYPE_CHECKING:
    from vitalis_serve.gateway.owner import Distant, Owner
    from vitalis_serve.gateway.redis_limits import RedisLimits
    from vitalis_serve.gateway.relay import Relay

logger = logging.getLogger(__name__)


TICK_SECONDS: Final = 0.1
SERVING: Final = frozenset({ReplicaState.READY, ReplicaState.BUSY, ReplicaState.SUSPECT, ReplicaState.HUNG})
CRASHED: Final = frozenset({ReplicaState.BACKOFF, ReplicaState.FAILED})


class WorkerState:
    def __init__(self, options: WorkerOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.loop = loop
        # The loop's own clock (the same one) stands still for a turn of the loop, to whole milliseconds.
        self.now: Callable[[], float] = time.monotonic
        self.wall: Callable[[], float] = time.time
        self.counters = Counters()
        self.access = AccessLog(options.access_log_path)
        self.owner: Owner | None = None  # of admission, where other workers ask this one
        self.killers = Killers()
        # By this worker, where it owns admission: of this host, always or while Redis is away. And from when on
        # (Unix seconds).
        self.counted = Limits(1 / options.gateways)
        self.counted_from = 0.0
        self.limits: Limiting = LocalLimiting(self.counted, self._wall_now)
        self.redis: RedisLimits | None = None
        self.spool: SpoolWriter | None = None
        self.admission: Admission | GuestAdmission
        self.breakers: Breakers | GuestBreakers
        chosen_by = policy(options.routing, options.worker)
        if options.worker:
            guest = GuestLimiting(self._wall_now)
            self.limits = guest
            self.admission = GuestAdmission(
                worker=options.name,
                path=options.admission_socket,
                routing=chosen_by,
                queue_requests=options.queue_requests,
                queue_seconds=max(options.queue_seconds, options.cold_start_seconds, *options.class_seconds.values()),
                cold=options.cold_start_seconds > 0,
                others=self._hear,
                limiting=guest,
            )
            self.breakers = self.admission.breakers
        else:
            self.admission = Admission(
                admission_options(options),
                routing=chosen_by,
                share=1 / options.gateways,
                is_open=options.workers == 1,
            )
            # A probe may take as long as its first token.
            patience = options.connect_seconds + options.first_token_seconds + 25
            self.breakers = Breakers(BreakerOptions(failures=options.breaker_failures, probe_seconds=patience))
        if options.limits_redis_url:
            # Each worker asks it; away, the owner counts for all of this host.
            self.redis = _in_redis(options, loop, self.limits)
            self.limits = RedisLimiting(self.redis)
        self.retry_budget = RetryBudget(at_least=options.retries_at_least)
        self.estimates = Estimates()
        self.rates: defaultdict[str, Rates] = defaultdict(Rates)  # by route
        self.keys: KeyTable = KeyTable.decode(b'{"version":0}')
        self.fleet = Fleet()
        self.harmony = options.harmony  # gpt-oss is behind this gateway
        self.unready = False  # stopping soon: whoever asks /readyz may go elsewhere, requests are still taken
        self.draining = False
        self.date_line = b""  # the Date header, renewed by the sweep
        self.jitter = random.Random().random  # noqa: S311 - spreads clients, guards nothing
        self.on_suspect: Callable[[str, int, str], None] = _nobody
        self._pools: dict[str, EnginePool] = {}
        self._chance = b""  # for request ids, used up to
        self._chance_at = 0
        self._entry_prefix = os.urandom(10)
        self._entries = 0
        self._ticking = False

    def next_request_id(self) -> bytes:
        """Chance alone: one that counted would tell a tenant how much the others ask."""
        at = self._chance_at
        if at + 20 > len(self._chance):
            self._chance, at = os.urandom(5000).hex().encode(), 0
        self._chance_at = at + 20
        return b"req-" + self._chance[at : at + 20]

    def next_entry(self) -> bytes:
        """The ledger's id of a request, whatever its caller calls it: 16 bytes, never again the same."""
        self._entries += 1
        return self._entry_prefix + self._entries.to_bytes(6, "big")

    def _wall_now(self) -> float:
        return self.wall()

    def open_ledger(self) -> None:
        """Waits for the disk: before the first request. What the ledger says of this day and month counts."""
        options = self.options
        if options.spool_folder:
            # What is open moves from a full file into the next, and needs its room twice there.
            least = 2 * MAX_FRAME_BYTES * (options.max_connections + 2)
            size = max(options.spool_segment_bytes, least)
            self.spool = SpoolWriter(Path(options.spool_folder), options.name, segment_bytes=size)
            if not options.worker:
                self.counted_from = self.wall()
                self.counted.seed(self.spent(self.counted_from), self.counted_from)

    def spent(self, wall: float) -> dict[str, tuple[int, int]]:
        """Tokens of the day and month of `wall` (Unix seconds) by subject, as the ledger and the spool have them now.
        Waits for the disk."""
        return seed(Path(self.options.spent_path), Path(self.options.spool_folder), wall)

    # -- the fleet

    def pool(self, replica: str) -> EnginePool | None:
        return self._pools.get(replica)

    def pools(self) -> Iterable[EnginePool]:
        return self._pools.values()

    def take_fleet(self, fleet: Fleet) -> None:
        """A new fleet from the supervisor: pools of processes that are gone are retired, waiters served."""
        old = {r.name: r for r in self.fleet.replicas}
        pools: dict[str, EnginePool] = {}
        for replica in fleet.replicas:
            before, pool = old.get(replica.name), self._pools.get(replica.name)
            same = before is not None and (before.incarnation, before.address) == (
                replica.incarnation,
                replica.address,
            )
            if pool is None or not same:
                pool = EnginePool(
                    replica.name, replica.address, self.loop, idle_seconds=self.options.upstream_idle_seconds
                )
            pools[replica.name] = pool
        for name, pool in self._pools.items():
            if pools.get(name) is not pool:
                pool.retire()
        self._pools, self.fleet = pools, fleet
        self.keys = self.keys.offering(fleet.models)
        self.harmony = self.options.harmony or any("gpt-oss" in model.lower() for model in fleet.models)
        now = self.now()
        for replica in fleet.replicas:
            if (before := old.get(replica.name)) is not None and _crashed(before, replica):
                self.killers.died(replica.name, before.incarnation, now)
        self.killers.keep(frozenset(pools))
        renewed = self.breakers.update({r.name: r.incarnation for r in fleet.replicas})
        self.dispatch(self.admission.update(fleet, now))
        for name in renewed:
            self.keep_away(name, False)
        for relay in self.admission.stranded():
            relay.on_stranded()
        if self.owner is not None:
            self.owner.tell_troubles()

    # -- admission

    def enter(self, demand: Demand, now: float) -> tuple[Seat, str] | None:
        """A seat and why it was chosen, or None: queued. Raises ServeError queue_full or no_ready_engine."""
        entered = self.admission.enter(demand, now, self.jitter())
        if entered.grants:
            self.dispatch(entered.grants)
        for relay in entered.shed:
            self.loop.call_soon(relay.on_shed)
        if entered.seat is not None:
            return entered.seat, entered.reason
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(TICK_SECONDS, self._tick)
        return None

    def leave(self, relay: "Relay | Distant") -> None:
        if grants := self.admission.leave(relay, self.now()):
            self.dispatch(grants)

    def first_token(self, relay: "Relay", now: float) -> None:
        if grants := self.admission.first_token(relay, now):
            self.dispatch(grants)

    def keep_away(self, replica: str, verdict: bool | None) -> None:
        """What a circuit breaker says; None where nothing changes."""
        if verdict is not None:
            trial = self.breakers.state(replica) is State.HALF_OPEN
            self.dispatch(self.admission.set_breaker(replica, self.now(), is_open=verdict, trial=trial))
        if self.owner is not None:
            self.owner.tell_troubles()

    def failed(self, replica: str, incarnation: int, known: tuple[bytes, int], now: float) -> None:
        """A try ended as an engine's death looks: all workers are to know of it. `known`: digest and length of the
        request's body."""
        self.killers.failed(replica, incarnation, *known, now)
        self._tell(Noted(replica, incarnation, *known))

    def cleared(self, digest: bytes) -> None:
        self.killers.cleared(digest)
        self._tell(Cleared(digest))

    def _tell(self, message: Message) -> None:
        if self.owner is not None:
            self.owner.tell(message)
        elif isinstance(self.admission, GuestAdmission):
            self.admission.say(message)

    def _hear(self, message: Message) -> None:
        """From the worker that owns admission."""
        if isinstance(message, Noted):
            self.killers.failed(message.replica, message.incarnation, message.digest, message.length, self.now())
        elif isinstance(message, Cleared):
            self.killers.cleared(message.digest)

    def retry_after(self, demand: Demand) -> float:
        return self.admission.retry_after(demand, self.now(), self.jitter())

    def dispatch(self, grants: Iterable[Grant]) -> None:
        """Grants are acted on in the next turn of the loop, so that nobody's release runs inside another's."""
        for grant in grants:
            self.loop.call_soon(grant.waiter.on_slot, grant.seat, grant.reason)

    def expire(self, now: float) -> None:
        """What time alone brings to those who wait."""
        self.counted.expire(now)
        for replica in self.breakers.tick(now):
            self.keep_away(replica, False)
        self.dispatch(self.admission.tick(now))
        for relay in self.admission.expired(now):
            relay.on_queue_timeout()

    def _tick(self) -> None:
        """Ten times a second while somebody waits."""
        self.expire(self.now())
        self._ticking = self.admission.queued > 0
        if self._ticking:
            self.loop.call_later(TICK_SECONDS, self._tick)

    # -- bodies

    def body_fits(self, more: int) -> bool:
        return self.counters.body_bytes + more <= self.options.max_bodies_bytes

    def give_back_body(self, relay: "Relay") -> None:
        self.counters.body_bytes -= relay.held_body_bytes
        relay.held_body_bytes = 0

    # -- metrics

    def report(self) -> dict[str, object]:
        gauges: list[tuple[str, dict[str, str], float]] = []
        if isinstance(self.admission, Admission):  # which has those of all workers
            gauges.append(("vitalis_in_flight", {}, self.admission.in_flight))
            gauges += [("vitalis_queued", {"class": c}, n) for c, n in self.admission.queued_by_class().items()]
            gauges += [
                ("vitalis_replica_in_flight", {"replica": seat.replica.name}, seat.in_flight)
                for seat in self.admission.seats()
            ]
            gauges += [
                ("vitalis_breaker_open", {"replica": name}, float(self.breakers.state(name) is not State.CLOSED))
                for name in self._pools
            ]
        for pool in self._pools.values():
            idle = pool.idle
            gauges.append(("vitalis_upstream_connections", {"replica": pool.name, "state": "idle"}, idle))
            gauges.append(
                (
                    "vitalis_upstream_connections",
                    {"replica": pool.name, "state": "assigned"},
                    pool.open - idle,
                )
            )
        gauges.append(("vitalis_limits_away", {}, float(self.redis is not None and self.redis.away)))
        gauges.append(("vitalis_limits_held", {}, self.limits.held))
        gauges.append(("vitalis_spool_open", {}, 0 if self.spool is None else self.spool.opened))
        redis = self.redis
        counted = [
            ("vitalis_access_log_dropped_total", {}, self.access.dropped),
            ("vitalis_estimate_error_tokens_total", {}, self.estimates.error_tokens),
            ("vitalis_estimates_total", {}, self.estimates.settled),
            ("vitalis_killers_refused_total", {}, self.killers.refusals),
            ("vitalis_uncounted_total", {}, self.counters.uncounted),
            ("vitalis_limits_timeouts_total", {}, 0 if redis is None else redis.timeouts),
            ("vitalis_limits_lost_total", {}, 0 if redis is None else redis.lost),
            ("vitalis_spool_unwritten_total", {}, 0 if self.spool is None else self.spool.unwritten),
            ("vitalis_spool_errors_total", {}, 0 if self.spool is None else self.spool.errors),
            *(("vitalis_breaker_openings_total", {"replica": r}, n) for r, n in self.breakers.openings.items()),
        ]
        return self.counters.report(gauges, counted)


def _crashed(before: Replica, now: Replica) -> bool:
    """Whether the process that was there before came to an end that nobody asked for."""
    # One that is ended by order drains first, so that it does not serve any more when the next one is started.
    return before.state in SERVING and (now.incarnation != before.incarnation or now.state in CRASHED)


def _in_redis(options: WorkerOptions, loop: asyncio.AbstractEventLoop, local: Limiting) -> "RedisLimits":
    from vitalis_serve.gateway.redis_limits import RedisLimits  # 0.2 s of imports, for who wants it

    return RedisLimits(
        options.limits_redis_url,
        loop=loop,
        wait_seconds=options.limits_wait_seconds,
        away=options.limits_away,
        lease_seconds=options.limits_lease_seconds,
        local=local,
    )


def _nobody(replica: str, incarnation: int, reason: str) -> None:
    """Nobody supervises this worker."""


def admission_options(options: WorkerOptions) -> AdmissionOptions:
    """Who talks to a person is answered in time or told when to come back; emergency and batch would rather wait."""
    limits = {
        name: ClassLimits(
            queue_requests=options.queue_requests,
            queue_bytes=options.max_bodies_bytes,
            queue_seconds=options.class_seconds.get(name, options.queue_seconds),
            overload_seconds=options.overload_seconds if name in ("interactive", "standard") else 0.0,
        )
        for name in CLASSES
    }
    return AdmissionOptions(
        classes=limits, reserved=options.reserved_share, cold_start_seconds=options.cold_start_seconds
    )
