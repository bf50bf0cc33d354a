"""A real control process: changes, workers, snapshots, metrics, fleet, and what it does when things go wrong."""

import contextlib
import http.client
import json
import os
import re
import resource
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vitalis_serve.control.client import Client, NotRunning, Refused
from vitalis_serve.control.connections import MAX_HEAD_BYTES, REQUEST_SECONDS
from vitalis_serve.gateway.keys import KeyTable, Limits, Route
from vitalis_serve.metrics import CONTROL_METRICS, TIME_BUCKETS, WORKER_METRICS
from vitalis_serve.store.secrets import digest

from tests.support.control import SECONDS, Control, control_options, running

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "tokens_per_month")
FLEET = {
    "type": "fleet",
    "version": 7,
    "replicas": [
        {
            "name": "engine-0",
            "address": "unix:/x.sock",
            "state": "ready",
            "models": ["tiny"],
            "slots": 8,
            "incarnation": 3,
            "detail": "",
        }
    ],
}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """One for the tests that leave nothing which another would trip over."""
    folder = tmp_path_factory.mktemp("control")
    with running(folder, supervisor_socket=str(folder / "s.sock")) as control:
        yield control


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """One that expects a worker and does not wait for it long."""
    folder = tmp_path_factory.mktemp("hasty")
    with running(folder, workers=1, apply_seconds=0.2, collect_seconds=0.3) as control:
        yield control


def raw(control: Control, method: str, path: str, *, body: bytes = b"", **headers: str) -> Any:
    parts = urlsplit(control.address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=SECONDS)
    try:
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def with_token(control: Control) -> dict[str, str]:
    return {"authorization": f"Bearer {control.token}"}


def metrics(control: Control) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer, text = raw(control, "GET", "/metrics", **with_token(control))
    assert answer.status == 200
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


# Changes


def test_change_is_in_force_within_a_second(control: Control) -> None:
    """The answer comes after the worker has the key; revoking takes it away the same way. Control waits a second for
    that, and says in `applied` whether it was enough."""
    worker = control.worker(name="speedy")
    worker.snapshot()
    control.call("POST", "/v1/tenants", {"name": "speed"})
    made = control.call("POST", "/v1/keys", {"tenant": "speed", "class": "batch", "scopes": ["inference", "debug"]})
    assert made["applied"] is True
    worker.snapshot()
    body = worker.snapshot(0.01)
    (entry,) = [key for key in body["keys"] if key["id"] == made["id"]]
    assert entry == {
        "id": made["id"],
        "digest": digest(made["key"]),
        "tenant": "speed",
        "scopes": ["inference", "debug"],
        "routes": ["*"],
        "class": "batch",
        "expires_at": None,
    }
    assert body["version"] == made["version"]
    assert control.snapshot() == body

    gone = control.call("DELETE", f"/v1/keys/{made['id']}")
    assert (gone["applied"], gone["status"]) == (True, "revoked")
    assert made["id"] not in {key["id"] for key in worker.snapshot(0.01)["keys"]}
    worker.close()


def test_revoked_tenant_takes_its_keys_along(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "leaver"})
    made = control.call("POST", "/v1/keys", {"tenant": "leaver"})
    assert made["id"] in {key["id"] for key in control.snapshot()["keys"]}
    control.call("DELETE", "/v1/tenants/leaver")
    assert made["id"] not in {key["id"] for key in control.snapshot()["keys"]}
    assert {"name": "leaver", "status": "disabled"} in control.snapshot()["tenants"]


def test_change_says_when_a_worker_has_not_taken_it(hasty: Control) -> None:
    """A worker that does not acknowledge: committed, on disk, but not called applied."""
    worker = hasty.worker(acknowledge=False)
    worker.snapshot()
    made = hasty.call("POST", "/v1/tenants", {"name": "acme"})
    assert made["applied"] is False
    assert hasty.snapshot()["version"] == made["version"]
    worker.send({"type": "applied", "version": made["version"]})
    worker.acknowledge = True
    assert hasty.call("POST", "/v1/tenants", {"name": "two"})["applied"] is True
    worker.close()


def test_change_waits_for_workers_that_should_be_there(hasty: Control) -> None:
    assert hasty.call("POST", "/v1/tenants", {"name": "alone"})["applied"] is False


def test_concurrent_changes_all_arrive_each_with_its_version(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "busy"})
    made: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: made.append(control.call("POST", "/v1/keys", {"tenant": "busy"})))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len({answer["version"] for answer in made}) == 12
    assert {answer["id"] for answer in made} <= {key["id"] for key in control.snapshot()["keys"]}
    assert control.snapshot()["version"] == max(answer["version"] for answer in made)


def test_every_change_is_in_the_audit_table(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "watched"})
    made = control.call("POST", "/v1/keys", {"tenant": "watched", "name": "ci"})
    control.call("DELETE", f"/v1/keys/{made['id']}")
    control.call("DELETE", "/v1/tenants/watched")
    with pytest.raises(Refused):
        control.call("POST", "/v1/keys", {"tenant": "nobody"})
    rows = control.call("GET", "/v1/audit?limit=4")["audit"]
    assert [(row["action"], row["subject"]) for row in rows] == [
        ("tenant.revoke", "watched"),
        ("key.revoke", made["id"]),
        ("key.create", made["id"]),
        ("tenant.create", "watched"),
    ]
    assert {row["who"] for row in rows} == {"control.token"}
    assert all(row["origin"].startswith("127.0.0.1:") for row in rows)
    assert all(abs(row["at"] - time.time()) < 60 for row in rows)
    assert rows[2]["details"]["name"] == "ci"


