"""Whether a replica is well, with the real tree: engines that are full, that freeze, that drain, or that do nothing.

Time is compressed: an engine is probed every 50 ms and is hung after 4 s, so that 18 s hold as many probes as an hour
with one every 10 s. The names of states are the fleet's: starting, ready, busy, suspect, hung, draining; a dead one is
in backoff or failed.
"""

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.supervise import folders
from vitalis_serve.supervise.commands import request

from tests.support import client, gateway, simulator
from tests.support.installation import Installation
from tests.support.simulator import Simulator

PROBE_SECONDS = 0.05
HOUR_SECONDS = 360 * PROBE_SECONDS
HUNG_SECONDS = 4.0
SEQUENCES, SENT, SLOTS = 2, 4, 5  # so many run in an engine, and are sent there (a slot is kept for emergencies)
STEP_MS = 10
SHORT, LONG, LONGER = 20, 150, 450  # tokens: 0.2 s, 1.5 s, and 4.5 s
PATIENCE = 40.0


@dataclass(frozen=True)
class Result:
    """What a client got. `record` is the gateway's own of it."""

    name: str
    status: int
    whole: bool
    code: str
    began: float


class Site:
    """A running tree and its clients. It need not be ready yet."""

    def __init__(self, ours: Installation) -> None:
        self.ours = ours
        self._ids = itertools.count()
        self._socket = folders.run_folder(ours.var) / "supervisor.sock"
        ours.until(lambda: (ours.var / "first-key").exists() and self.status()["fleet"]["replicas"], 60)
        self.url = "http://{host}:{port}".format(**self.status()["gateway"])
        self.key = (ours.var / "first-key").read_text().strip()
        replicas = self.status()["fleet"]["replicas"]
        self.engines: list[Simulator] = [simulator.attach(replica["address"]) for replica in replicas]

    # What there is to see

    def order(self, **command: Any) -> dict[str, Any]:
        return list(request(self._socket, command, seconds=30))[-1]

    def status(self) -> dict[str, Any]:
        return self.order(command="status")

    def replica(self, name: str = "engine-0") -> dict[str, Any]:
        return next(r for r in self.status()["fleet"]["replicas"] if r["name"] == name)

    def child(self, name: str = "engine-0") -> dict[str, Any]:
        return next(c for c in self.status()["children"] if c["name"] == name)

    def states(self, name: str = "engine-0", since: float = 0.0) -> list[tuple[float, str]]:
        """The states that it came into, and when (by the wall clock)."""
        lines = [json.loads(line) for line in (self.ours.var / "log" / "supervisor.log").read_text().splitlines()]
        came = [(datetime.fromisoformat(line["time"]).timestamp(), line) for line in lines if "state" in line]
        return [(at, line["state"]) for at, line in came if line["replica"] == name and at >= since]

    def until_state(self, *wanted: str, name: str = "engine-0", seconds: float = 20) -> None:
        self.ours.until(lambda: self.replica(name)["state"] in wanted, seconds)

    def metrics(self) -> str:
        control = self.status()["control"]
        token = (self.ours.var / "control.token").read_text().strip()
        ask = client.get("/metrics", {"authorization": f"Bearer {token}", "connection": "close"})
        return client.ask(f"http://{control['host']}:{control['port']}", ask, seconds=10).body.decode()

    def measures(self, state: str, name: str = "engine-0") -> None:
        """The metrics call it so, and nothing else."""
        lines = [line for line in self.metrics().splitlines() if line.startswith("vitalis_replica_state{")]
        ones = [line for line in lines if f'replica="{name}"' in line and line.endswith(" 1.0")]
        assert ones == [f'vitalis_replica_state{{replica="{name}",state="{state}"}} 1.0']

    def shows(self, state: str, name: str = "engine-0") -> None:
        """So does `fleet status`."""
        self.measures(state, name)
        printed = self.ours.ask("fleet", "status")
        rows = [line.split()[:3] for line in printed.stdout.splitlines()]
        assert [name, "engine", state] in rows, (printed.returncode, printed.stdout, printed.stderr)

    def records(self, results: list[Result]) -> dict[str, dict[str, Any]]:
        """The gateway's own of them, by request id."""
        wanted = {result.name for result in results}
        found: dict[str, dict[str, Any]] = {}

        def all_there() -> bool:
            lines = (self.ours.var / "log" / "access.jsonl").read_text().splitlines()
            found.update({r["request_id"]: r for r in map(json.loads, lines) if r["request_id"] in wanted})
            return found.keys() == wanted

        self.ours.until(all_there, 10)
        return found

    # Clients

    def data(self, tokens: int, *, stream: bool) -> tuple[str, bytes]:
        name = f"r{next(self._ids)}"
        document = {
            "model": "tiny",
            "messages": [{"role": "user", "content": name}],
            "sim_output_tokens": tokens,
            "max_tokens": tokens + 10,
            "stream": stream,
        }
        headers = {"authorization": f"Bearer {self.key}", "x-request-id": name}
        return name, client.post("/v1/chat/completions", document, headers)

    def ask(self, tokens: int = SHORT, *, stream: bool = True) -> Result:
        name, data = self.data(tokens, stream=stream)
        began = time.time()
        answer = client.ask(self.url, data, seconds=PATIENCE)
        whole, code = False, ""
        if answer.status != 200:
            code = gateway.error_code(answer)
        elif not stream:
            whole = gateway.plain_text("chat", answer.json) == gateway.expected_text("chat", tokens)
        elif gateway.looks_whole("chat", answer.events):
            whole = gateway.stream_text("chat", answer.events) == gateway.expected_text("chat", tokens)
        else:
            code = str(gateway.terminal_error("chat", answer.events)["code"])
        return Result(name, answer.status, whole, code, began)


