"""What control and the workers make of a store that is not there, goes away, or is newer than they are; and of limits
that are none."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve import __version__
from vitalis_serve.control.client import Refused

from tests.support import client, gateway, simulator
from tests.support.control import SECONDS, Control, running
from tests.support.gateway import error_code, wait_until
from tests.support.installation import Installation
from tests.support.postgres import Postgres
from tests.support.simulator import Simulator
from tests.support.stores import Place
from tests.support.worker import MODEL, WorkerProcess, running_worker

PASSWORD = "hunter%40two"
ROUTES = [{"name": MODEL, "model": MODEL}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Simulator]:
    with simulator.started() as started:
        yield started


def start_failure(folder: Path, **options: Any) -> str:
    """The last line of a control that cannot start, and says so alone."""
    control = Control(folder, **options)
    try:
        code, said = control.process.wait(4 * SECONDS), control.log_path.read_text()
    finally:
        control.stop()
    assert code == 3, said
    assert "Traceback" not in said
    assert PASSWORD not in said
    assert "hunter@two" not in said
    return said.splitlines()[-1]


# At start


def test_a_store_that_never_answers_is_one_sentence_and_exit_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        url = f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/db"
        said = start_failure(tmp_path, database_url=url, database_seconds=0.5)
    assert "user me cannot be opened: no answer within 0.5 s" in said


def test_a_newer_schema_is_one_sentence_and_exit_3_and_stays(tmp_path: Path) -> None:
    """Which names the version that the store needs."""
    place = Place(tmp_path / "vitalis.db")
    with running(tmp_path, **place.options()) as control:
        control.call("POST", "/v1/tenants", {"name": "acme"})
    place.run("UPDATE alembic_version SET version_num = '0099'", "UPDATE state SET needs_program = '7.2.0'")
    said = start_failure(tmp_path, **place.options())
    assert said.startswith(f"the store has schema 0099, which this vitalis-serve {__version__} does not know; it needs")
    assert "vitalis-serve 7.2.0 or newer" in said
    assert place.run("SELECT version_num FROM alembic_version") == [("0099",)]
    assert place.run("SELECT name FROM tenants") == [("acme",)]


def test_the_whole_start_ends_with_3_where_the_store_does_not_answer(tmp_path: Path) -> None:
    ours = Installation(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    document = json.loads((tmp_path / "c.yaml").read_text())
    document["store"] = {"url": f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/db", "connect_seconds": 0.5}
    (tmp_path / "c.yaml").write_text(json.dumps(document))
    done = ours.ask("up")
    assert done.returncode == 3, done.stderr
    assert "cannot be opened: Connection refused; check that PostgreSQL" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout
    assert PASSWORD not in done.stderr + done.stdout
    assert "hunter@two" not in done.stderr + done.stdout


# Later


@contextlib.contextmanager
def site(folder: Path, engine: Simulator, **options: Any) -> Iterator[tuple[Control, WorkerProcess]]:
    """Control, and one worker that has nothing but what control tells it."""
    with (
        running(folder, workers=1, apply_seconds=SECONDS, routes=ROUTES, **options) as control,
        running_worker(folder, document=(folder / "snapshot.json").read_bytes()) as worker,
    ):
        worker.serve(engine.address)
        yield control, worker


def chat(worker: WorkerProcess, key: str) -> str:
    data = client.post("/v1/chat/completions", gateway.document("chat"), {"authorization": f"Bearer {key}"})
    answer = client.ask(worker.url, data, 20)
    return "ok" if answer.status == 200 else error_code(answer)


def test_without_the_store_service_goes_on_through_restarts_of_worker_and_control(
    tmp_path: Path, engine: Simulator, postgres: Postgres, postgres_url: str
) -> None:
    with site(tmp_path, engine, database_url=postgres_url, database_seconds=1) as (control, worker):
        control.call("POST", "/v1/tenants", {"name": "acme"})
        made = control.call("POST", "/v1/keys", {"tenant": "acme"})
        assert made["applied"]
        postgres.kill()
        try:
            assert chat(worker, made["key"]) == "ok"
            with pytest.raises(Refused) as refused:
                control.call("DELETE", f"/v1/keys/{made['id']}")
            assert refused.value.code == "store_unavailable"
            worker.kill()
            worker.restart()
            worker.serve(engine.address)
            assert chat(worker, made["key"]) == "ok"
            assert chat(worker, made["key"] + "x") == "invalid_key"
            control.process.kill()
            control.stop()
            assert "cannot be opened: " in start_failure(tmp_path, **control.options)
            assert chat(worker, made["key"]) == "ok"
            worker.kill()
            worker.restart()
            worker.serve(engine.address)
            assert chat(worker, made["key"]) == "ok", "neither store nor control is there"
        finally:
            postgres.start()
        with running(tmp_path, **control.options) as again:
            wait_until(lambda: revoked(again, made["id"]), SECONDS, "it is revoked")
            wait_until(lambda: chat(worker, made["key"]) == "invalid_key", SECONDS, "the worker has heard of it")


def revoked(control: Control, key_id: str) -> bool:
    with contextlib.suppress(Refused):
        return bool(control.call("DELETE", f"/v1/keys/{key_id}")["applied"])
    return False


# Limits that are none

NONE: tuple[Any, ...] = (
    0,
    -1,
    10**15 + 1,
    10**30,
    1.5,
    "10",
    "many",
    "",
    True,
    [],
    [1],
    {"a": 1},
    float("nan"),
    float("inf"),
)
KINDS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "tokens_per_month")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, engine: Simulator) -> Iterator[tuple[Control, WorkerProcess]]:
    with site(tmp_path_factory.mktemp("limits"), engine) as (control, worker):
        control.call("POST", "/v1/tenants", {"name": "acme"})
        yield control, worker
        gateway.settled(worker)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_limit_is_refused_wherever_it_is_given(limited: tuple[Control, WorkerProcess], kind: str) -> None:
    control, _ = limited
    before = control.snapshot()
    for value in NONE:
        wrong = {kind: value}
        for method, path, body in (
            ("PUT", "/v1/limits/tenant/acme", wrong),
            ("PATCH", "/v1/limits/tenant/acme", wrong),
            ("POST", "/v1/tenants", {"name": "new", "limits": wrong}),
            ("POST", "/v1/keys", {"tenant": "acme", "limits": wrong}),
            ("POST", "/v1/import", {"limits": [{"kind": "tenant", "name": "acme", **wrong}]}),
            ("POST", "/v1/import", {"keys": [{"tenant": "acme", "name": "new", "limits": wrong}]}),
        ):
            with pytest.raises(Refused) as refused:
                control.call(method, path, body)
            assert refused.value.status == 400, (path, value)
            said = str(refused.value).removeprefix("nothing was imported: 1 of 1 rows are wrong:\nline 1 ")
            assert kind in said or refused.value.code == "invalid_json"
            assert "give a whole number from 1 to 1000000000000000, or null" in said or "JSON" in said, said
            assert "\n" not in said
            assert len(said) < 300
    assert control.snapshot() == before


def test_the_largest_limit_is_one(limited: tuple[Control, WorkerProcess]) -> None:
    """And is counted, told and kept as any other."""
    control, worker = limited
    most = dict.fromkeys(KINDS, 10**15)
    control.call("POST", "/v1/tenants", {"name": "boundless", "limits": most})
    key = control.call("POST", "/v1/keys", {"tenant": "boundless", "limits": most})["key"]
    assert control.call("PUT", f"/v1/limits/route/{MODEL}", most)["applied"]
    data = client.post("/v1/chat/completions", gateway.document("chat"), {"authorization": f"Bearer {key}"})
    for _ in range(3):
        answer = client.ask(worker.url, data, 20)
        assert answer.status == 200
        assert answer.head.headers["x-ratelimit-limit-requests"] == str(10**15)
        assert 0 < int(answer.head.headers["x-ratelimit-remaining-tokens"]) <= 10**15