def test_changes_of_keys_and_limits_are_in_the_audit_table_without_a_secret(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "audited"})
    made = control.call("POST", "/v1/keys", {"tenant": "audited"})
    secrets = [made["key"], control.call("POST", f"/v1/keys/{made['id']}/rotate", {"overlap_seconds": 60})["key"]]
    control.call("PATCH", f"/v1/keys/{made['id']}", {"notes": "n", "expires_in_seconds": None})
    control.call("PUT", "/v1/limits/tenant/audited", {"concurrent": 2})
    control.call("DELETE", "/v1/limits/tenant/audited")
    rows = control.call("GET", "/v1/audit?limit=4")["audit"]
    assert [(row["action"], row["subject"], row["details"]) for row in reversed(rows)] == [
        ("key.rotate", made["id"], {"overlap_seconds": 60}),
        ("key.change", made["id"], {"notes": "n", "expires_in_seconds": None}),
        ("limits.set", "tenant:audited", dict.fromkeys(LIMITS) | {"concurrent": 2}),
        ("limits.clear", "tenant:audited", dict.fromkeys(LIMITS)),
    ]
    assert not any(secret in json.dumps(control.call("GET", "/v1/audit")) for secret in secrets)


def test_what_was_revoked_is_neither_changed_nor_limited(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "over"})
    made = control.call("POST", "/v1/keys", {"tenant": "over", "limits": {"concurrent": 1}})
    control.call("DELETE", f"/v1/keys/{made['id']}")
    for method, path, body in (
        ("POST", f"/v1/keys/{made['id']}/rotate", {}),
        ("PATCH", f"/v1/keys/{made['id']}", {"name": "x"}),
        ("PUT", f"/v1/limits/key/{made['id']}", {"concurrent": 1}),
    ):
        with pytest.raises(Refused, match="was revoked, for good: make a new one") as caught:
            control.call(method, path, body)
        assert (caught.value.status, caught.value.code) == (409, "key_closed")
    control.call("DELETE", f"/v1/limits/key/{made['id']}")
    control.call("DELETE", "/v1/tenants/over")
    with pytest.raises(Refused, match="'over' was revoked: it uses nothing"):
        control.call("PUT", "/v1/limits/tenant/over", {"concurrent": 1})


def test_secret_of_a_key_is_nowhere_on_disk(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "secretive"})
    secret = control.call("POST", "/v1/keys", {"tenant": "secretive"})["key"].split("_")[2]
    for path in control.folder.iterdir():
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path.name


# Workers and snapshots


def test_files_are_private(control: Control) -> None:
    for name in ("snapshot.json", "control.token", "cache.secret", "vitalis.db", "vitalis.db-wal", "control.sock"):
        assert stat.S_IMODE((control.folder / name).stat().st_mode) == 0o600, name


def test_worker_that_comes_later_gets_the_newest_snapshot(control: Control) -> None:
    version = control.call("POST", "/v1/tenants", {"name": "early"})["version"]
    worker = control.worker(name="late", version=1)
    assert worker.snapshot()["version"] == version
    worker.close()


def test_workers_get_routes_cache_groups_and_the_secret_which_outlives_a_restart(tmp_path: Path) -> None:
    policy = {"class": "emergency", "limits": {"n": 2}, "preamble": "x"}
    options = {"routes": [{"name": "r", "model": "m", "policy": policy}], "cache_groups": {"relief": ["field"]}}
    secrets = []
    for _ in range(2):
        with running(tmp_path, **options) as control:
            with contextlib.suppress(Refused):  # there since the first run
                control.call("POST", "/v1/tenants", {"name": "field"})
            body = control.snapshot()
            keys = KeyTable.decode(json.dumps(body).encode())
            secrets.append(body["cache_secret"])
        assert keys.routes["r"] == Route("r", "m", class_="emergency", limits=Limits(n=2), preamble="x")
        assert list(keys.policies) == ["r"]
        assert body["tenants"] == [{"name": "field", "status": "active", "cache_group": "relief"}]
    assert secrets[0] == secrets[1] == (tmp_path / "cache.secret").read_text().strip()


def test_worker_with_a_newer_snapshot_is_outgrown(control: Control) -> None:
    """As after the store was put back to an older copy: what is in the store wins, under a newer number."""
    worker = control.worker(name="ahead", version=5000)
    assert worker.snapshot()["version"] > 5000
    assert control.snapshot()["version"] > 5000
    worker.close()


def test_versions_grow_over_restarts_even_if_the_store_is_lost(tmp_path: Path) -> None:
    with running(tmp_path) as control:
        first = control.call("POST", "/v1/tenants", {"name": "acme"})["version"]
    with running(tmp_path) as control:
        second = control.snapshot()["version"]
        assert second > first
        assert [t["name"] for t in control.call("GET", "/v1/tenants")["tenants"]] == ["acme"]
    for path in tmp_path.glob("vitalis.db*"):
        path.unlink()
    with running(tmp_path) as control:
        assert control.snapshot()["version"] > second


