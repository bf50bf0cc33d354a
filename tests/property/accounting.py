"""Workers before engines that die and come back, and the books: every gauge, every connection, every token.

`Site` holds real processes, `Visit` is a client's connection that does whatever it is told, and `Site.check` is what
must be true once all clients have left.
"""

import contextlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httptools
from vitalis_serve.fleet import Replica, ReplicaState
from vitalis_serve.spool.reader import files, scan
from vitalis_serve.spool.record import Closed

from tests.integration.test_gateway_worker import Control, Line
from tests.support import client, gateway, simulator
from tests.support.worker import MODEL, WorkerProcess, running_worker, snapshot

CLASSES = ("emergency", "interactive", "standard", "batch")
KEYS = {class_: f"vts_testkey0000{rank}_0123456789abcdefghijklmnopqrstuv" for rank, class_ in enumerate(CLASSES)}
# Short enough for each of them to run out now and then.
DEADLINES = {
    "header_seconds": 0.6, "body_seconds": 0.6, "keepalive_seconds": 1.5, "queue_seconds": 0.6, "connect_seconds": 0.5,
    "first_token_seconds": 0.5, "idle_seconds": 0.5, "client_stalled_seconds": 0.6, "total_seconds": 2.5,
    "upstream_idle_seconds": 1.0,
}  # fmt: skip
KV_TOKENS = 6000
PREFILL_TOKENS = 3000
BODIES_BYTES = 150_000
ALLOWED = 8  # tokens by which an estimate may be off, or 2 %
# Nothing of these may be left. The lag of the event loop, the breakers and the idle connections are no accounts.
ZERO = ("vitalis_open_contexts", "vitalis_client_connections", "vitalis_body_bytes", "vitalis_in_flight",
        "vitalis_queued", "vitalis_replica_in_flight", "vitalis_limits_held", "vitalis_spool_open")  # fmt: skip
PLENTY = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "concurrent": 10**4, "tokens_per_day": 10**12}
_ids = itertools.count()


class Tail:
    """The lines that a growing file of JSON has got since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def more(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")[0]
        self._at += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]


# -- clients


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False


@dataclass
class Asked:
    """A request. `to`: the worker's number. `begun`: a byte of it was sent; `sent`: all of it was."""

    name: str
    api: str
    stream: bool
    tokens: int
    to: int
    size: int
    begun: bool = False
    sent: bool = False
    answer: Answer | None = None

    def seen(self) -> int:
        """Events with a token that its client got of a stream of chat or completions."""
        if self.answer is None:
            return 0
        body = bytes(self.answer.body)
        if self.api == "completions":
            return body.count(b'"text":"')
        return body.count(b'"reasoning":"') + body.count(b'"content":"') - body.count(b'"content":""')


