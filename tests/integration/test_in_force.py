"""What is changed at control, asked of real workers: in force in each of them, on one host and on two."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.control.client import Refused

from tests.support import client, gateway, simulator
from tests.support.control import Control, running
from tests.support.gateway import wait_until
from tests.support.postgres import Postgres
from tests.support.simulator import Simulator
from tests.support.worker import MODEL, WorkerProcess, running_worker

SECONDS = 20  # for what happens by itself


@contextlib.contextmanager
def site(folder: Path, count: int, **options: Any) -> Iterator[tuple[Control, list[WorkerProcess]]]:
    """A control and so many workers, which serve from its snapshot. Control answers when all have a change, so what it
    has answered is in force everywhere: nothing here waits for it."""
    folder.mkdir(exist_ok=True)
    routes = [{"name": MODEL, "model": MODEL}, {"name": "reason", "model": MODEL}]
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(running(folder, workers=count, apply_seconds=SECONDS, routes=routes, **options))
        workers = []
        for index in range(count):
            home = folder / f"w{index}"
            home.mkdir(exist_ok=True)
            (home / "control.sock").unlink(missing_ok=True)
            (home / "control.sock").symlink_to(folder / "control.sock")
            shared = {"workers": count, "admission_socket": str(folder / "admission.sock")}
            workers.append(stack.enter_context(running_worker(home, worker=index, **shared)))
        assert connected(control)
        yield control, workers


def connected(control: Control) -> bool:
    """Control counts a change as applied only once so many workers as there should be have it."""
    return bool(control.call("POST", "/v1/tenants", {"name": f"t{time.monotonic_ns()}"})["applied"])


Three = tuple[Control, list[WorkerProcess]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Simulator]:
    with simulator.started() as started:
        yield started


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    with site(tmp_path_factory.mktemp("three"), 3) as (control, workers):
        control.call("POST", "/v1/tenants", {"name": "acme"})
        yield control, workers


def asked(workers: Sequence[WorkerProcess], key: str) -> set[str]:
    """What the workers answer to a key: the routes it may use as one text, or the code of the refusal."""
    return {told(client.ask(w.url, client.get("/v1/models", {"authorization": f"Bearer {key}"}))) for w in workers}


def told(answer: client.Response) -> str:
    if answer.status == 200:
        return " ".join(sorted(model["id"] for model in answer.json["data"]))
    return str(answer.json["error"]["code"])


ALL = {f"{MODEL} reason"}


def make(control: Control, tenant: str = "acme", **fields: Any) -> Any:
    made = control.call("POST", "/v1/keys", {"tenant": tenant, **fields})
    assert made["applied"]
    return made


def test_a_key_is_in_force_when_it_is_shown_and_no_more_when_it_is_revoked(three: Three) -> None:
    control, workers = three
    made = make(control)
    assert asked(workers, made["key"]) == ALL
    assert control.call("DELETE", f"/v1/keys/{made['id']}")["applied"]
    assert asked(workers, made["key"]) == {"invalid_key"}


def test_two_secrets_open_while_a_key_is_rotated_and_never_three(three: Three) -> None:
    control, workers = three
    made = make(control)
    path = f"/v1/keys/{made['id']}/rotate"
    first = made["key"]
    second = control.call("POST", path, {"overlap_seconds": 3600})["key"]
    assert asked(workers, first) == asked(workers, second) == ALL
    again = control.call("POST", path, {"overlap_seconds": 3600})
    third = again["key"]
    assert asked(workers, first) == {"invalid_key"}
    assert asked(workers, second) == asked(workers, third) == ALL
    assert third.split("_")[1] == made["id"]
    assert abs(again["old_until"] - time.time() - 3600) < 60
    last = control.call("POST", path, {"overlap_seconds": 0})
    assert last["old_until"] is None
    assert asked(workers, third) == {"invalid_key"}
    assert asked(workers, last["key"]) == ALL
    control.call("DELETE", f"/v1/keys/{made['id']}")
    assert asked(workers, last["key"]) == {"invalid_key"}


def test_the_old_secret_ends_at_its_time_without_another_snapshot(three: Three) -> None:
    control, workers = three
    made = make(control)
    rotated = control.call("POST", f"/v1/keys/{made['id']}/rotate", {"overlap_seconds": 2})
    wait_until(lambda: asked(workers, made["key"]) == {"expired_key"}, SECONDS, "the old secret's end")
    assert time.time() >= rotated["old_until"]
    assert asked(workers, rotated["key"]) == ALL
    assert control.snapshot()["version"] == rotated["version"]


def test_a_key_expires_is_extended_and_changed(three: Three) -> None:
    control, workers = three
    made = make(control, name="old", notes="n")
    path = f"/v1/keys/{made['id']}"
    ended = control.call("PATCH", path, {"expires_in_seconds": 0})
    assert (ended["status"], asked(workers, made["key"])) == ("expired", {"expired_key"})
    with pytest.raises(Refused, match="has expired: give it another expiry first"):
        control.call("POST", f"{path}/rotate", {})
    changed = control.call("PATCH", path, {"expires_in_seconds": None, "routes": ["reason"], "class": "batch"})
    assert asked(workers, made["key"]) == {"reason"}
    assert (changed["expires_at"], changed["class"], changed["name"], changed["notes"]) == (None, "batch", "old", "n")
    listed = next(k for k in control.call("GET", "/v1/keys?tenant=acme")["keys"] if k["id"] == made["id"])
    assert (listed["routes"], listed["last_used_at"]) == (["reason"], None)


def test_limits_are_set_kept_and_lifted(three: Three, engine: Simulator) -> None:
    control, workers = three
    for worker in workers:
        worker.serve(engine.address)
    control.call("POST", "/v1/tenants", {"name": "limited", "limits": {"requests_per_minute": 1}})
    key = make(control, tenant="limited")["key"]
    assert chats(workers, key) == ["ok", "requests_limit", "requests_limit"]
    control.call("DELETE", "/v1/limits/tenant/limited")
    assert chats(workers, key) == ["ok"] * 3
    control.call("PUT", f"/v1/limits/route/{MODEL}", {"tokens_per_day": 1})
    assert chats(workers, key) == ["ok", "budget_spent", "budget_spent"]
    control.call("DELETE", f"/v1/limits/route/{MODEL}")
    assert chats(workers, key) == ["ok"] * 3


def chats(workers: Sequence[WorkerProcess], key: str) -> list[str]:
    """What each answers to a chat: ok, or the code of the refusal."""
    asking = client.post("/v1/chat/completions", gateway.document("chat"), {"authorization": f"Bearer {key}"})
    answers = [client.ask(worker.url, asking) for worker in workers]
    return ["ok" if answer.status == 200 else gateway.error_code(answer) for answer in answers]


def test_limits_of_all_kinds_reach_the_workers(three: Three) -> None:
    control, _ = three
    made = make(control, limits={"concurrent": 7})
    assert made["limits"]["concurrent"] == 7
    control.call("PUT", "/v1/limits/tenant/acme", {"requests_per_minute": 600, "concurrent": 20})
    control.call("PATCH", "/v1/limits/tenant/acme", {"tokens_per_day": 5, "concurrent": None})
    control.call("PUT", "/v1/limits/route/reason", {"tokens_per_month": 9})
    body = control.snapshot()
    assert rates(body, "tenants", "name", "acme") == {"requests_per_minute": 600, "tokens_per_day": 5}
    assert rates(body, "routes", "name", "reason") == {"tokens_per_month": 9}
    assert rates(body, "keys", "id", made["id"]) == {"concurrent": 7}
    found = control.call("GET", "/v1/limits")["limits"]
    assert [(row["kind"], row["name"]) for row in found] == [
        ("key", made["id"]), ("route", "reason"), ("tenant", "acme"),
    ]  # fmt: skip
    for row in found:
        assert control.call("DELETE", f"/v1/limits/{row['kind']}/{row['name']}")["applied"]
    body = control.snapshot()
    assert [rates(body, *where) for where in (("tenants", "name", "acme"), ("routes", "name", "reason"))] == [None] * 2
    assert control.call("GET", "/v1/limits")["limits"] == []
    assert control.call("GET", "/v1/limits/route/reason")["tokens_per_month"] is None


def rates(body: dict[str, Any], what: str, field: str, name: str) -> Any:
    return next(row.get("rates") for row in body[what] if row[field] == name)


def resident(worker: WorkerProcess) -> int:
    """Its memory in bytes."""
    return int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_flood_of_wrong_keys_costs_no_memory_and_no_store(three: Three) -> None:
    control, workers = three
    worker, made = workers[0], make(control)

    def flood(begin: int, count: int) -> None:
        with client.connect(worker.url) as wire:
            for first in range(begin, begin + count, 100):
                head = "GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer vts_wrong{:07}_{:040}\r\n\r\n"
                wire.send("".join(head.format(n, n) for n in range(first, first + 100)).encode())
                assert {wire.read_response().status for _ in range(100)} == {401}

    flood(0, 2000)
    files = [path for path in control.folder.iterdir() if path.name.startswith(("vitalis.db", "snapshot"))]
    stored = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    grown = []
    for begin in (10_000, 20_000, 30_000):
        before = resident(worker)
        flood(begin, 10_000)
        grown.append(resident(worker) - before)
    # What 50 bytes of each would be. The allocator takes a piece now and then, but not each time.
    assert min(grown) < 500_000, grown
    assert [(path.stat().st_mtime_ns, path.stat().st_size) for path in files] == stored
    assert asked([worker], made["key"]) == ALL


# Several controls on one store


Sites = list[tuple[Control, list[WorkerProcess]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Sites]:
    shared = {"database_url": postgres.database(), "database_seconds": SECONDS}
    with contextlib.ExitStack() as stack:
        sites = [stack.enter_context(site(tmp_path_factory.mktemp(name), 1, **shared)) for name in ("a", "b")]
        sites[0][0].call("POST", "/v1/tenants", {"name": "acme"})
        yield sites
    postgres.drop(shared["database_url"])


def test_what_one_control_changes_is_in_force_at_the_other_s_workers(two: Sites) -> None:
    (a, of_a), (b, of_b) = two
    a.call("POST", "/v1/tenants", {"name": "leaver"})
    made = make(a, tenant="leaver")
    wait_until(lambda: asked(of_b, made["key"]) == ALL, SECONDS, "the key is in force at b")
    assert asked(of_a, made["key"]) == ALL
    rotated = b.call("POST", f"/v1/keys/{made['id']}/rotate", {"overlap_seconds": 0})
    wait_until(lambda: asked(of_a, made["key"]) == {"invalid_key"}, SECONDS, "the old secret is gone at a")
    assert asked(of_a, rotated["key"]) == ALL
    b.call("PUT", f"/v1/limits/key/{made['id']}", {"concurrent": 3})
    wait_until(lambda: rates(a.snapshot(), "keys", "id", made["id"]) == {"concurrent": 3}, SECONDS, "limits at a")
    a.call("DELETE", "/v1/tenants/leaver")
    wait_until(lambda: asked(of_b, rotated["key"]) == {"invalid_key"}, SECONDS, "the tenant is gone at b")
    assert a.snapshot()["cache_secret"] == b.snapshot()["cache_secret"]
    assert (a.folder / "cache.secret").read_text() != (b.folder / "cache.secret").read_text()


def test_changes_at_both_at_once_all_arrive_at_both(two: Sites) -> None:
    """Each with a version of its own; and who is second to use a name is told so."""
    (a, _), (b, _) = two
    made: list[Any] = []
    refused: list[str] = []

    def changes(control: Control) -> None:
        for number in range(8):
            try:
                made.append(control.call("POST", "/v1/tenants", {"name": f"same-{number}"}))
            except Refused as error:
                refused.append(error.code)
            made.append(control.call("POST", "/v1/keys", {"tenant": "acme"}))

    together([lambda: changes(a), lambda: changes(b)])
    assert refused == ["already_exists"] * 8
    assert len({answer["version"] for answer in made}) == len(made) == 24
    newest = max(answer["version"] for answer in made)
    wait_until(lambda: all(c.snapshot()["version"] >= newest for c in (a, b)), SECONDS, "both have the newest")
    keys = {answer["id"] for answer in made if "id" in answer}
    assert a.snapshot()["keys"] == b.snapshot()["keys"]
    assert keys <= {key["id"] for key in a.snapshot()["keys"]}


def test_without_the_store_workers_serve_on_and_afterwards_both_follow_again(two: Sites, postgres: Postgres) -> None:
    (a, of_a), (b, of_b) = two
    made = make(a)
    wait_until(lambda: asked(of_b, made["key"]) == ALL, SECONDS, "the key is in force at b")
    postgres.kill()
    try:
        with pytest.raises(Refused) as caught:
            b.call("DELETE", f"/v1/keys/{made['id']}")
        assert caught.value.code == "store_unavailable"
        assert asked([*of_a, *of_b], made["key"]) == ALL
    finally:
        postgres.start()
    wait_until(lambda: revoked(b, made["id"]), SECONDS, "b revokes it")
    wait_until(lambda: asked(of_a, made["key"]) == {"invalid_key"}, SECONDS, "a has heard of it")


def revoked(control: Control, key_id: str) -> bool:
    with contextlib.suppress(Refused):
        return bool(control.call("DELETE", f"/v1/keys/{key_id}"))
    return False


def together(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS * 4)
    assert not any(thread.is_alive() for thread in threads)
