"""What limits in Redis cost a request: `python tests/bench/redis_limits.py`.

A real redis-server on loopback (TCP, as between hosts), one `RedisLimits`. The time that reserving adds to a request,
alone and with others under way; the CPU of reserve and settle together, of the gateway and of Redis.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

import uvloop  # noqa: E402
from vitalis_serve.gateway.limiting import LocalLimiting  # noqa: E402
from vitalis_serve.gateway.limits import Claim, Limits, Rates, Subject  # noqa: E402
from vitalis_serve.gateway.redis_limits import RedisLimits  # noqa: E402

from tests.support.redis import RedisServer, free_port  # noqa: E402

WIDE = Rates(10**7, 10**10, 10**6, 10**13, 10**13)
REQUESTS = 3000
TENANTS = 20


def claim(n: int, subjects: int) -> Claim:
    tenant = f"t{n % TENANTS}"
    all_three = (
        Subject(f"key:{tenant}-{n % 3}", WIDE, tenant), Subject(f"tenant:{tenant}", WIDE, tenant),
        Subject("route:chat", WIDE),
    )  # fmt: skip
    return Claim(all_three[:subjects], 500)


def redis_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(server: RedisServer, *, together: int, subjects: int) -> None:
    loop = asyncio.get_running_loop()
    local = LocalLimiting(Limits(), time.time)
    limits = RedisLimits(server.url, loop=loop, wait_seconds=5, away="refuse", lease_seconds=30, local=local)
    running = asyncio.create_task(limits.run())
    while limits.away:
        await asyncio.sleep(0.01)
    waited: list[float] = []
    asked = [claim(n, subjects) for n in range(REQUESTS)]
    finished = loop.create_future()
    begun = 0

    def begin() -> None:
        nonlocal begun
        if begun == REQUESTS:
            return
        number, came = begun, time.perf_counter()
        begun += 1

        def answered(_: object) -> None:
            waited.append(time.perf_counter() - came)
            limits.settle(number, 400, came)
            loop.call_soon(begin)
            if len(waited) == REQUESTS:
                finished.set_result(None)

        limits.reserve(asked[number], number, came, answered)

    cpu, redis_cpu = time.process_time(), redis_seconds(server.pid)
    for _ in range(together):
        begin()
    await finished
    await limits.drained(10)
    cpu, redis_cpu = time.process_time() - cpu, redis_seconds(server.pid) - redis_cpu
    assert not limits.timeouts
    cuts = statistics.quantiles(waited, n=100)
    print(
        f"{subjects} subjects, {together:3} at once: p50 {cuts[49] * 1e3:6.2f} ms   p99 {cuts[98] * 1e3:6.2f} ms   "
        f"CPU {cpu / REQUESTS * 1e6:5.1f} us   Redis' {redis_cpu / REQUESTS * 1e6:5.1f} us"
    )
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), port=free_port())
        server.start()
        try:
            for subjects in (2, 3):
                for together in (1, 8, 64):
                    uvloop.run(measure(server, together=together, subjects=subjects))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
