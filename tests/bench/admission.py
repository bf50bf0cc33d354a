"""What routing and admission cost, per operation: `PYTHONPATH=server python tests/bench/admission.py`."""

import random
import time
from collections.abc import Callable
from typing import Any

from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.admission import Admission, AdmissionOptions, ClassLimits, Entered
from vitalis_serve.gateway.routing import policy
from vitalis_serve.gateway.seats import CLASSES, Demand, Seat

ROUNDS = 5


def fleet(replicas: int, slots: int = 64) -> Fleet:
    return Fleet(
        1,
        tuple(
            Replica(f"engine-{i}", f"unix:/{i}", ReplicaState.READY, ("m",), slots, 1, "", 400_000)
            for i in range(replicas)
        ),
    )


def best(act: Callable[[], int]) -> float:
    """Microseconds per operation, the best of some rounds; `act` returns how many operations it did."""
    results = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        count = act()
        results.append((time.perf_counter() - start) / count * 1e6)
    return min(results)


def demand(waiter: int, tenants: int = 50) -> Demand:
    return Demand(
        waiter=waiter, model="m", tenant=f"t{waiter % tenants}", prompt_tokens=400, output_tokens=150,
        affinity=random.getrandbits(60), body_bytes=1600,
    )  # fmt: skip


def decisions(name: str, replicas: int, full: int = 0) -> float:
    made = policy(name, 1)
    seats = [Seat(r, slots=64, ordinary_slots=58, common_slots=46, takes=True, models=frozenset({"m"})) for r in
             fleet(replicas).replicas]  # fmt: skip
    for seat in seats[:full]:
        seat.in_flight = 64
    made.update(seats)
    asked = [demand(i) for i in range(10_000)]
    for one in asked:
        made.choose(one)  # buckets are ordered at their first use

    def act() -> int:
        for one in asked:
            made.choose(one)
        return len(asked)

    return best(act)


def unqueued(replicas: int) -> float:
    """enter, first_token, leave where nobody waits."""
    admission = Admission()
    admission.update(fleet(replicas), 0.0)
    asked = [demand(i) for i in range(10_000)]

    def act() -> int:
        for one in asked:
            admission.enter(one, 0.0)
            admission.first_token(one.waiter, 0.01)
            admission.leave(one.waiter, 0.02)
        return len(asked)

    return best(act)


def queued(tenants: int, replicas: int = 4) -> dict[str, float]:
    """With 1024 in the queue: one in, one leaves and another is granted."""
    options = AdmissionOptions(classes=dict.fromkeys(CLASSES, ClassLimits(queue_requests=1024, queue_seconds=1e9)))
    admission = Admission(options)
    admission.update(fleet(replicas), 0.0)
    spent: dict[str, list[float]] = {}
    granted: list[int] = []
    clock = time.perf_counter
    numbers = iter(range(10**9))

    def timed(what: str, act: Callable[..., Any], *given: Any) -> None:
        began = clock()
        result = act(*given)
        spent.setdefault(what, []).append(clock() - began)
        if isinstance(result, Entered):
            if result.seat is not None:
                granted.append(given[0].waiter)
                timed("first token", admission.first_token, given[0].waiter, given[1])
            result = result.grants
        for grant in result if isinstance(result, list | tuple) else ():
            granted.append(grant.waiter)
            timed("first token", admission.first_token, grant.waiter, given[-1])

    now = 0.0
    for turn in range(6000):
        now += 0.01
        while admission.queued < 1024:
            timed("enter", admission.enter, demand(next(numbers), tenants), now)
        newcomer = Demand(waiter=-turn - 1, model="m", tenant=f"new-{turn}", prompt_tokens=400, output_tokens=150)
        if tenants < 1024:
            timed("enter by shedding", admission.enter, newcomer, now)
            timed("withdraw", admission.withdraw, newcomer.waiter)
        timed("leave and grant", admission.leave, granted.pop(random.randrange(len(granted))), now)
    return {what: sorted(times)[len(times) // 2] * 1e6 for what, times in spent.items()}


if __name__ == "__main__":
    for name in ("affinity", "session", "least_tokens", "round_robin"):
        print(f"{name}: " + ", ".join(f"{n} replicas {decisions(name, n):.2f} us" for n in (2, 16)), end="; ")
        print(f"15 of 16 full {decisions(name, 16, 15):.2f} us, all full {decisions(name, 16, 16):.2f} us")
    print(f"enter + first_token + leave, nobody queued: {unqueued(2):.2f} us (2 replicas), {unqueued(16):.2f} us (16)")
    for tenants in (1, 50, 1024):
        print(f"1024 queued of {tenants} tenants:", ", ".join(f"{k} {v:.1f} us" for k, v in queued(tenants).items()))
