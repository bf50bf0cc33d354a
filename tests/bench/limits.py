"""What limits cost, per operation: `PYTHONPATH=server python tests/bench/limits.py`."""

import gc
import time
from collections.abc import Callable

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.limits import Claim, Limits, Rates, Subject

ROUNDS = 9
COUNT = 20_000
WALL = 1_700_000_000.0
WIDE = Rates(10**9, 10**12, 10**6, 10**15, 10**16)
BUDGET = Rates(None, None, None, 10**15)
IDLE = 100_000


def best(act: Callable[[], int]) -> float:
    """Microseconds per operation, the best of some rounds; `act` returns how many operations it did."""
    results = []
    for _ in range(ROUNDS):
        start = time.process_time()
        count = act()
        results.append((time.process_time() - start) / count * 1e6)
    return min(results)


def claims(rates: Rates, tenants: int) -> list[Claim]:
    return [
        Claim((Subject(f"key:k{n}", rates), Subject(f"tenant:t{n % tenants}", rates)), 500) for n in range(tenants * 4)
    ]


def served(rates: Rates, *, together: int) -> float:
    """reserve and settle, with so many requests in flight."""
    made, asked = Limits(), claims(rates, 50)
    now = [0.0]

    def act() -> int:
        for n in range(COUNT):
            now[0] += 0.001
            made.reserve(asked[n % len(asked)], n, now[0], WALL + now[0])
            made.settle(n - together, 420, now[0], WALL + now[0])
        for n in range(COUNT - together, COUNT):
            made.settle(n, 420, now[0], WALL + now[0])
        return COUNT

    return best(act)


def refused() -> float:
    made, asked = Limits(), claims(Rates(1, 1, 1, 1, 1), 50)
    for n, claim in enumerate(asked[:50]):
        made.reserve(claim, n, 0.0, WALL)

    def act() -> int:
        for n in range(2000):
            try:
                made.reserve(asked[n % 50], "never", 0.0, WALL)
            except ServeError:
                continue
        return 2000

    return best(act)


def expired() -> tuple[float, float, int]:
    """Calls with many idle subjects: milliseconds of the longest and of all, and how many until none is left."""
    made = Limits()
    for n in range(IDLE):
        made.reserve(Claim((Subject(f"key:k{n}", WIDE),), 500), n, 0.0, WALL)
        made.settle(n, 420, 0.0, WALL)
    took = []
    while len(made):
        start = time.process_time()
        made.expire(100.0)
        took.append((time.process_time() - start) * 1e3)
    return max(took), sum(took), len(took)


def main() -> None:
    gc.freeze()
    print(f"reserve + settle, key and tenant with all five   {served(WIDE, together=64):6.2f} us")
    print(f"  with requests and tokens per minute alone      {served(Rates(10**9, 10**12), together=64):6.2f} us")
    print(f"  with a budget alone                            {served(BUDGET, together=64):6.2f} us")
    print(f"refused by all five                              {refused():6.2f} us")
    longest, together, calls = expired()
    print(f"expire, {IDLE} idle subjects: {together:.0f} ms in {calls} calls, the longest {longest:.2f} ms")


if __name__ == "__main__":
    main()
