"""Whatever is killed, and whenever: each finished request is in the store once, with the tokens that its engine
counted, and each that a kill cut is there as estimated."""

import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.control.client import Client

from tests.support import client, engines, gateway, simulator
from tests.support.engines import ROOT, Stack
from tests.support.postgres import Postgres, query

CLIENTS = 6
KINDS = [(api, stream) for api in ("chat", "completions", "responses", "messages") for stream in (False, True)]


class Site:
    """`vitalis-serve gateway` with two workers before two engines, and clients that never stop asking."""

    def __init__(self, folder: Path, store_url: str) -> None:
        self.folder = folder
        self.engines = [
            simulator.start("--decode-step-ms", "2", uds=folder / f"{n}.sock", log=folder / f"{n}.jsonl") for n in "01"
        ]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("VITALIS_")}
        settings = {
            "CONFIG": str(ROOT / "config" / "gpt-oss.yaml"), "DATA_FOLDER": str(folder / "var"), "GATEWAY_PORT": "0",
            "GATEWAY_HOST": "127.0.0.1", "CONTROL_PORT": "0", "GATEWAY_WORKERS": "2", "ENGINES_PROBE_SECONDS": "0.2",
            "LEDGER_SEGMENT_BYTES": str(1 << 20), "GATEWAY_MAX_CONNECTIONS": "500", "STORE_URL": store_url,
        }  # fmt: skip
        environ |= {"PYTHONPATH": str(ROOT / "server"), **{f"VITALIS_{n}": value for n, value in settings.items()}}
        where = [word for n in "01" for word in ("--engine", f"unix:{folder / f'{n}.sock'}")]
        argv = (sys.executable, "-P", "-m", "vitalis_serve", "gateway", *where, "--model", gateway.MODEL)
        self.stack = Stack(folder, environ, argv)
        self.seed = random.Random(7)
        self.names = itertools.count()
        self.finished: dict[str, dict[str, int] | None] = {}  # whole answers: the usage that the client was told
        self.sent: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> None:
        self.stack.start()
        self.stack.wait_ready(2, 60)
        engines.until(lambda: (self.stack.data / "first-key").exists(), 30, "the first key")
        self.key = (self.stack.data / "first-key").read_text().strip()
        self.address = "http://{}:{}".format(*self.stack.address)  # another port after a start anew

    def ask(self) -> None:
        """One request; what becomes of it is noted."""
        with self._lock:
            name, (api, stream) = f"kill-{next(self.names)}", self.seed.choice(KINDS)
            tokens = self.seed.randrange(5, 60)
            self.sent.add(name)
        headers = {"authorization": f"Bearer {self.key}", "x-request-id": name}
        data = gateway.request(api, stream=stream, tokens=tokens, headers=headers)
        answer = client.ask(self.address, data, 10)
        if answer.status == 200 and (not stream or gateway.looks_whole(api, answer.events)):
            gateway.check_answer(api, answer, stream=stream, tokens=tokens)
            with self._lock:
                self.finished[name] = None if stream else answer.json["usage"]

    def _client(self) -> None:
        while not self._stop.is_set():
            try:
                self.ask()
            except (OSError, client.Ended):
                time.sleep(0.05)

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        self._stop.clear()
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def more(self, count: int = 15) -> None:
        """Until so many more were answered."""
        before = len(self.finished)
        engines.until(lambda: len(self.finished) >= before + count, 60, f"{count} more answers", every=0.02)

    def child(self, name: str) -> int:
        found = {child["name"]: child["pid"] for child in self.stack.status().get("children", [])}
        return int(found.get(name) or 0)

    def kill(self, name: str) -> None:
        engines.until(lambda: self.child(name), 30, f"{name} is there")
        os.kill(self.child(name), signal.SIGKILL)

    def kill_supervisor(self) -> None:
        """And start it again, as systemd would."""
        assert self.stack.process is not None
        self.stack.process.kill()
        self.stack.process.wait()
        self.start()

    def served(self) -> dict[str, list[dict[str, Any]]]:
        """What the engines got, by request id."""
        found: dict[str, list[dict[str, Any]]] = {}
        for engine in self.engines:
            for record in engine.log():
                if (record["x-request-id"] or "").startswith("kill-"):
                    found.setdefault(record["x-request-id"], []).append(record)
        return found

    def check(self, rows: Callable[[], list[dict[str, Any]]]) -> None:
        """`rows`: the store's, read past everything of ours."""
        for engine in self.engines:
            engine.wait_for(lambda state: not state["running"] and not state["waiting"], 30)
        served = self.served()
        engines.until(lambda: {row["request_id"] for row in rows()} >= set(served), 60, "all is drained", every=0.2)
        time.sleep(1.5)  # what would be drained twice would be by now
        found = rows()
        twice = [name for name, count in Counter(row["request_id"] for row in found).items() if count > 1]
        assert not twice
        by_name = {row["request_id"]: row for row in found}
        assert set(by_name) <= self.sent
        assert len(self.finished) > 50
        for name, told in self.finished.items():
            row = by_name[name]
            whole = [record for record in served[name] if record["outcome"] == "finished"]
            assert (row["outcome"], len(whole)) == ("ok", 1), (row, served[name])
            assert not row["prompt_estimated"]
            assert not row["completion_estimated"]
            for field in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                assert row[field] == whole[0][field], (name, field)
            if told is not None:
                assert row["completion_tokens"] == told.get("completion_tokens", told.get("output_tokens"))
        for name, row in by_name.items():
            if row["outcome"] == "cut":
                assert name not in self.finished
                assert row["prompt_tokens"] > 0
                assert row["prompt_estimated"]

    def close(self) -> None:
        with contextlib.ExitStack() as ends:
            for engine in self.engines:
                ends.callback(engine.stop)
            if self.stack.process is not None:
                ends.callback(self.stack.stop)