def test_control_killed_and_started_again_serves_the_same_keys(tmp_path: Path) -> None:
    """kill -9 right after an answer: what was answered is there. Stale sockets and files are in nobody's way."""
    control = Control(tmp_path).wait_ready()
    control.call("POST", "/v1/tenants", {"name": "acme"})
    made = control.call("POST", "/v1/keys", {"tenant": "acme"})
    token = control.token
    control.process.kill()
    control.stop()
    with running(tmp_path) as again:
        assert again.token == token
        worker = again.worker(version=made["version"])
        assert [key["id"] for key in worker.snapshot()["keys"]] == [made["id"]]
        worker.close()


def test_worker_that_talks_nonsense_is_let_go_alone(control: Control) -> None:
    good = control.worker(name="good")
    good.snapshot()
    for line in (b"\xff\xfe\n", b'{"type":"applied","version":3}\n', b"[]\n", b'{"type":"hello"}\n'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
            bad.settimeout(SECONDS)
            bad.connect(control.options["control_socket"])
            bad.sendall(line)
            assert bad.recv(1) == b""
    assert control.call("POST", "/v1/tenants", {"name": "undisturbed"})["applied"] is True
    good.close()


# Access and bad input


def test_token_is_needed_for_everything_but_liveness(control: Control) -> None:
    assert raw(control, "GET", "/healthz")[0].status == 200
    for path in ("/health", "/metrics", "/v1/fleet", "/v1/keys", "/nothing"):
        answer, body = raw(control, "GET", path)
        assert answer.status in (401, 429), path
        assert json.loads(body)["error"]["code"] in ("missing_key", "authentication_failures")


def test_wrong_token_is_refused_and_the_right_one_still_works(tmp_path: Path) -> None:
    """A flood of wrong ones is answered with 429 after a few, logs a few lines, and locks nobody out."""
    with running(tmp_path) as control:
        answer, body = raw(control, "GET", "/v1/keys", authorization="Bearer vtc_wrong")
        assert (answer.status, json.loads(body)["error"]["code"]) == (401, "invalid_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        statuses = [raw(control, "GET", "/v1/keys", authorization="Bearer x")[0].status for _ in range(60)]
        assert statuses[-1] == 429
        assert statuses.count(401) < 20
        answer, _ = raw(control, "GET", "/v1/keys", authorization="Bearer x")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert control.call("GET", "/v1/keys") == {"keys": []}
        assert 1 <= control.log_path.read_text().count("refused without a credential of ours") < 20


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "sentence"),
    [
        ("POST", "/v1/keys", b"{", 400, "invalid_json", "not JSON"),
        ("POST", "/v1/keys", b"[1]", 400, "invalid_request", "send a JSON object"),
        ("POST", "/v1/keys", b"", 400, "invalid_request", "send a JSON object"),
        ("POST", "/v1/keys", b"{}", 400, "invalid_request", "tenant: this field is missing"),
        ("POST", "/v1/keys", b'{"tenant":"t","clas":"batch"}', 400, "invalid_request", "clas: there is no such"),
        ("POST", "/v1/keys", b'{"tenant":"t","class":"bach"}', 400, "invalid_request", "did you mean 'batch'"),
        ("POST", "/v1/keys", b'{"tenant":"t","scopes":["inferense"]}', 400, "invalid_request", "'inference'"),
        ("POST", "/v1/keys", b'{"tenant":"t","scopes":[]}', 400, "invalid_request", "scopes"),
        ("POST", "/v1/keys", b'{"tenant":"t","routes":["chatt"]}', 400, "invalid_request", "did you mean 'chat'"),
        (
            "POST",
            "/v1/keys",
            b'{"tenant":"t","expires_in_seconds":0}',
            400,
            "invalid_request",
            "expires_in_seconds: give a whole",
        ),
        ("POST", "/v1/tenants", b'{"name":"a b"}', 400, "invalid_request", "name: give 1 to 64 letters, digits, dots"),
        ("POST", "/v1/tenants", b'{"name":"a\\u0000"}', 400, "invalid_request", "name"),
        ("POST", "/v1/tenants", b'{"name":"' + b"a" * 2_000_000 + b'"}', 413, "body_too_large", "1048576"),
        ("DELETE", "/v1/keys/nosuchkey", b"", 404, "key_not_found", "no key 'nosuchkey'"),
        ("DELETE", "/v1/tenants/nobody", b"", 404, "tenant_not_found", "no tenant 'nobody'"),
        ("DELETE", "/v1/keys/a%00b", b"", 404, "key_not_found", "no key 'a\\x00b'"),
        ("GET", "/v1/keys?tenant=nobody", b"", 404, "tenant_not_found", "no tenant 'nobody'"),
        ("POST", "/v1/tenants", b'{"name":"n","notes":"a\\u0000"}', 400, "invalid_request", "notes: give text"),
        ("PATCH", "/v1/keys/nosuch", b"{}", 400, "invalid_request", "give at least one of name, class, scopes"),
        ("PATCH", "/v1/keys/nosuch", b'{"name":null}', 400, "invalid_request", "name: give text of at most 128"),
        ("PATCH", "/v1/keys/nosuch", b'{"routes":["chatt"]}', 400, "invalid_request", "did you mean 'chat'"),
        ("PATCH", "/v1/keys/nosuch", b'{"expires_in_seconds":-1}', 400, "invalid_request", "seconds from 0 to"),
        ("POST", "/v1/keys/nosuch/rotate", b"{}", 404, "key_not_found", "no key 'nosuch'"),
        ("POST", "/v1/keys/x/rotate", b'{"overlap_seconds":-1}', 400, "invalid_request", "seconds from 0 to 31622400"),
        ("PUT", "/v1/limits/tenant/nobody", b'{"concurrent":1}', 404, "tenant_not_found", "no tenant 'nobody'"),
        ("PUT", "/v1/limits/route/chatt", b'{"concurrent":1}', 404, "route_not_found", "did you mean 'chat'"),
        ("PUT", "/v1/limits/key/nosuch", b'{"concurrent":1}', 404, "key_not_found", "no key 'nosuch'"),
        ("PUT", "/v1/limits/rout/chat", b'{"concurrent":1}', 400, "invalid_request", "kind: limits are those of a key"),
        ("PUT", "/v1/limits/route/chat", b"{}", 400, "invalid_request", "give at least one of requests_per_minute"),
        (
            "PUT",
            "/v1/limits/route/chat",
            b'{"concurrent":0}',
            400,
            "invalid_request",
            "concurrent: 0 is no limit: give",
        ),
        ("PUT", "/v1/limits/route/chat", b'{"tokens_per_day":-1}', 400, "invalid_request", "tokens_per_day: -1 is no"),
        (
            "PUT",
            "/v1/limits/route/chat",
            b'{"concurrent":true}',
            400,
            "invalid_request",
            "concurrent: True is no limit",
        ),
        ("PUT", "/v1/limits/route/chat", b'{"concurrent":1.5}', 400, "invalid_request", "concurrent: 1.5 is no limit"),
        ("GET", "/v1/limits/route/nosuch", b"", 404, "route_not_found", "no route 'nosuch'"),
        ("DELETE", "/v1/limits/tenant/nobody", b"", 404, "tenant_not_found", "no tenant 'nobody'"),
        ("POST", "/v1/import", b"", 400, "invalid_request", "nothing was imported: the file cannot be read:"),
        ("POST", "/v1/import", b"- " * 100_000, 400, "invalid_request", "line 1: this is nested too deeply"),
        ("POST", "/v1/import?skip_existing=maybe", b"{}", 400, "invalid_request", "skip_existing: "),
        ("GET", "/v1/nothing", b"", 404, "unknown_path", ""),
        ("PUT", "/v1/keys", b"", 405, "method_not_allowed", ""),
        ("POST", "/v1/fleet/scale", b'{"replicas":-1}', 400, "invalid_request", "replicas"),
        ("POST", "/v1/fleet/restart", b"", 503, "supervisor_unavailable", "no supervisor answers"),
        ("GET", "/v1/audit?limit=0", b"", 400, "invalid_request", "limit"),
    ],
)
def test_bad_request_gets_one_sentence(
    control: Control, method: str, path: str, body: bytes, status: int, code: str, sentence: str
) -> None:
    headers = {**with_token(control), "content-type": "application/json", "x-request-id": "r-1"}
    answer, content = raw(control, method, path, body=body, **headers)
    error = json.loads(content)["error"]
    assert (answer.status, error["code"]) == (status, code), error
    assert sentence in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] == "r-1"


