"""What all connections of one worker share, with one writer for each: the event loop."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vitalis_serve.fleet import Fleet
from vitalis_serve.gateway.access import AccessLog
from vitalis_serve.gateway.admission import Admission, Grant, Seat
from vitalis_serve.gateway.counters import Counters
from vitalis_serve.gateway.keys import KeyTable
from vitalis_serve.gateway.options import WorkerOptions
from vitalis_serve.gateway.pool import EnginePool

if TYPE_CHECKING:
    from vitalis_serve.gateway.relay import Relay

logger = logging.getLogger(__name__)


class WorkerState:
    def __init__(self, options: WorkerOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.loop = loop
        self.now: Callable[[], float] = loop.time
        self.wall: Callable[[], float] = time.time
        self.counters = Counters()
        self.access = AccessLog(options.access_log_path)
        self.admission = Admission(
            queue_requests=options.queue_requests,
            queue_seconds=options.queue_seconds,
            workers=options.workers,
        )
        self.keys: KeyTable = KeyTable.decode(b'{"version":0}')
        self.fleet = Fleet()
        self.unready = False  # stopping soon: whoever asks /readyz may go elsewhere, requests are still taken
        self.draining = False
        self.date_line = b""  # the Date header, renewed by the sweep
        self.on_suspect: Callable[[str, int, str], None] = _nobody
        self._pools: dict[str, EnginePool] = {}
        self._id_prefix = b"req-" + os.urandom(6).hex().encode()
        self._ids = 0

    def next_request_id(self) -> bytes:
        self._ids += 1
        return b"%b%x" % (self._id_prefix, self._ids)

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
        self.dispatch(self.admission.update(fleet))
        for relay in self.admission.stranded():
            relay.on_stranded()

    def suspect(self, seat: Seat | None, reason: str) -> None:
        if seat is not None:
            self.on_suspect(seat.replica.name, seat.replica.incarnation, reason)

    # -- admission

    def leave(self, seat: Seat) -> None:
        grants = self.admission.leave(seat, self.now())
        if grants:
            self.dispatch(grants)

    def dispatch(self, grants: Iterable[Grant]) -> None:
        """Grants are acted on in the next turn of the loop, so that nobody's release runs inside another's."""
        for grant in grants:
            self.loop.call_soon(grant.waiter.on_slot, grant.seat)

    # -- bodies

    def body_fits(self, more: int) -> bool:
        return self.counters.body_bytes + more <= self.options.max_bodies_bytes

    def give_back_body(self, relay: "Relay") -> None:
        self.counters.body_bytes -= relay.held_body_bytes
        relay.held_body_bytes = 0

    # -- metrics

    def report(self) -> dict[str, object]:
        gauges: list[tuple[str, dict[str, str], float]] = [
            ("vitalis_in_flight", {}, self.admission.in_flight),
            ("vitalis_queued", {}, self.admission.queued),
        ]
        gauges += [
            ("vitalis_replica_in_flight", {"replica": seat.replica.name}, seat.in_flight)
            for seat in self.admission.seats()
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
        return self.counters.report(gauges, self.access.dropped)


def _nobody(replica: str, incarnation: int, reason: str) -> None:
    """Nobody supervises this worker."""