@contextlib.contextmanager
def site(folder: Path, store_url: str = "") -> Iterator[Site]:
    made = Site(folder, store_url)
    try:
        made.start()
        yield made
    finally:
        made.close()


def of_sqlite(path: Path) -> Callable[[], list[dict[str, Any]]]:
    def rows() -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM usage WHERE request_id LIKE 'kill-%'")]

    return rows


def test_workers_control_and_supervisor_are_killed(tmp_path: Path) -> None:
    with site(tmp_path) as here:
        with here.load():
            for name in ("worker-1", "control", "worker-0", "control", "worker-1", "supervisor", "worker-0"):
                here.more()
                time.sleep(here.seed.random() / 5)
                if name == "supervisor":
                    here.kill_supervisor()
                else:
                    here.kill(name)
            here.more()
        here.check(of_sqlite(here.stack.data / "vitalis.db"))
        control = Client.of_folder(here.stack.data)
        totals = control.call("GET", "/v1/usage?by=tenant")
        assert json.dumps(totals)
    left = sorted(path.name for path in (tmp_path / "var" / "spool").glob("*.spool"))
    assert left  # kept for a while for who counts limits


def of_postgresql(url: str) -> Callable[[], list[dict[str, Any]]]:
    statement = "SELECT row_to_json(usage)::text FROM usage WHERE request_id LIKE 'kill-%'"
    return lambda: [json.loads(row) for (row,) in query(url, statement)]


@pytest.mark.timeout(180)
def test_postgresql_is_killed_and_away_for_long(tmp_path: Path, postgres: Postgres, postgres_url: str) -> None:
    """Serving goes on, and nothing is lost."""
    with site(tmp_path, postgres_url) as here:
        with here.load():
            here.more()
            postgres.kill()
            here.more(30)
            here.kill("worker-1")  # which comes back with the snapshot on the disk
            here.more(30)
            postgres.start()
            here.more()
            for _ in range(2):
                time.sleep(here.seed.random())
                postgres.kill()
                postgres.start()
                here.more(10)
            here.kill("control")
            here.more()
        here.check(of_postgresql(postgres_url))