GARBAGE = ("", "soon", 0, -1, 1.5, True, 10**30, [], [None], {"a": 1}, "a b", "\ud800", "x" * 2000, None)
FIELDS = {
    "/v1/tenants": ("name", "notes"),
    "/v1/keys": ("tenant", "name", "class", "scopes", "routes", "notes", "expires_in_seconds"),
    "/v1/fleet/scale": ("replicas",),
    "/v1/keys/x/rotate": ("overlap_seconds",),
}


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, fields in FIELDS.items() for field in fields])
def test_garbage_in_a_field_is_refused_in_words_of_ours(control: Control, path: str, field: str) -> None:
    """Not in those of the library that found it; and every field refuses something of it."""
    whole: dict[str, dict[str, Any]] = {"/v1/tenants": {"name": "taken"}, "/v1/keys": {"tenant": "nobody"}}
    refused = 0
    for value in GARBAGE:
        body = {**whole.get(path, {}), field: value}
        try:
            control.call("POST", path, body)
        except Refused as error:
            if error.status == 400:
                refused += 1
                said = str(error)
                assert said.startswith(("name: ", f"{field}", "there is no route ")), said
                assert not re.search(r"should|[Ii]nput|String|Value|unable|pattern|valid|tuple|constraint", said), said
                assert len(said) < 400
    assert refused >= 5


@pytest.mark.parametrize("query", ["limit=0", "limit=many", "limit=1001", "before=0", "before=x", f"before={10**30}"])
def test_garbage_in_a_query_is_refused_in_words_of_ours(control: Control, query: str) -> None:
    with pytest.raises(Refused, match=rf"^{query.partition('=')[0]}: give ") as caught:
        control.call("GET", f"/v1/audit?{query}")
    assert caught.value.status == 400


def test_duplicate_tenant_is_refused(control: Control) -> None:
    control.call("POST", "/v1/tenants", {"name": "twice"})
    with pytest.raises(Refused, match="'twice' already exists") as caught:
        control.call("POST", "/v1/tenants", {"name": "twice"})
    assert caught.value.status == 409


