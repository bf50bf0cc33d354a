"""Limits counted in a real Redis: the same rules as `limits.py`, exact over processes, and what happens while Redis is
slow, gone, emptied, full, or no Redis at all."""

import asyncio
import contextlib
import datetime
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis import Redis
from vitalis_serve.errors import ConfigurationError, ServeError
from vitalis_serve.gateway.limiting import GuestLimiting, Limiting, LocalLimiting, OwnerLimiting
from vitalis_serve.gateway.limits import DAY, Claim, Limits, Rates, Standing, Subject
from vitalis_serve.gateway.owner_line import Line, Message
from vitalis_serve.gateway.redis_limits import EPOCH, SCRIPT, Plan, RedisLimits

from tests.support import redis as support
from tests.support.redis import RedisServer

ROOT = Path(__file__).parents[2]
SECONDS = 15
AMPLE = Rates(10**6, 10**9, 10**6, 10**12, 10**12)


def subject(kind: str, rates: Rates, whose: str) -> Subject:
    return Subject("route:t", rates) if kind == "route" else Subject(f"{kind}:{whose}", rates, whose)


def claim(tokens: int = 100, whose: str = "t", **rates: Rates) -> Claim:
    """rates: of `key`, `tenant` and `route`."""
    return Claim(tuple(subject(kind, one, whose) for kind, one in rates.items()), tokens)


class Host:
    """A gateway's side, with an answer to wait for."""

    def __init__(self, limits: RedisLimits) -> None:
        self.limits = limits
        self.holders = 0

    def ask(self, asked: Claim, holder: object = None) -> "asyncio.Future[Standing | ServeError]":
        answer = asyncio.get_running_loop().create_future()
        self.limits.reserve(asked, object() if holder is None else holder, time.monotonic(), answer.set_result)
        return answer

    async def reserve(self, asked: Claim, holder: object = None) -> str:
        """ "yes", or the code of the error."""
        answer = await self.ask(asked, holder)
        return answer.code if isinstance(answer, ServeError) else "yes"

    def settle(self, holder: object, tokens: int | None) -> None:
        self.limits.settle(holder, tokens, time.monotonic())

    def release(self, holder: object) -> None:
        self.limits.release(holder, time.monotonic())

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            await asyncio.sleep(0.005)

    async def back(self) -> None:
        await self.until(lambda: not self.limits.away)

    async def settled(self) -> None:
        """Redis has heard everything."""
        await self.limits.drained(SECONDS)