class Visit:
    """A client's connection, and the requests that it made of it one behind the other."""

    def __init__(self, worker: WorkerProcess, number: int, *, deaf: bool) -> None:
        """`deaf`: with so small a buffer that its not reading is soon felt."""
        self.wire = client.connect(worker.url, receive_buffer=4096 if deaf else None)
        self.number = number
        self.open = True  # as far as the client has noticed
        self.asked: list[Asked] = []
        self.unsent = b""
        self._answers = 0
        self._headers: dict[str, str] = {}
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, asked: Asked, data: bytes) -> None:
        self.asked.append(asked)
        self.unsent += data

    def send(self, share: float = 1.0) -> None:
        """So much of what is not sent yet, as far as the system takes it."""
        wanted = min(len(self.unsent), max(1, round(len(self.unsent) * share)))
        while self.open and wanted:
            self.wire.socket.settimeout(0)
            try:
                count = self.wire.socket.send(self.unsent[:wanted])
            except BlockingIOError:
                break
            except (ConnectionResetError, BrokenPipeError):
                self.open = False
                break
            self.unsent, wanted = self.unsent[count:], wanted - count
        left = len(self.unsent)
        for one in reversed(self.asked):
            one.sent = one.sent or left <= 0
            one.begun = one.begun or left < one.size
            left -= one.size

    def read(self, most: int = 1 << 30) -> int:
        """What is there to be read, up to so many bytes."""
        count = 0
        while self.open and count < most:
            self.wire.socket.settimeout(0)
            try:
                data = self.wire.socket.recv(min(most - count, 1 << 16))
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                self.open = False
                break
            count += len(data)
            self._parser.feed_data(data)
        return count

    @property
    def pending(self) -> int:
        """Requests that were begun and not answered whole, on a connection that is not known to have ended."""
        return sum(one.begun for one in self.asked) - self._answers if self.open else 0

    def leave(self, how: str) -> None:
        self.open = False
        if how == "half close":
            with contextlib.suppress(OSError):
                self.wire.half_close()
            return
        if how == "reset":
            self.wire.reset()
        self.wire.close()

    # httptools

    def on_message_begin(self) -> None:
        assert self._answers < len(self.asked), "an answer that nobody asked for"
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self._now.answer = Answer(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        assert self._now.answer is not None
        self._now.answer.body += body

    def on_message_complete(self) -> None:
        assert self._now.answer is not None
        self._now.answer.whole = True
        self._answers += 1

    @property
    def _now(self) -> Asked:
        return self.asked[self._answers]


# -- processes


class Engine:
    """A simulated engine that keeps its address and its log when it is killed and started again."""

    def __init__(self, index: int, folder: Path, step_ms: float, *, unix: bool) -> None:
        self.name = f"engine-{index}"
        self._log = folder / f"{self.name}.jsonl"
        self._uds = folder / f"{self.name}.sock" if unix else None
        self._flags: tuple[str, ...] = ("--decode-step-ms", str(step_ms))
        self.process = self._start()
        if not unix:
            self._flags += ("--port", str(self.process.host_port[1]))
        self.alive = True
        self.killed: list[float] = []  # when, by the wall clock
        self.tail = Tail(self._log)
        self.records: dict[str, list[dict[str, Any]]] = {}

    def _start(self) -> simulator.Simulator:
        return simulator.start(*self._flags, uds=self._uds, log=self._log)

    def kill(self) -> None:
        self.process.kill()
        self.process.stop()
        self.killed.append(time.time())
        self.alive = False

    def start(self) -> None:
        self.process = self._start()
        self.alive = True

    def take(self) -> None:
        """What its log has to say of requests that have ended."""
        for record in self.tail.more():
            self.records.setdefault(record["x-request-id"], []).append(record)

    def may_lack(self, ours: dict[str, Any]) -> bool:
        """Whether it was killed while this request ran, or before it had written what it knew of it."""
        began = ours["time"] - ours["total_ms"] / 1e3
        return any(began - 1 < at < ours["time"] + 1 for at in self.killed)


class Site:
    """`count` workers; the first owns admission, and the others ask it."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, count: int) -> None:
        self.engines = [Engine(0, folder, 5, unix=False), Engine(1, folder, 8, unix=True),
                        Engine(2, folder, 0, unix=False)]  # fmt: skip
        for engine in self.engines:
            stack.callback(lambda engine=engine: engine.process.stop())
        self.workers: list[WorkerProcess] = []
        self._lines: list[Line] = []
        keys = [
            {"id": KEYS[c][4:16], "key": KEYS[c], "tenant": f"tenant-{c}", "class": c, "rates": PLENTY} for c in CLASSES
        ]
        self._spool = folder / "spool"
        document = snapshot(keys=keys, route_rates=PLENTY)
        for index in range(count):
            own = folder / f"w{index}"
            own.mkdir()
            control = stack.enter_context(Control(own))
            worker = running_worker(
                own, document=document, worker=index, workers=count,
                admission_socket=str(folder / "a.sock"), send_buffer=8192, reserved_share=0.1, breaker_failures=8,
                max_bodies_bytes=BODIES_BYTES, queue_requests=6, spool_folder=str(self._spool),
                spent_path=str(folder / "spent.json"), spool_segment_bytes=1 << 20, max_connections=300, **DEADLINES,
            )  # fmt: skip
            self.workers.append(stack.enter_context(worker))
            self._lines.append(stack.enter_context(control.line()))
            self._lines[-1].hear()
        self._tails = [Tail(worker.access_log) for worker in self.workers]
        self._records: list[list[dict[str, Any]]] = [[] for _ in self.workers]
        self._incarnation = 0
        self.replicas: dict[str, Replica] = {}
        self.begin()
        if count > 1:
            gateway.wait_until(lambda: self.workers[0].log().count("is here") >= count - 1, what="all are here")
        self._sockets = [len(sockets(worker.pid)) for worker in self.workers]

    # -- the fleet

    def begin(self) -> None:
        """Every engine lives, is ready and has done nothing wrong yet."""
        self._incarnation += 1
        for engine in self.engines:
            if not engine.alive:
                engine.start()
            self.replicas[engine.name] = Replica(
                engine.name, engine.process.address, ReplicaState.READY, models=(MODEL,), slots=3,
                incarnation=self._incarnation, kv_tokens=KV_TOKENS, prefill_tokens=PREFILL_TOKENS,
            )  # fmt: skip
        self.publish()

    def change(self, engine: Engine, **more: Any) -> None:
        """What the fleet is told of this replica from now on."""
        if more.pop("renewed", False):
            self._incarnation += 1
            more["incarnation"] = self._incarnation
        self.replicas[engine.name] = replace(self.replicas[engine.name], **more)
        self.publish()

    def publish(self, without: str = "") -> None:
        for worker in self.workers:
            worker.fleet(*(replica for name, replica in self.replicas.items() if name != without))

    # -- clients

    def visit(self, number: int, *, deaf: bool) -> Visit:
        number %= len(self.workers)
        return Visit(self.workers[number], number, deaf=deaf)

    def request(self, to: int, api: str, *, stream: bool, tokens: int, class_: str, home: int, pad: int = 0,
                **more: Any) -> tuple[Asked, bytes]:  # fmt: skip
        """Every request has a text of its own: equal ones that met two dead engines would be refused."""
        name = f"books-{next(_ids)}"
        text = f"What now, {name}? " + "Well. " * (pad // 6)
        prompt = {"chat": "messages", "messages": "messages", "completions": "prompt", "responses": "input"}[api]
        document = {prompt: [{"role": "user", "content": text}] if prompt == "messages" else text} | more
        headers = {"x-request-id": name, "authorization": f"Bearer {KEYS[class_]}", "x-session-id": f"home-{home}"}
        data = gateway.request(api, stream=stream, tokens=tokens, headers=headers, **document)
        return Asked(name, api, stream, tokens, to, len(data)), data

    # -- the books

    def gauges(self, worker: int) -> dict[str, float]:
        """Every gauge of one worker, "name{label values}" where it has labels."""
        return {f"{name}{{{','.join(labels.values())}}}" if labels else name: value
                for name, labels, value in self._report(worker)["gauges"]}  # fmt: skip

    def _report(self, worker: int) -> dict[str, Any]:
        return dict(self._lines[worker].collect(1)["values"])

    def open_contexts(self) -> int:
        return sum(int(self.gauges(index)["vitalis_open_contexts"]) for index in range(len(self.workers)))

    def lives(self) -> None:
        """What is true at any time."""
        for index, worker in enumerate(self.workers):
            assert worker.process.poll() is None, worker.log()[-3000:]
            gauges = self.gauges(index)
            assert not [name for name, value in gauges.items() if value < 0], gauges
            assert gauges["vitalis_body_bytes"] <= BODIES_BYTES

    def check(self, asked: list[Asked]) -> None:
        """All clients have left: nothing is held, and what was settled is what was used."""
        for engine in self.engines:
            if engine.alive:
                engine.process.reset()
        self._nothing_is_held()
        asked = asked + self._everything_fits()
        self._nothing_is_held()
        self._every_connection_is_somewhere()
        for worker in self.workers:
            assert "Traceback" not in worker.log(), worker.log()[-4000:]
        self._settled_is_used(asked)

    def _nothing_is_held(self) -> None:
        def left() -> dict[str, float]:
            return {
                f"{worker.name} {name}": value
                for index, worker in enumerate(self.workers)
                for name, value in self.gauges(index).items()
                if name.startswith(ZERO) and value
            }

        with said(left):
            gateway.wait_until(lambda: not left(), 10, "every gauge zero")
        for worker in self.workers:
            gateway.settled(worker)
        for engine in self.engines:
            if engine.alive:
                engine.process.wait_for(lambda state: not state["running"] and not state["waiting"])

    def _everything_fits(self) -> list[Asked]:
        """A request larger than all of a replica's caps gets in where nothing at all is counted against them."""
        made = []
        for engine in self.engines:
            if not engine.alive or self.gauges(0).get(f"vitalis_breaker_open{{{engine.name}}}"):
                continue
            kept = self.replicas
            self.replicas = {n: replace(r, state=ReplicaState.DRAINING) for n, r in kept.items()}
            self.change(engine, state=ReplicaState.READY)
            for number, worker in enumerate(self.workers):
                one, data = self.request(
                    number, "chat", stream=False, tokens=1, class_="standard", home=0, pad=5 * KV_TOKENS
                )
                answer = client.ask(worker.url, data)
                assert answer.status == 200, f"{engine.name} is not empty: {answer.body!r}"
                one.begun = one.sent = True
                one.answer = Answer(200, answer.head.headers, bytearray(answer.body), True)
                made.append(one)
            self.replicas = kept
            self.publish()
        return made

    def _every_connection_is_somewhere(self) -> None:
        """Those to engines are idle in a pool, or were closed: here, there, and by what the system knows."""

        def idle(index: int, replica: str) -> float:
            return self.gauges(index).get(f"vitalis_upstream_connections{{{replica},idle}}", 0)

        def astray() -> dict[str, Any]:
            found: dict[str, Any] = {}
            for engine in self.engines:
                kept = sum(idle(index, engine.name) for index in range(len(self.workers)))
                there = engine.process.state()["connections_open"] if engine.alive else 0
                found[engine.name] = there - kept
            for index, worker in enumerate(self.workers):
                open_now = sockets(worker.pid)
                gauges = self.gauges(index)
                kept = sum(n for name, n in gauges.items() if name.startswith("vitalis_upstream") and ",idle" in name)
                found[f"{worker.name} assigned"] = sum(n for name, n in gauges.items() if ",assigned}" in name)
                found[worker.name] = len(open_now) - self._sockets[index] - kept
            return {name: count for name, count in found.items() if count}

        with said(astray):
            gateway.wait_until(lambda: not astray(), 5, "every connection's end")

    # -- tokens

    def _settled_is_used(self, asked: list[Asked]) -> None:
        for engine in self.engines:
            engine.take()
        by_name: dict[str, dict[str, Any]] = {}
        for index in range(len(self.workers)):
            records = self._all_records(index)
            own = Counter(record["request_id"] for record in records)
            twice = [name for name, count in own.items() if count > 1 and name]  # nameless: left in the head
            assert not twice, twice
            by_name |= {record["request_id"]: record for record in records}
        self._ledger_agrees(by_name)
        for one in asked:
            ours = by_name.get(one.name)
            if one.answer is not None:
                known_as = one.answer.headers["x-request-id"]
                assert known_as in by_name, f"{one} was answered and is not in the log"
                assert known_as == one.name or one.answer.status == 408, f"{one}: its head was not whole"
            worked = [engine.name for engine in self.engines if one.name in engine.records]
            assert ours is not None or not worked, f"{one} was worked for and is not in the log"
            if ours is not None:
                self._is_right(one, ours)

    def _ledger_agrees(self, by_name: dict[str, dict[str, Any]]) -> None:
        """What an engine got is in the spool, once, with the tokens that the access log has."""
        found: dict[str, Closed] = {}
        for path in files(self._spool):
            scanned = scan(path, 0, limit=1_000_000)
            assert not scanned.torn
            for record in scanned.records:
                if isinstance(record, Closed):
                    assert record.request_id not in found, f"{record} is there twice"
                    found[record.request_id] = record
        tried = {name for name, record in by_name.items() if record.get("attempts")}
        assert found.keys() == tried, found.keys() ^ tried
        for name, record in found.items():
            for field_ in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"):
                assert getattr(record, field_) == by_name[name].get(field_, 0), (record, by_name[name])

    def _all_records(self, index: int) -> list[dict[str, Any]]:
        """A worker's access log, which agrees with its counters."""
        records = self._records[index]
        counted: Counter[str] = Counter()
        for name, labels, value in self._report(index)["counters"]:
            counted[name + labels.get("kind", "") if "estimated" in name else name] += value

        def written() -> bool:
            records.extend(self._tails[index].more())
            return len(records) >= counted["vitalis_requests_total"]

        gateway.wait_until(written, what="the last record")
        assert len(records) == counted["vitalis_requests_total"], (len(records), counted)
        assert counted["vitalis_access_log_dropped_total"] == 0
        for kind in ("prompt", "completion"):
            exact, estimated = f"vitalis_{kind}_tokens_total", f"vitalis_estimated_tokens_total{kind}"
            logged = sum(record.get(f"{kind}_tokens", 0) for record in records)
            assert counted[exact] + counted[estimated] == logged, (kind, counted, logged)
        sure = sum(record.get("completion_tokens", 0) for record in records if not record.get("estimated"))
        assert counted["vitalis_completion_tokens_total"] == sure, (counted, sure)
        return records

    def _is_right(self, one: Asked, ours: dict[str, Any]) -> None:
        """One request's account, against its engine's and against what its client saw."""
        prompt, completion = ours.get("prompt_tokens", 0), ours.get("completion_tokens", 0)
        estimated = ours.get("estimated", False)
        engine = next((engine for engine in self.engines if engine.name == ours.get("replica")), None)
        theirs = engine.records.get(one.name, [{}])[-1] if engine is not None else {}
        used, about = theirs.get("completion_tokens", 0), (one, ours, theirs)
        if engine is None:
            assert (prompt, completion, estimated) == (0, 0, False), about
            return
        if ours["outcome"] == "ok":
            assert not estimated, about
            assert completion, about
        if not estimated and completion:
            assert theirs or engine.may_lack(ours), about
            if theirs:
                assert (prompt, completion) == (theirs["prompt_tokens"], used), about
                assert theirs["outcome"] == "finished" or ours["outcome"] != "ok", about
        if theirs.get("outcome") in ("finished", "aborted") and used:
            assert prompt, about
        if estimated and one.stream and one.api in ("chat", "completions"):
            # It read no less than its client, and no more than there was.
            allowed = max(ALLOWED, used * 0.02)
            assert completion >= one.seen() - allowed, about
            if theirs:
                assert completion <= used + allowed, about
        if one.answer is not None and one.answer.whole and one.stream and one.answer.status == 200:
            raw = bytes(one.answer.body).split(b"\n\n")
            last = [client.Event("", e.rpartition(b"data: ")[2].decode(), e) for e in raw[-3:] if e.strip()]
            whole = one.api in ("chat", "completions") and gateway.looks_whole(one.api, last)
            assert ours["outcome"] == "ok" or not whole, about


def sockets(pid: int) -> list[str]:
    """Those that a process has open."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if (target := os.readlink(path)).startswith("socket:"):
                found.append(target)
    return found


@contextlib.contextmanager
def said(what: Any) -> Iterator[None]:
    """A failure inside says what there was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}: {what()}") from None


@contextlib.contextmanager
def site(folder: Path, count: int) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        yield Site(stack, folder, count)