def test_openapi_document_is_whole(control: Control) -> None:
    """Every reference resolves, and every operation has an error answer."""
    answer, text = raw(control, "GET", "/openapi.json")
    document = json.loads(text)
    assert document["openapi"].startswith("3.")
    assert {"/v1/keys", "/v1/tenants/{name}", "/v1/fleet/{replica}/drain", "/v1/explain", "/health", "/metrics"} <= set(
        document["paths"]
    )
    schemas = document["components"]["schemas"]
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "default" in operation["responses"], path
    assert schemas["NewKey"]["properties"]["class"]["enum"] == ["emergency", "interactive", "standard", "batch"]


class Links(HTMLParser):
    """What a page leads to or would load, and the places in it that can be led to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.leads: set[str] = set()
        self.places: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.places.add(f"#{value}")
            elif name in ("href", "src", "action", "data", "srcset"):
                self.leads.add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data if data.isspace() else f"{data} "


def test_the_documents_page_shows_every_operation_and_loads_nothing(control: Control) -> None:
    """On a machine without internet too: no script, no style sheet, no picture, and the browser is told so."""
    document = json.loads(raw(control, "GET", "/openapi.json")[1])
    answer, content = raw(control, "GET", "/docs")
    assert (answer.status, answer.headers.get_content_type()) == (200, "text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none';")
    page = Links(content.decode())
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert page.leads <= {"/openapi.json"} | page.places
    assert b"@import" not in content
    assert b"url(" not in content
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in page.text
            assert operation.get("description", "") in page.text
    for name, schema in document["components"]["schemas"].items():
        assert f"#{name}" in page.places
        assert set(schema["properties"]) <= set(page.text.split())
    assert "from 1 to 316224000" in page.text


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


# Metrics, fleet, health


def test_metrics_hold_workers_reports_and_the_fleet(control: Control) -> None:
    publish(control, FLEET)
    worker = control.worker()
    counts = [1, 2] + [0] * (len(TIME_BUCKETS) - 2) + [4]
    labels = {"route": "chat", "outcome": "ok", "code": ""}
    worker.report = {
        "counters": [["vitalis_requests_total", labels, 7], ["vitalis_unheard_of_total", {}, 1]],
        "gauges": [["vitalis_in_flight", {}, 3], ["vitalis_in_flight", {"user": "x"}, 3]],
        "histograms": [["vitalis_first_token_seconds", {"route": "chat"}, counts, 12.5]],
    }
    worker.snapshot()
    found = metrics(control)
    worker.close()
    chat = (("code", ""), ("outcome", "ok"), ("route", "chat"), ("worker", "worker-0"))
    assert found["vitalis_requests_total", chat] == 7
    assert found["vitalis_in_flight", (("worker", "worker-0"),)] == 3
    of_chat = (("route", "chat"), ("worker", "worker-0"))
    assert found["vitalis_first_token_seconds_count", of_chat] == 7
    assert found["vitalis_first_token_seconds_sum", of_chat] == 12.5
    assert found["vitalis_first_token_seconds_bucket", (("le", "0.00025"), *of_chat)] == 3
    assert found["vitalis_first_token_seconds_bucket", (("le", "+Inf"), *of_chat)] == 7
    assert found["vitalis_replica_state", (("replica", "engine-0"), ("state", "ready"))] == 1
    assert found["vitalis_replica_state", (("replica", "engine-0"), ("state", "failed"))] == 0
    assert found["vitalis_replica_restarts_total", (("replica", "engine-0"),)] == 2
    assert found["vitalis_workers", ()] == 1
    version = control.snapshot()["version"]
    assert found["vitalis_snapshot_version", (("worker", "worker-0"),)] == version
    assert not any("unheard" in name or ("user", "x") in labels for name, labels in found)


def test_every_metric_has_a_family_with_its_help(control: Control) -> None:
    _, text = raw(control, "GET", "/metrics", **with_token(control))
    families = {f.name: f for f in text_string_to_metric_families(text.decode())}
    for metric in (*WORKER_METRICS, *CONTROL_METRICS):
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)


def test_worker_that_does_not_report_delays_a_scrape_no_longer_than_allowed(hasty: Control) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(hasty.options["control_socket"])
        silent.sendall(b'{"type":"hello","worker":"worker-9","pid":1,"version":0}\n')
        assert silent.recv(10)
        started = time.monotonic()
        assert metrics(hasty)["vitalis_workers", ()] == 1
        assert 0.25 < time.monotonic() - started < 2


def publish(control: Control, fleet: dict[str, Any]) -> None:
    """Returns when control has taken the fleet: it answers what comes after it on the same channel."""
    control.supervisor.send(fleet)
    control.supervisor.send({"type": "in_flight?"})
    assert control.supervisor.expect("in_flight")["count"] == 0


def test_health_follows_fleet_and_workers(control: Control) -> None:
    publish(control, {"type": "fleet", "version": 1, "replicas": []})
    worker = control.worker()
    worker.snapshot()
    answer, body = raw(control, "GET", "/health", **with_token(control))
    assert (answer.status, json.loads(body)["status"]) == (503, "degraded")
    publish(control, FLEET)
    answer, body = raw(control, "GET", "/health", **with_token(control))
    document = json.loads(body)
    assert (answer.status, document["status"]) == (200, "ok")
    assert document["workers"][0]["name"] == "worker-0"
    assert control.call("GET", "/v1/fleet") == {k: v for k, v in FLEET.items() if k != "type"}
    worker.close()


class FleetSocket:
    """The supervisor's command socket: answers each request with the lines it was made with, once it `may`."""

    def __init__(self, path: Path, *answers: dict[str, Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.may = threading.Event()
        self.may.set()
        self._answers = answers
        self._path = path
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                self.requests.append(json.loads(lines.readline()))
                self.may.wait()
                lines.writelines(json.dumps(answer).encode() + b"\n" for answer in self._answers)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._path.unlink()


def test_fleet_commands_reach_the_supervisor_and_the_audit_table(control: Control) -> None:
    path = Path(control.options["supervisor_socket"])
    with pytest.raises(Refused, match="no supervisor answers") as caught:
        control.call("POST", "/v1/fleet/restart")
    assert caught.value.code == "supervisor_unavailable"
    fleet = FleetSocket(
        path, {"done": False, "message": "half"}, {"done": True, "ok": True, "message": "two replicas are ready"}
    )
    assert control.call("POST", "/v1/fleet/scale", {"replicas": 2}) == {
        "message": "two replicas are ready",
        "progress": ["half"],
    }
    control.call("POST", "/v1/fleet/engine-1/drain")
    control.call("POST", "/v1/fleet/engine-1/restart")
    control.call("POST", "/v1/fleet/restart")
    assert fleet.requests == [
        {"command": "scale", "replicas": 2},
        {"command": "drain", "replica": "engine-1"},
        {"command": "restart", "replica": "engine-1"},
        {"command": "restart", "replica": None},
    ]
    fleet.close()
    rows = control.call("GET", "/v1/audit?limit=10")["audit"][::-1]
    assert [(row["action"], row["subject"]) for row in rows[:4]] == [
        ("fleet.restart", "fleet"),
        ("fleet.restart.done", "fleet"),
        ("fleet.scale", "fleet"),
        ("fleet.scale.done", "fleet"),
    ]
    assert rows[1]["details"]["ok"] is False
    assert rows[2]["details"] == {"replicas": 2}


def test_refusal_of_the_supervisor_is_passed_on(control: Control) -> None:
    path = Path(control.options["supervisor_socket"])
    fleet = FleetSocket(path, {"done": True, "ok": False, "message": "there is no replica engine-9"})
    with pytest.raises(Refused, match="there is no replica engine-9") as caught:
        control.call("POST", "/v1/fleet/engine-9/drain")
    assert caught.value.status == 409
    fleet.close()


# Connections


def test_a_request_that_does_not_become_whole_is_closed_and_a_long_answer_is_not(control: Control) -> None:
    """Nobody needs the token to open a connection, so none may be held by saying nothing more on it."""
    begun = {
        "nothing": b"",
        "half a line": b"GET /heal",
        "half a head": b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        "an empty line after an answer": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        "half a body": b"POST /v1/keys HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    }
    fleet = FleetSocket(Path(control.options["supervisor_socket"]), {"done": True, "ok": True, "message": "drained"})
    fleet.may.clear()
    answers: list[Any] = []
    patient = threading.Thread(target=lambda: answers.append(control.call("POST", "/v1/fleet/engine-0/drain")))
    patient.start()
    parts = urlsplit(control.address)
    connections = {what: socket.create_connection((parts.hostname or "", parts.port or 0)) for what in begun}
    for what, connection in connections.items():
        connection.sendall(begun[what])
    time.sleep(1)
    connections["an empty line after an answer"].sendall(b"\r\n")
    connections["half a body"].sendall(b'"')  # not the same as saying nothing at all
    for what, connection in connections.items():
        connection.settimeout(REQUEST_SECONDS + SECONDS)
        with connection:
            while connection.recv(4096):
                assert what in ("an empty line after an answer", "half a body"), what
    assert patient.is_alive()
    fleet.may.set()
    patient.join(SECONDS)
    fleet.close()
    assert answers == [{"message": "drained", "progress": []}]


@pytest.mark.parametrize(
    ("begun", "piece"), [(b"GET /", b"x"), (b"GET /healthz HTTP/1.1\r\nx: ", b"x"), (b"\r\n", b"\r\n")]
)
def test_a_head_without_end_is_closed_before_it_fills_the_memory(control: Control, begun: bytes, piece: bytes) -> None:
    parts = urlsplit(control.address)
    address = (parts.hostname or "", parts.port or 0)
    with socket.create_connection(address, timeout=SECONDS) as connection, pytest.raises(ConnectionError):
        trickle(connection, begun, piece * 4096, 16 * MAX_HEAD_BYTES)
    assert raw(control, "GET", "/healthz")[0].status == 200


def trickle(connection: socket.socket, begun: bytes, piece: bytes, limit: int) -> None:
    connection.sendall(begun)
    for _ in range(limit // len(piece)):
        connection.sendall(piece)
        time.sleep(0.001)


# The process


def test_control_beats_and_answers_its_supervisor(control: Control) -> None:
    control.supervisor.expect("heartbeat", 3)
    control.supervisor.expect("heartbeat", 3)
    control.supervisor.send({"type": "fleet", "version": "nonsense"})
    control.supervisor.send({"type": "drain", "seconds": 1})
    control.supervisor.expect("drained")


def test_control_ends_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    control = Control(tmp_path).wait_ready()
    control.supervisor.close()
    assert control.process.wait(2) == 0


def test_sigterm_stops_control_and_leaves_no_socket(tmp_path: Path) -> None:
    with running(tmp_path) as control:
        worker = control.worker()
        worker.snapshot()
        assert control.stop() == 0
        assert worker.received.get(timeout=SECONDS) is None
        worker.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"vitalis.db", "snapshot.json", "control.token", "cache.secret", "control.json", "control.log"}
    with pytest.raises(NotRunning, match="vitalis-serve up"):
        Client.of_folder(tmp_path).call("GET", "/healthz")


def test_idle_control_costs_next_to_nothing(control: Control) -> None:
    """A heartbeat a second and nothing else: far below one percent of a core."""
    while control.supervisor.received.qsize():
        control.supervisor.received.get()
    control.supervisor.expect("heartbeat")
    before = _cpu_seconds(control.process.pid)
    for _ in range(3):
        control.supervisor.expect("heartbeat")
    assert _cpu_seconds(control.process.pid) - before <= 0.03


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def create_until_refused(control: Control, tenant: str) -> tuple[list[str], Refused]:
    """Makes keys until one is refused: the ids of those made, and the refusal."""
    made = []
    for _ in range(200):
        try:
            made.append(control.call("POST", "/v1/keys", {"tenant": tenant, "notes": "n" * 1000})["id"])
        except Refused as refused:
            return made, refused
    raise AssertionError("no key was refused")


@pytest.mark.parametrize("limit_bytes", [0, 64 * 1024])
def test_disk_without_room_refuses_a_change_whole(control: Control, limit_bytes: int) -> None:
    """No file of the process may grow: nothing is half done, and afterwards all is as if it had not been."""
    tenant = f"full-{limit_bytes}"
    control.call("POST", "/v1/tenants", {"name": tenant})
    acts = len(control.call("GET", "/v1/audit?limit=1000")["audit"])
    pid = control.process.pid
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, unlimited[1]))
    try:
        made, refused = create_until_refused(control, tenant)
        with pytest.raises(Refused):
            control.call("DELETE", f"/v1/tenants/{tenant}")
        listed = [key["id"] for key in control.call("GET", f"/v1/keys?tenant={tenant}")["keys"]]
        on_disk = [key["id"] for key in control.snapshot()["keys"] if key["tenant"] == tenant]
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    assert (refused.status, refused.code) == (507, "storage_full")
    assert "nothing was changed" in str(refused)
    assert sorted(made) == sorted(listed) == sorted(on_disk)
    assert len(control.call("GET", "/v1/audit?limit=1000")["audit"]) == acts + len(made)
    assert not (control.folder / "snapshot.json.new").exists()
    assert control.call("POST", "/v1/keys", {"tenant": tenant})["applied"] is True


def test_snapshot_that_cannot_be_written_stops_changes_and_not_service(tmp_path: Path) -> None:
    """Control starts all the same, and workers get what the store holds."""
    with running(tmp_path) as control:
        control.call("POST", "/v1/tenants", {"name": "acme"})
        made = control.call("POST", "/v1/keys", {"tenant": "acme"})
    in_the_way = tmp_path / "snapshot.json.new"
    in_the_way.mkdir()
    with running(tmp_path) as control:
        worker = control.worker()
        assert [key["id"] for key in worker.snapshot()["keys"]] == [made["id"]]
        with pytest.raises(Refused, match="nothing was changed") as caught:
            control.call("DELETE", f"/v1/keys/{made['id']}")
        assert caught.value.status == 503
        assert control.call("GET", "/v1/keys")["keys"][0]["status"] == "active"
        in_the_way.rmdir()
        assert control.call("DELETE", f"/v1/keys/{made['id']}")["applied"] is True
        assert worker.snapshot()["keys"] == []
        worker.close()


def test_start_without_any_room_is_one_sentence_and_exit_3(tmp_path: Path) -> None:
    program = (
        "import resource,sys;from vitalis_serve.control.process import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE,(0,resource.RLIM_INFINITY));sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "control.token").write_text("vtc_" + "x" * 40)
    (tmp_path / "cache.secret").write_text("vcs_" + "x" * 40)
    (tmp_path / "options.json").write_text(json.dumps(control_options(tmp_path)))
    argv = [sys.executable, "-c", program, str(tmp_path / "options.json")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 3
    assert ended.stderr.splitlines()[-1].startswith(f"the store {tmp_path}/vitalis.db cannot be opened")
    assert "Traceback" not in ended.stderr


def test_locked_store_is_a_sentence_and_no_crash(control: Control) -> None:
    """Another program holds the write lock longer than we wait; reading goes on."""
    holder = sqlite3.connect(control.folder / "vitalis.db", isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(Refused, match=r"cannot be used now \(database is locked\)"):
            control.call("POST", "/v1/tenants", {"name": "locked"})
        assert "locked" not in {tenant["name"] for tenant in control.call("GET", "/v1/tenants")["tenants"]}
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert control.call("POST", "/v1/tenants", {"name": "locked"})["applied"] is True


def start_failure(folder: Path, **options: Any) -> tuple[int, str]:
    control = Control(folder, **options)
    try:
        return control.process.wait(SECONDS), control.log_path.read_text()
    finally:
        control.stop()


def test_port_in_use_is_one_sentence_and_exit_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = start_failure(tmp_path, port=port)
    assert code == 3
    assert said.splitlines()[-1].startswith(f"control cannot listen on 127.0.0.1 port {port}: Address already in use;")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("place", "content", "sentence"),
    [
        ("vitalis.db", b"no database at all " * 100, "vitalis.db cannot be opened: file is not a database"),
        ("control.token", b"short", "control.token is not one of ours: remove the file"),
        ("cache.secret", b"vtc_" + b"x" * 40, "cache.secret is not one of ours: remove the file"),
    ],
)
def test_unusable_file_is_one_sentence_and_exit_3(tmp_path: Path, place: str, content: bytes, sentence: str) -> None:
    (tmp_path / place).write_bytes(content)
    code, said = start_failure(tmp_path)
    assert code == 3
    assert sentence in said.splitlines()[-1]
    assert "Traceback" not in said


def test_unusable_options_are_one_sentence_and_exit_2(tmp_path: Path) -> None:
    code, said = start_failure(tmp_path, prot=1)
    assert code == 2
    assert "prot" in said.splitlines()[-1]


def test_control_runs_alone_without_a_supervisor(tmp_path: Path) -> None:
    """Without the variable there is no channel: it serves, and stops by signal."""
    (tmp_path / "alone.json").write_text(json.dumps(control_options(tmp_path)))
    environ = {k: v for k, v in os.environ.items() if k != "VITALIS_SUPERVISOR_FD"}
    argv = [sys.executable, "-m", "vitalis_serve.control.process", str(tmp_path / "alone.json")]
    process = subprocess.Popen(argv, env=environ, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                assert Client.of_folder(tmp_path).call("GET", "/v1/tenants") == {"tenants": []}
                break
            except NotRunning:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        process.terminate()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


# Explanations

JSON = {"content-type": "application/json"}


def test_a_question_reaches_a_worker_as_it_was_written_and_its_answer_comes_back(control: Control) -> None:
    said = {
        "worker": "worker-0", "route": "chat", "class": "batch", "model": "tiny", "fallback": False,
        "policy": "affinity", "chosen": "engine-1", "reason": "home", "queued": 2,
        "ranking": [{"replica": "engine-1", "place": 1, "why_here": "home", "lacks": ""}],
    }  # fmt: skip
    body = '{ "messages" : [ {"role":"user",\n "content":"h\\u00e9"} ] }'
    asked = f'{{"model":"chat","class":"batch","session":"s","body":{body}}}'.encode()
    other, worker = control.worker(name="worker-1"), control.worker()
    worker.snapshot()
    other.snapshot()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(raw, control, "POST", "/v1/explain", body=asked, **JSON, **with_token(control))
        question = worker.expect("explain")
        assert question["body"] == {
            "model": "chat", "tenant": "", "class": "batch", "api": "chat", "session": "s", "body": body,
        }  # fmt: skip
        worker.send({"type": "explained", "id": question["id"] + 7, "values": {}})  # nobody's
        worker.send({"type": "explained", "id": question["id"], "values": said})
        status, text = answer.result(SECONDS)
        assert (status.status, json.loads(text)) == (200, said)
        answer = pool.submit(raw, control, "POST", "/v1/explain", body=asked, **JSON, **with_token(control))
        question = worker.expect("explain")
        error = {"code": "unsupported_field", "message": "`x` is not accepted.", "param": "x"}
        worker.send({"type": "explained", "id": question["id"], "error": error})
        status, text = answer.result(SECONDS)
        assert (status.status, json.loads(text)["error"]) == (400, error | {"type": "invalid_request_error"})
    worker.close()
    other.close()


def test_a_question_that_no_worker_answers_is_refused_in_time(hasty: Control) -> None:
    with pytest.raises(Refused, match="no gateway worker") as caught:
        hasty.call("POST", "/v1/explain", {"model": "chat"})
    assert (caught.value.status, caught.value.code) == (503, "worker_unavailable")
    worker = hasty.worker()
    worker.snapshot()
    with pytest.raises(Refused, match=r"worker-0 did not answer within 0\.\d+ s"):
        hasty.call("POST", "/v1/explain", {"model": "chat"})
    worker.close()


@pytest.mark.parametrize(("asked", "status", "sentence"), [
    (b'{"model":"chat","body":{"a":NaN}}', 400, "the body is not JSON"),
    (b'{"model":"chat","body":[]}', 400, "body: "),
    (b'{"model":"chat","api":"chats"}', 400, "api: "),
    (b'{"model":"chat","class":"urgent"}', 400, "there is no class 'urgent'"),
    (b'{"prompt":"x"}', 400, "model: this field is missing"),
    (b'{"model":"chat","tenant":"nobody"}', 404, "there is no tenant 'nobody'"),
])  # fmt: skip
def test_a_bad_question_gets_one_sentence(control: Control, asked: bytes, status: int, sentence: str) -> None:
    answer, text = raw(control, "POST", "/v1/explain", body=asked, **JSON, **with_token(control))
    assert answer.status == status
    assert sentence in json.loads(text)["error"]["message"]