@contextlib.asynccontextmanager
async def host(
    url: str,
    *,
    local: Limiting | None = None,
    away: str = "share",
    wait: float = 0.5,
    lease: float = 30,
    connected: bool = True,
) -> AsyncIterator[Host]:
    """wait: ten times of what is shipped, as other tests keep the machine busy. local: of a host that is one of two."""
    limits = RedisLimits(
        url,
        loop=asyncio.get_running_loop(),
        wait_seconds=wait,
        away=away,
        lease_seconds=lease,
        local=local or LocalLimiting(Limits(0.5), time.time),
    )
    running = asyncio.create_task(limits.run())
    made = Host(limits)
    try:
        if connected:
            await made.back()
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(scenario, 60))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with support.started(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """Emptied; for tests that let it be as it is."""
    with shared.client() as client:
        client.flushall()
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """For tests that do something to it."""
    with support.started(tmp_path) as server:
        yield server


def held(server: RedisServer, name: str = "key:t", tag: str = "t") -> int:
    with server.client() as client:
        return int(client.zcard(f"vts:{{{tag}}}:{name}:held"))


class Account:
    """What Redis keeps of a subject, for eyes and hands of a test."""

    FIELDS = (
        "requests_full", "requests_cost", "tokens_full", "tokens_cost", "reserved", "day", "day_spent", "month",
        "month_spent", "hold", "keep", "swept",
    )  # fmt: skip

    def __init__(self, server: RedisServer, name: str = "key:t", tag: str = "t") -> None:
        self._server = server
        self._key = f"vts:{{{tag}}}:{name}"

    def read(self) -> dict[str, float]:
        with Redis.from_url(self._server.url, protocol=2) as client:
            kept = client.get(self._key)
        assert isinstance(kept, bytes)
        return dict(zip(self.FIELDS, struct.unpack("<12d", kept), strict=True))

    def change(self, **values: float) -> None:
        packed = struct.pack("<12d", *(self.read() | values).values())
        with Redis.from_url(self._server.url, protocol=2) as client:
            client.set(self._key, packed)


# -- the rules


class Both:
    """Everything is said to Redis and, with Redis' time, to `Limits`: the answers must be the same to the letter."""

    def __init__(self, server: RedisServer) -> None:
        self.limits = Limits()
        self.outcomes: Counter[str] = Counter()
        self._client = server.client()
        self._client.script_load(SCRIPT.text)
        self._connection = self._client.connection_pool.get_connection()
        self._held: dict[int, tuple[Plan, Claim, str]] = {}
        self._holders = 0

    def close(self) -> None:
        self._client.connection_pool.release(self._connection)
        self._client.close()

    def _say(self, packed: bytes) -> list[bytes]:
        self._connection.send_packed_command([packed])
        return [word.encode() for word in self._connection.read_response().split(" ")]

    def reserve(self, asked: Claim) -> None:
        self._holders += 1
        holder, plan = self._holders, Plan(asked.subjects)
        member = b"test-%d:%d" % (holder, asked.tokens)
        verdict, at, *figures = self._say(plan.reservation(member, b"%d" % asked.tokens, b"1e18", b"30"))
        now = float(at)
        outcome = plan.standing(figures, now) if verdict == b"yes" else plan.refusal(figures, now)
        expected: Standing | ServeError
        try:
            expected = self.limits.reserve(asked, holder, now, now + EPOCH)
            self._held[holder] = plan, asked, at.decode()
        except ServeError as error:
            expected = error
        assert self._said(outcome) == self._said(expected)
        self.outcomes[outcome.code if isinstance(outcome, ServeError) else "yes"] += 1

    def end(self, choice: random.Random) -> None:
        if not self._held:
            return
        holder = choice.choice(list(self._held))
        plan, asked, since = self._held.pop(holder)
        member, estimate = b"test-%d:%d" % (holder, asked.tokens), b"%d" % asked.tokens
        if choice.random() < 0.2:
            found, at = self._say(plan.call(b"release", member, estimate))
            self.limits.release(holder, float(at), float(at) + EPOCH)
        else:
            used = choice.choice((0, asked.tokens // 2, asked.tokens, asked.tokens * 3))
            found, at = self._say(plan.call(b"settle", member, estimate, b"%d" % used, since.encode()))
            self.limits.settle(holder, used, float(at), float(at) + EPOCH)
        assert int(found) == len(asked.subjects)

    def _said(self, outcome: Standing | ServeError) -> tuple[object, ...]:
        if isinstance(outcome, Standing):
            return ("yes", outcome.headers)
        return (outcome.code, outcome.message, outcome.retry_after, outcome.headers)


VARIANTS = {
    "key": (Rates(25, 30_000, 5), Rates(200, None, 9), Rates(None, 6000, None, 9000), Rates(concurrent=4), Rates(600)),
    "tenant": (Rates(1200, 7000, 9, 15_000, 30_000), Rates(None, 30_000), Rates(400, None, 12, 20_000), Rates(40)),
    "route": (Rates(900, 60_000, 14), Rates(), Rates(None, None, 10, None, 60_000), Rates(None, 20_000)),
}


def test_redis_and_memory_agree_on_random_sequences(server: RedisServer) -> None:
    """Every rule refuses now and then, two tenants share a route, and limits change on the way."""
    outcomes: Counter[str] = Counter()
    for seed in range(4):
        choice = random.Random(seed)
        with server.client() as client:
            client.flushall()
        rates = {kind: choice.choice(variants) for kind, variants in VARIANTS.items()}
        with contextlib.closing(Both(server)) as both:
            for _ in range(800):
                if choice.random() < 0.02:
                    kind = choice.choice(list(rates))
                    rates[kind] = choice.choice(VARIANTS[kind])
                if choice.random() < 0.01:
                    time.sleep(choice.random() / 20)
                if choice.random() < 0.5:
                    kinds = [kind for kind in rates if choice.random() < 0.8] or ["key"]
                    tokens = choice.choice((0, 1, 7, 60, 400))
                    both.reserve(claim(tokens, choice.choice("ab"), **{kind: rates[kind] for kind in kinds}))
                else:
                    both.end(choice)
        assert both.outcomes["yes"] > 20
        outcomes += both.outcomes
    assert set(outcomes) == {"yes", "requests_limit", "tokens_limit", "concurrency_limit", "budget_spent"}, outcomes


def test_the_scripts_months_are_the_calendars(server: RedisServer) -> None:
    text = SCRIPT.text.partition("-- calendar")[2].partition("\n")[2].partition("-- end of calendar")[0]
    days = 60_000
    with server.client() as client:
        program = (
            f"local floor = math.floor\n{text}\nlocal a = {{}} for d = 0, {days} do a[d + 1] = month_of(d) end return a"
        )
        months = client.eval(program, 0)
    first = datetime.date(1970, 1, 1)
    dates = (first + datetime.timedelta(day) for day in range(days + 1))
    assert months == [date.year * 12 + date.month - 1 for date in dates]


def test_days_and_months_begin_and_a_clock_set_back_begins_none(server: RedisServer) -> None:
    asked = claim(key=Rates(tokens_per_day=100, tokens_per_month=1000))

    async def scenario() -> None:
        async with host(server.url) as one:
            assert await one.reserve(asked, "a") == "yes"
            one.settle("a", 100)
            assert await one.reserve(asked) == "budget_spent"
            account = Account(server)
            spent = account.read()
            assert (spent["day_spent"], spent["month_spent"], spent["reserved"]) == (100, 100, 0)
            account.change(day=spent["day"] + 1)
            assert await one.reserve(asked) == "budget_spent"
            account.change(day=spent["day"] - 1)
            assert await one.reserve(asked, "b") == "yes"
            one.settle("b", 100)
            account.change(day=spent["day"] - 1, month_spent=1000)
            assert await one.reserve(asked) == "budget_spent"
            account.change(month=spent["month"] - 1, day=spent["day"] - 1)
            assert await one.reserve(asked) == "yes"

    run(scenario())


def test_what_is_in_the_heads_is_of_the_key_or_tenant(server: RedisServer) -> None:
    async def scenario() -> None:
        async with host(server.url) as one:
            asked = claim(key=Rates(60, 6000), tenant=Rates(600, 600), route=Rates(1))
            answer = await one.ask(asked)
            assert isinstance(answer, Standing)
            assert answer.headers == (
                b"x-ratelimit-limit-requests: 60\r\nx-ratelimit-remaining-requests: 59\r\n"
                b"x-ratelimit-reset-requests: 1s\r\nx-ratelimit-limit-tokens: 600\r\n"
                b"x-ratelimit-remaining-tokens: 500\r\nx-ratelimit-reset-tokens: 10s\r\n"
            )
            refused = await one.ask(asked)
            assert isinstance(refused, ServeError)
            assert refused.code == "requests_limit"
            assert "route `t`" in refused.message
            assert refused.retry_after == 60
            assert b"remaining-requests: 59\r\n" in refused.headers

    run(scenario())


# -- several processes


def child(url: str, *, lease: float = 30, hold: bool, seconds: float, asked: Claim) -> "subprocess.Popen[str]":
    """A gateway of its own: asks eight at a time; holds what it gets, or settles it at once."""
    words = {"url": url, "lease": lease, "hold": hold, "seconds": seconds, "tokens": asked.tokens}
    words["rates"] = {one.name.partition(":")[0]: [getattr(one.rates, n) for n in Rates.__struct_fields__]
                      for one in asked.subjects}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(words)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
    )


async def _gateway(words: dict[str, Any]) -> None:
    asked = claim(words["tokens"], **{kind: Rates(*rates) for kind, rates in words["rates"].items()})
    counts: Counter[str] = Counter()
    async with host(words["url"], wait=5, lease=words["lease"], away="refuse") as one:
        until = time.monotonic() + words["seconds"]
        print("ready", flush=True)

        async def client() -> None:
            while time.monotonic() < until:
                holder = object()
                verdict = await one.reserve(asked, holder)
                counts[verdict] += 1
                if verdict != "yes":
                    await asyncio.sleep(0.001)
                elif not words["hold"]:
                    one.settle(holder, asked.tokens)

        await asyncio.gather(*(client() for _ in range(8)))
        await one.settled()
        print(json.dumps(counts), flush=True)
        if words["hold"]:
            await asyncio.sleep(600)


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextlib.contextmanager
def children(number: int, *arguments: Any, **words: Any) -> Iterator[list["subprocess.Popen[str]"]]:
    started = [child(*arguments, **words) for _ in range(number)]
    try:
        assert [_line(one) for one in started] == ["ready"] * number
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait(SECONDS)
            assert one.stdout is not None
            one.stdout.close()


def test_several_processes_together_let_in_what_the_limits_say(server: RedisServer) -> None:
    """By the minute: what the bucket held, what came in while they ran, and at most one more."""
    rates = Rates(requests_per_minute=600, concurrent=10**6)
    began = time.monotonic()
    with children(3, server.url, hold=False, seconds=1.5, asked=claim(10, key=rates, tenant=AMPLE)) as gateways:
        counts = sum((Counter(json.loads(_line(one))) for one in gateways), Counter[str]())
    elapsed = time.monotonic() - began
    assert set(counts) == {"yes", "requests_limit"}
    assert 600 <= counts["yes"] <= 600 + elapsed * 10 + 1
    spent = Account(server).read()
    assert spent["day_spent"] == counts["yes"] * 10
    assert spent["reserved"] == 0
    assert held(server) == 0


def test_several_processes_share_a_budget_to_the_token(server: RedisServer) -> None:
    rates = Rates(tokens_per_day=10_050)
    with children(3, server.url, hold=False, seconds=1, asked=claim(100, tenant=rates)) as gateways:
        counts = sum((Counter(json.loads(_line(one))) for one in gateways), Counter[str]())
    assert counts["yes"] == 101  # the last is the one request that goes over
    assert counts["budget_spent"] > 0


def test_a_killed_process_gives_back_with_its_lease_and_a_living_one_keeps_it(server: RedisServer) -> None:
    asked = claim(100, key=Rates(concurrent=9, tokens_per_day=10**6), route=Rates(concurrent=9))

    async def scenario(gateways: list["subprocess.Popen[str]"]) -> None:
        async with host(server.url, wait=5, lease=3, away="refuse") as one:
            assert await one.reserve(asked) == "concurrency_limit"
            await asyncio.sleep(3.5)  # longer than a lease
            assert held(server) == 9
            assert await one.reserve(asked) == "concurrency_limit"
            kept = Account(server).read()["reserved"]
            assert kept == 900
            for gateway in gateways:
                gateway.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + SECONDS
            while await one.reserve(asked, "mine") != "yes":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert held(server) == held(server, "route:t", "route:t") == 1
            assert Account(server).read()["reserved"] == 100

    with children(2, server.url, lease=3, hold=True, seconds=0.3, asked=asked) as gateways:
        counts = [json.loads(_line(one)) for one in gateways]
        assert sum(one.get("yes", 0) for one in counts) == 9
        run(scenario(gateways))


# -- Redis in trouble


Trouble = Callable[[RedisServer], None]
TROUBLES: dict[str, tuple[Trouble, Trouble]] = {
    "slow": (RedisServer.freeze, RedisServer.thaw),
    "gone": (RedisServer.kill, RedisServer.start),
    "full": (RedisServer.fill, RedisServer.empty),
}


@pytest.mark.parametrize("away", ["share", "refuse"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_policy_answers_while_redis_is_in_trouble_and_redis_afterwards(
    own: RedisServer, trouble: str, away: str
) -> None:
    begin, end = TROUBLES[trouble]
    asked = claim(key=Rates(concurrent=4))  # half of it is this host's share

    async def scenario() -> None:
        async with host(own.url, away=away, wait=0.05) as one:
            await one.back()
            begin(own)
            began = time.monotonic()
            verdicts = await asyncio.gather(*(one.reserve(asked, holder) for holder in range(5)))
            assert time.monotonic() - began < 2  # 50 ms, and a busy machine's patience
            expected = {"yes": 2, "concurrency_limit": 3} if away == "share" else {"limits_unavailable": 5}
            assert Counter(verdicts) == expected
            await one.until(lambda: one.limits.away)
            # Nobody waits again: the answer is there in the next turn of the loop, whatever Redis does.
            answer = one.ask(asked)
            for _ in range(3):
                await asyncio.sleep(0)
            assert answer.done()
            end(own)
            await one.back()
            verdicts = [await one.reserve(asked, f"then-{n}") for n in range(5)]
            assert verdicts == ["yes"] * 4 + ["concurrency_limit"]
            assert one.limits.away_seconds > 0

    run(scenario())


def test_a_frozen_redis_piles_nothing_up_and_keeps_nothing(own: RedisServer) -> None:
    asked = claim(key=AMPLE, tenant=AMPLE, route=AMPLE)

    async def scenario() -> None:
        async with host(own.url, wait=0.05) as one:
            tasks = len(asyncio.all_tasks())
            own.freeze()
            answers = [one.ask(asked, n) for n in range(5000)]
            assert len(asyncio.all_tasks()) == tasks
            assert {type(answer) for answer in await asyncio.gather(*answers)} == {Standing}
            assert one.limits.away
            for n in range(5000, 10_000):
                one.ask(asked, n)
            assert len(asyncio.all_tasks()) <= tasks + 1
            await asyncio.sleep(1.5)  # it connects anew, in vain
            assert len(asyncio.all_tasks()) <= tasks + 1
            assert one.limits.waiting == 0
            assert one.limits.timeouts == 5000
            assert one.limits.late <= 5000
            for n in range(10_000):
                one.settle(n, 100)
            own.thaw()
            await one.back()
            await one.settled()
            assert held(own) == held(own, "tenant:t") == held(own, "route:t", "route:t") == 0
            assert one.limits.waiting == one.limits.late == 0
            assert one.limits.lost == 0  # all were let in here

    run(scenario())


@contextlib.asynccontextmanager
async def proxied(server: RedisServer) -> AsyncIterator["Proxy"]:
    proxy = Proxy(server)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()


class Proxy:
    """Before a Redis on a Unix socket; what Redis says may be held up (`through` cleared) or never arrive (`cut`)."""

    def __init__(self, server: RedisServer) -> None:
        self._path = server.url.removeprefix("unix://")
        self.through = asyncio.Event()
        self.through.set()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._on_client, "127.0.0.1", 0)

    async def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.through.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_unix_connection(self._path)
        self._writers += [writer, to_redis]
        for task in (self._pass(reader, to_redis), self._pass(from_redis, writer, self.through)):
            self._tasks.add(asyncio.create_task(task))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, through: asyncio.Event | None = None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if through is not None:
                    await through.wait()
                writer.write(data)


async def _came_late(proxy: Proxy) -> None:
    proxy.through.set()


@pytest.mark.parametrize("fate", [_came_late, Proxy.cut], ids=["late", "never"])
def test_what_was_reserved_without_our_hearing_of_it_is_taken_back(
    server: RedisServer, fate: Callable[[Proxy], Awaitable[None]]
) -> None:
    asked = claim(key=Rates(60, 6000, 4, 10_000), route=Rates(concurrent=4))

    async def scenario() -> None:
        async with proxied(server) as proxy, host(proxy.url, away="refuse") as one:
            proxy.through.clear()
            assert await asyncio.gather(*(one.reserve(asked) for _ in range(4))) == ["limits_unavailable"] * 4
            assert held(server) == held(server, "route:t", "route:t") == 4
            await fate(proxy)
            await one.back()
            await one.settled()
            assert held(server) == held(server, "route:t", "route:t") == 0
            account = Account(server).read()
            assert account["reserved"] == account["day_spent"] == 0
            answer = await one.ask(asked)
            assert isinstance(answer, Standing)
            assert b"remaining-requests: 59\r\n" in answer.headers
            assert b"remaining-tokens: 5900\r\n" in answer.headers

    run(scenario())


def test_a_claim_carried_out_too_late_does_nothing(own: RedisServer) -> None:
    """Redis wakes up, finds it in its socket, and knows that nobody waits for it any more."""

    async def scenario() -> None:
        async with host(own.url, away="refuse", wait=0.05) as one:
            own.freeze()
            assert await one.reserve(claim(key=Rates(concurrent=1))) == "limits_unavailable"
            own.thaw()
            await one.back()
            assert one.limits.undone == 0
            with own.client() as client:
                assert not client.exists("vts:{t}:key:t", "vts:{t}:key:t:held")

    run(scenario())


def test_each_is_settled_where_it_was_reserved(own: RedisServer) -> None:
    asked = claim(key=Rates(concurrent=2, tokens_per_day=1000))

    async def scenario() -> None:
        async with host(own.url, wait=0.05) as one:
            assert await one.reserve(asked, "there") == "yes"
            own.freeze()
            assert await one.reserve(asked, "here") == "yes"
            assert await one.reserve(asked) == "concurrency_limit"  # 1 is this host's share
            one.settle("there", 250)
            assert await one.reserve(asked) == "concurrency_limit"
            own.thaw()
            await one.back()
            await one.settled()
            account = Account(own).read()
            assert (account["day_spent"], account["reserved"]) == (250, 0)
            one.settle("here", 70)
            await one.settled()
            assert Account(own).read()["day_spent"] == 250
            assert one.limits.lost == 0

    run(scenario())


def test_a_restarted_redis_learns_what_runs_and_what_was_spent(own: RedisServer) -> None:
    asked = claim(100, key=Rates(concurrent=2, tokens_per_day=1000))

    async def scenario() -> None:
        async with host(own.url) as one:
            one.limits.reconcile({"key:t": (700, 900), "key:other": (1, 1)}, "one", time.time())
            assert await one.reserve(asked, "a") == "yes"
            account = Account(own).read()
            assert (account["day_spent"], account["month_spent"], account["reserved"]) == (700, 900, 100)
            own.restart()
            await one.until(lambda: one.limits.away)
            await one.back()
            await one.settled()
            account = Account(own).read()
            assert (account["day_spent"], account["month_spent"], account["reserved"]) == (700, 900, 100)
            assert held(own) == 1
            assert await one.reserve(asked, "b") == "yes"
            assert await one.reserve(asked) == "concurrency_limit"
            one.settle("a", 50)
            one.limits.reconcile({"key:t": (1000, 1000)}, "one", time.time())
            one.settle("b", 10)
            await one.settled()
            assert Account(own).read()["day_spent"] in (1000, 1010)
            assert await one.reserve(asked) == "budget_spent"
            one.limits.reconcile({"key:t": (5, 5)}, "one", time.time())  # the ledger is behind
            assert await one.reserve(asked) == "budget_spent"

    run(scenario())


def test_what_was_spent_yesterday_does_not_count_today(server: RedisServer) -> None:
    """The ledger was read before midnight, and Redis hears of it after."""

    async def scenario() -> None:
        asked = claim(100, key=Rates(tokens_per_day=1000), tenant=Rates(tokens_per_month=1000))
        async with host(server.url) as one:
            one.limits.reconcile({"key:t": (1000, 1000)}, "one", time.time() - DAY)
            assert await one.reserve(asked, "a") == "yes"
            await one.settled()
            assert Account(server).read()["day_spent"] == 0
            one.limits.reconcile({"key:t": (1000, 1000)}, "one", time.time())
            assert await one.reserve(asked) == "budget_spent"

    run(scenario())


def test_what_each_host_spent_is_added_up(own: RedisServer) -> None:
    """A Redis that lost everything is told by each of them what it knows; twice is as good as once."""

    async def scenario() -> None:
        asked = claim(100, key=Rates(tokens_per_day=1000))
        async with host(own.url) as one, host(own.url) as two:
            assert await one.reserve(asked, "a") == "yes"
            assert await two.reserve(asked, "b") == "yes"
            for _ in range(2):
                one.limits.reconcile({"key:t": (400, 400)}, "one", time.time())
                two.limits.reconcile({"key:t": (500, 700)}, "two", time.time())
            await one.settled()
            await two.settled()
            account = Account(own).read()
            assert (account["day_spent"], account["month_spent"]) == (900, 1100)
            one.settle("a", 60)
            two.settle("b", 60)
            await one.settled()
            await two.settled()
            assert await one.reserve(asked) == "budget_spent"

    run(scenario())


def test_a_forgotten_script_is_loaded_again_without_anybody_noticing(server: RedisServer) -> None:
    async def scenario() -> None:
        async with host(server.url, away="refuse", wait=5) as one:
            for n in range(3):
                with server.client() as client:
                    client.script_flush()
                assert await asyncio.gather(*(one.reserve(claim(key=AMPLE), (n, m)) for m in range(5))) == ["yes"] * 5
            assert held(server) == 15
            for n in range(3):
                for m in range(5):
                    one.release((n, m))
            await one.settled()
            assert held(server) == 0
            assert not one.limits.away

    run(scenario())


def test_a_full_redis_still_hears_what_is_settled(own: RedisServer) -> None:
    asked = claim(key=Rates(concurrent=3, tokens_per_day=1000))

    async def scenario() -> None:
        async with host(own.url, away="refuse") as one:
            assert [await one.reserve(asked, n) for n in range(3)] == ["yes"] * 3
            own.fill()
            one.settle(0, 40)
            one.release(1)
            await one.settled()
            account = Account(own).read()
            assert (account["day_spent"], account["reserved"], held(own)) == (40, 100, 1)
            assert await one.reserve(asked) == "limits_unavailable"
            assert (Account(own).read(), held(own)) == (account, 1)
            own.empty()
            await one.back()
            assert await one.reserve(asked) == "yes"
            assert one.limits.lost == 0

    run(scenario())


def test_nothing_is_heard_after_the_client_has_left(server: RedisServer) -> None:
    async def scenario() -> None:
        async with host(server.url) as one:
            answers = [one.ask(claim(key=AMPLE), n) for n in range(3)]
            one.limits.forget(0)  # before it was sent
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            one.release(1)  # before it was answered, most likely
            assert isinstance(await answers[2], Standing)
            await one.settled()
            assert not answers[0].done()
            assert not answers[1].done()
            assert held(server) == one.limits.in_flight == 1
            one.limits.forget(2)
            one.limits.forget(2)
            await one.settled()
            assert held(server) == one.limits.in_flight == 0

    run(scenario())


def test_a_client_that_leaves_while_redis_is_away_leaves_no_trace(own: RedisServer) -> None:
    async def scenario() -> None:
        async with host(own.url, connected=False) as one:
            answer = one.ask(claim(key=Rates(concurrent=2)), "gone")
            one.limits.forget("gone")
            assert await one.reserve(claim(key=Rates(concurrent=2))) == "yes"
            assert not answer.done()

    run(scenario())


@contextlib.asynccontextmanager
async def introduced(guest: GuestLimiting, limits: Limits) -> AsyncIterator[None]:
    """To an owner, who counts in `limits`."""
    loop = asyncio.get_running_loop()
    ours, its = socket.socketpair()
    ours.setblocking(False)
    its.setblocking(False)
    owners: list[OwnerLimiting] = []

    def made(line: Line) -> None:
        owners.append(OwnerLimiting(line, limits, time.time, 0))

    def owner_hears(_: Line, message: Message) -> None:
        owners[0].hear(message, time.monotonic())

    def guest_hears(_: Line, message: Any) -> None:
        guest.hear(message)

    def lost(_: Line) -> None:
        """The test is over."""

    owners_end, _ = await loop.create_unix_connection(lambda: Line(loop, owner_hears, lost, made), sock=its)
    guests_end, line = await loop.create_unix_connection(lambda: Line(loop, guest_hears, lost), sock=ours)
    guest.introduce(line)
    try:
        yield
    finally:
        owners_end.close()
        guests_end.close()


def test_without_redis_a_worker_asks_its_hosts_owner(own: RedisServer) -> None:
    asked = claim(100, key=Rates(concurrent=4, tokens_per_day=2000))

    async def scenario() -> None:
        limits, guest = Limits(0.5), GuestLimiting(time.time)
        async with host(own.url, local=guest) as one:
            assert await one.reserve(asked, "there") == "yes"
            own.kill()
            await one.until(lambda: one.limits.away)
            # There is no owner yet: they wait for it, or leave.
            waiting, gone, unused = (one.ask(asked, name) for name in ("waiting", "gone", "unused"))
            one.release("gone")
            one.settle("unused", 1)
            await asyncio.sleep(0.02)
            assert not waiting.done()
            assert guest.held == 1
            async with introduced(guest, limits):
                answer = await waiting
                assert isinstance(answer, Standing)
                assert not gone.done()
                assert not unused.done()
                assert await one.reserve(asked, "second") == "yes"
                refused = await one.ask(asked)
                assert isinstance(refused, ServeError)
                assert (refused.code, limits.in_flight, one.limits.in_flight) == ("concurrency_limit", 2, 3)
                one.release("second")
                one.settle("waiting", 999)
                one.settle("there", 5)
                await one.until(lambda: limits.in_flight == 0)
                assert guest.held == one.limits.in_flight == 0
                # 1 token of this host's half is left for the one in flight.
                assert await one.reserve(asked, "last") == "yes"
                one.settle("last", None)
                assert await one.reserve(asked) == "budget_spent"

    run(scenario())


# -- what is not a Redis that lets us in


def _log(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.endswith("redis_limits"))


def test_a_wrong_password_is_said_without_saying_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(url: str) -> None:
        async with host(url, connected=False) as one:
            assert await one.reserve(claim(key=Rates(concurrent=2))) == "yes"
            await one.until(lambda: _log(caplog))
            assert one.limits.away

    with support.started(tmp_path, password="right-one") as server:
        run(scenario(server.url_with("wrong-one")))
        assert "password" in _log(caplog)
        assert "this host counts its share" in _log(caplog)
        assert "wrong-one" not in _log(caplog)

        async def right() -> None:
            async with host(server.url) as one:
                assert await one.reserve(claim(key=AMPLE)) == "yes"

        run(right())


def test_something_else_that_listens_there_is_no_redis(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def scenario() -> None:
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with listener, host(f"redis://127.0.0.1:{port}/0", away="refuse", connected=False) as one:
            assert await one.reserve(claim(key=AMPLE)) == "limits_unavailable"
            await one.until(lambda: _log(caplog))
        assert f"127.0.0.1:{port}" in _log(caplog)

    run(scenario())


def test_over_tcp_and_from_a_redis_that_comes_later(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, password="secret", port=support.free_port())

    async def scenario() -> None:
        async with host(server.url, connected=False) as one:
            assert await one.reserve(claim(key=Rates(concurrent=2))) == "yes"
            assert await one.reserve(claim(key=Rates(concurrent=2))) == "concurrency_limit"
            server.start()
            await one.back()
            assert await one.reserve(claim(key=Rates(concurrent=2))) == "yes"
            assert await one.reserve(claim(key=Rates(concurrent=2))) == "yes"

    try:
        run(scenario())
    finally:
        server.kill()


def test_in_a_cluster_keys_and_tenants_are_counted_and_routes_by_the_policy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(url: str) -> None:
        async with host(url, away="refuse") as one:
            assert await one.reserve(claim(key=AMPLE, tenant=AMPLE)) == "yes"
            assert await one.reserve(claim(key=AMPLE, tenant=AMPLE, route=AMPLE)) == "limits_unavailable"
            assert "cluster" in _log(caplog)
            assert await one.reserve(claim(key=AMPLE, tenant=AMPLE)) == "yes"
            assert one.limits.refused == 1

    with support.started(tmp_path, cluster=True) as server:
        run(scenario(server.url))


@pytest.mark.parametrize("url", ["http://localhost/", "redis://localhost:port/0"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigurationError, match=r"limits\.redis_url"):
            async with host(url):
                pass

    run(scenario())


if __name__ == "__main__":
    uvloop.run(_gateway(json.loads(sys.argv[1])))