class Crowd:
    """Clients that ask one thing after another until the end of the with-block."""

    def __init__(self, site: Site, count: int, tokens: int = SHORT) -> None:
        self._site, self._tokens = site, tokens
        self.results: list[Result] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._tasks = [self._pool.submit(self._go, stream=index % 4 != 0) for index in range(count)]

    def _go(self, *, stream: bool) -> None:
        while not self._over.is_set():
            self.results.append(self._site.ask(self._tokens, stream=stream))

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for task in self._tasks:
            task.result()


def configured(ours: Installation, **engines: Any) -> None:
    """For every test here; the model and what was set before stay."""
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["gateway"]["routing"] = "round_robin"
    document["shutdown"] = {"settle_seconds": 0, "drain_seconds": 1}
    document["engines"] |= {
        "probe_seconds": PROBE_SECONDS,
        "hung_seconds": HUNG_SECONDS,
        "slots": SLOTS,
        "restart": {"first_seconds": 0.1},
    }
    document["engines"] |= engines
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    python = ours.folder / "python"
    python.write_text(python.read_text().replace("--preset instant", f"--preset instant --decode-step-ms {STEP_MS}"))


@pytest.fixture(scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two replicas; an engine says 503 to more than it is sent."""
    ours = Installation(tmp_path_factory.mktemp("health"))
    configured(ours, replicas=2, engine_args={"max-num-seqs": SEQUENCES, "max-num-queued-reqs": SENT})
    ours.start("up")
    try:
        site = Site(ours)
        site.until_state("ready", name="engine-1")
        site.until_state("ready")
        yield site
        assert "Traceback" not in ours.said()
    finally:
        ours.stop()


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    """Both are well, before and after."""
    yield _site
    for number, engine in enumerate(_site.engines):
        _site.until_state("ready", "busy", name=f"engine-{number}")
        engine.reset()


def only_ok(results: list[Result]) -> None:
    assert results
    assert [result for result in results if not (result.status == 200 and result.whole)] == []


def test_idleness_is_no_sickness_but_a_frozen_engine_that_was_asked_in_vain_is(site: Site) -> None:
    """Nothing runs there that could move: only what became of a request tells the one from the other."""
    began = time.time()
    for engine in site.engines:
        engine.misbehave("freeze")
    time.sleep(HUNG_SECONDS * 0.75)  # something that must not happen meanwhile
    assert site.states(since=began) == []
    with client.connect(site.url) as one, client.connect(site.url) as two:
        for wire in (one, two):
            wire.send(site.data(SHORT, stream=True)[1])
        time.sleep(2.1)  # the patience of these clients
    for name in ("engine-0", "engine-1"):
        site.until_state("suspect", name=name, seconds=HUNG_SECONDS)
    for engine in site.engines:
        engine.reset()
    for name in ("engine-0", "engine-1"):
        site.until_state("ready", name=name, seconds=HUNG_SECONDS)
    assert {state for _, state in site.states(since=began)} == {"suspect", "ready"}
    only_ok([site.ask() for _ in range(4)])


def test_a_stopped_process_is_out_in_time_and_back_when_it_answers(site: Site) -> None:
    """No client notices: what it held is finished when it goes on."""
    pid, life = site.child()["pid"], site.replica()["incarnation"]
    with Crowd(site, 5) as crowd:
        time.sleep(0.5)
        stopped = time.time()
        os.kill(pid, signal.SIGSTOP)
        try:
            site.until_state("suspect", seconds=HUNG_SECONDS)
            out = time.time()
            time.sleep(0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        site.until_state("ready", "busy", seconds=HUNG_SECONDS)
        back = time.time()
        time.sleep(0.5)
    only_ok(crowd.results)
    when = next(at for at, state in site.states(since=stopped) if state == "suspect")
    assert when - stopped <= HUNG_SECONDS
    assert site.replica()["incarnation"] == life
    records = site.records(crowd.results)
    meanwhile = [records[r.name]["replica"] for r in crowd.results if out < r.began < back - 0.3]
    assert meanwhile
    assert set(meanwhile) == {"engine-1"}
    assert "engine-0" in {records[r.name]["replica"] for r in crowd.results if r.began > back}


def test_a_frozen_engine_that_stays_so_is_replaced(site: Site) -> None:
    """/health says 200 all the time. Who has got nothing yet is answered by the other replica; who has got a part is
    told."""
    life = site.replica()["incarnation"]
    with ThreadPoolExecutor(2 * SENT + 1) as pool:
        early = [pool.submit(site.ask, LONG) for _ in range(2 * SENT)]
        site.ours.until(lambda: all(e.state()["running"] == SEQUENCES and e.state()["waiting"] for e in site.engines))
        time.sleep(0.3)
        frozen = time.time()
        site.engines[0].misbehave("freeze")
        assert client.ask(site.engines[0].address, client.get("/health")).status == 200
        site.until_state("suspect", seconds=HUNG_SECONDS)
        assert client.ask(site.engines[0].address, client.get("/health")).status == 200
        out = time.time()
        late: list[Future[Result]] = []
        while site.replica()["incarnation"] == life:
            assert time.time() - frozen < 3 * HUNG_SECONDS
            late.append(pool.submit(site.ask, SHORT))
            late[-1].result()
    site.until_state("ready")
    states = site.states(since=frozen)
    assert [state for _, state in states][:5] == ["suspect", "hung", "backoff", "starting", "ready"]
    assert states[0][0] - frozen <= HUNG_SECONDS
    answers, after = [task.result() for task in early], [task.result() for task in late]
    only_ok(after)
    records = site.records(answers + after)
    assert {records[r.name]["replica"] for r in after if r.began > out} == {"engine-1"}
    cut = [r for r in answers if not r.whole]
    assert len(cut) == SEQUENCES
    for result in cut:
        record = records[result.name]
        assert (result.status, result.code) == (200, "engine_unreachable")
        assert (record["replica"], record["outcome"]) == ("engine-0", "cut")
    moved = [records[r.name] for r in answers if r.whole and records[r.name]["attempts"] == 2]
    assert [record["replica"] for record in moved] == ["engine-1"] * (SENT - SEQUENCES)


@pytest.mark.parametrize("status", [500, 503])
def test_a_draining_engine_gets_no_more_requests_and_no_client_notices(site: Site, status: int) -> None:
    """vLLM that drains says 200 to /health and finishes what runs; all that is new it refuses."""
    engine, began = site.engines[0], time.time()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(site.ask, LONGER) for _ in range(2 if status == 500 else 0)]
        if running:
            site.ours.until(lambda: all(e.state()["running"] == 1 for e in site.engines))
        engine.misbehave("status", status=status)
        first = [site.ask(5, stream=number % 2 == 0) for number in range(6)]
        site.until_state("suspect")
        assert client.ask(engine.address, client.get("/health")).status == 200
        then = [site.ask(5) for _ in range(10)]
        assert f"answered {status}: cannot schedule new futures after shutdown" in site.child()["detail"]
        if status == 500:
            assert engine.state()["running"] == 1
            assert [state for _, state in site.states(since=began)] == ["suspect"], "what moves there is the old work"
            site.shows("suspect")
        only_ok([*first, *then, *(task.result() for task in running)])
    records = site.records(first + then)
    assert sum(records[r.name]["attempts"] > 1 for r in first) in (1, 2), "more than its first answers"
    assert {(records[r.name]["replica"], records[r.name]["attempts"]) for r in then} == {("engine-1", 1)}
    engine.reset()
    site.until_state("ready")
    again = [site.ask(5) for _ in range(4)]
    only_ok(again)
    assert {record["replica"] for record in site.records(again).values()} == {"engine-0", "engine-1"}


def test_an_hour_of_saturation_ejects_nobody(site: Site) -> None:
    """Every slot is taken and each engine has a queue inside; probes are answered late, and then, for longer than an
    engine may be silent, not at all while tokens come. What fails meanwhile makes the supervisor ask: it is told 503.
    """
    before = {name: site.child(name)["restarts"] for name in ("engine-0", "engine-1")}
    began, waiting = time.time(), Counter[str]()
    with Crowd(site, 3 * SENT) as crowd:
        site.until_state("busy")
        for phase, seconds in ((0.02, HOUR_SECONDS - HUNG_SECONDS * 1.5), (60.0, HUNG_SECONDS * 1.5)):
            for engine in site.engines:
                engine.reset()
                engine.misbehave("sluggish", seconds=phase)
            until = time.time() + seconds
            for number in itertools.count():
                if time.time() >= until:
                    break
                site.engines[number % 2].misbehave("status", status=500, requests=1)
                for engine in site.engines:
                    waiting[engine.address] += engine.state()["waiting"] > 0
                time.sleep(1)
        for engine in site.engines:
            engine.reset()
    only_ok(crowd.results)
    assert time.time() - began >= HOUR_SECONDS
    seen = {state for name in before for _, state in site.states(name, began)}
    assert seen <= {"ready", "busy"}
    assert min(waiting[engine.address] for engine in site.engines) >= 10, "there was no queue in the engines"
    assert {name: site.child(name)["restarts"] for name in before} == before
    openings = [line for line in site.metrics().splitlines() if line.startswith("vitalis_breaker_openings_total{")]
    assert len(openings) == 2
    assert {line.rpartition(" ")[2] for line in openings} == {"0.0"}
    for engine in site.engines:
        assert engine.metrics()['vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'] > 0


def test_an_engine_that_is_not_ours_is_all_of_it_by_name(tmp_path: Path) -> None:
    """Nobody here kills it, so it can be seen hung; it comes back by itself."""
    ours = Installation(tmp_path)
    configured(ours, hung_seconds=2)
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["shutdown"]["drain_seconds"] = 10
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    path = tmp_path / "there.sock"
    argv = [str(ours.folder / "python"), "-m", "x", "--uds", str(path), "--served-model-name", "tiny"]
    engine: subprocess.Popen[bytes] | None = None
    try:
        ours.start("gateway", "--engine", f"unix:{path}", "--model", "tiny")
        site = Site(ours)
        assert site.replica()["state"] == "starting"
        site.measures("starting")
        engine = subprocess.Popen(argv)
        site.until_state("ready")
        site.measures("ready")
        with ThreadPoolExecutor(SENT + 1) as pool:
            running = [pool.submit(site.ask, LONG) for _ in range(SENT)]
            site.until_state("busy")
            site.measures("busy")
            drained = pool.submit(site.order, command="drain", replica="engine-0")
            site.until_state("draining", "stopped")
            assert site.replica()["state"] == "draining"
            site.measures("draining")
            assert drained.result()["ok"]
            only_ok([task.result() for task in running])
            assert site.order(command="restart", replica="engine-0")["ok"]
            site.until_state("ready")
            engine.send_signal(signal.SIGSTOP)
            try:
                held = pool.submit(site.ask)
                site.until_state("hung")
                site.measures("hung")
            finally:
                engine.send_signal(signal.SIGCONT)
            site.until_state("ready")
            only_ok([held.result()])
        engine.kill()
        site.until_state("suspect")
        site.ours.until(lambda: "nobody listens" in site.child()["detail"], 20)
        assert site.child()["restarts"] == 1, "its process went, once"
    finally:
        if engine is not None:
            engine.kill()
            engine.wait()
        ours.stop()
