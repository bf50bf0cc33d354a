"""Tokens of a real issuer, at a real worker that a real control tells of its keys; and at control itself."""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from vitalis_serve.control.client import Client, Refused

from tests.support.control import SECONDS, Control, running
from tests.support.gateway import settled, wait_until
from tests.support.issuer import JWKS, Issuer, jwk, running_issuer
from tests.support.worker import WorkerProcess, running_worker

ROLES = {"roles_claim": "realm_access.roles", "roles": {"watch": "viewer", "ops": "operator", "root": "admin"}}


class Site:
    """An issuer, control and a worker, in one folder."""

    def __init__(self, folder: Path, issuer: Issuer, control: Control, worker: WorkerProcess) -> None:
        self.folder, self.issuer, self.control, self.worker = folder, issuer, control, worker

    def ask(self, token: str, connection: http.client.HTTPConnection | None = None) -> tuple[int, Any]:
        """GET /v1/models with it: status and document."""
        own = connection or self.connect()
        own.request("GET", "/v1/models", headers={"authorization": f"Bearer {token}"})
        answer = own.getresponse()
        document = json.loads(answer.read())
        if connection is None:
            own.close()
        return answer.status, document

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.worker.host, self.worker.port, timeout=SECONDS)

    def opens(self, token: str) -> bool:
        return self.ask(token)[0] == 200

    def refusal(self, token: str, connection: http.client.HTTPConnection | None = None) -> str:
        status, document = self.ask(token, connection)
        assert (status, document["error"]["code"]) == (401, "invalid_token"), document
        assert not any(part in document["error"]["message"] for part in token.split(".") if len(part) > 8)
        return str(document["error"]["message"])

    def tenant(self, name: str) -> str:
        self.control.call("POST", "/v1/tenants", {"name": name})
        return name

    def as_(self, *words: str, sub: str = "ann") -> Client:
        """Control, asked with a token that has these roles at the issuer."""
        return Client(self.control.address, self.issuer.token(sub=sub, realm_access={"roles": list(words)}))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("oidc")
    with running_issuer() as issuer:
        issuer.published = [jwk("ES256", "one"), jwk("RS256", "rsa"), jwk("EdDSA", "ed")]
        with (
            running(folder, issuers=[issuer.options(**ROLES)], workers=1, apply_seconds=SECONDS) as control,
            running_worker(folder, document=(folder / "snapshot.json").read_bytes()) as worker,
        ):
            made = Site(folder, issuer, control, worker)
            made.tenant("acme")
            wait_until(lambda: made.opens(issuer.token()), SECONDS, "the issuer's keys at the worker")
            yield made
            settled(worker)


@pytest.mark.parametrize(("algorithm", "kid"), [("ES256", "one"), ("RS256", "rsa"), ("EdDSA", "ed")])
def test_a_token_opens_what_its_tenant_may_use(site: Site, algorithm: str, kid: str) -> None:
    status, document = site.ask(site.issuer.token(algorithm, kid=kid))
    assert (status, [model["id"] for model in document["data"]]) == (200, ["chat", "reason"])


def test_forged_and_foreign_tokens_are_refused(site: Site) -> None:
    assert "signature" in site.refusal(site.issuer.token(number=7))
    assert "somebody else" in site.refusal(site.issuer.token(aud="another"))
    assert "issuer" in site.refusal(site.issuer.token(iss="https://evil.example"))
    assert "has expired" in site.refusal(site.issuer.token(exp=time.time() - 31))
    assert "not valid yet" in site.refusal(site.issuer.token(nbf=time.time() + 100))
    assert "larger than" in site.refusal(site.issuer.token(pad="x" * 9000))
    assert "`nobody`, does not exist" in site.refusal(site.issuer.token(tenant="nobody"))
    assert "names no tenant" in site.refusal(site.issuer.token(tenant=None))


def test_a_revoked_tenant_s_tokens_are_refused_within_a_second(site: Site) -> None:
    token = site.issuer.token(tenant=site.tenant("leaving"))
    connection = site.connect()
    assert site.ask(token, connection)[0] == 200
    began = time.monotonic()
    changed = site.control.call("DELETE", "/v1/tenants/leaving")
    assert changed["applied"] is True
    assert "was revoked" in site.refusal(token, connection)  # on the connection that knew it
    assert time.monotonic() - began < SECONDS
    connection.close()


def test_a_token_ends_on_an_open_connection_too(site: Site) -> None:
    token = site.issuer.token(exp=time.time() - 28)  # two seconds of leeway are left
    connection = site.connect()
    assert site.ask(token, connection)[0] == 200
    wait_until(lambda: site.ask(token, connection)[0] == 401, SECONDS, "its end")
    assert "has expired" in site.refusal(token, connection)
    connection.close()


def test_a_rotated_key_is_fetched_at_once_and_by_one(site: Site) -> None:
    """200 requests with a key that nobody knows yet, from many at the same time."""
    before = site.issuer.fetches[JWKS]
    site.issuer.published = [*site.issuer.published, jwk("ES256", "two", 1)]
    token = site.issuer.token(kid="two", number=1)
    with ThreadPoolExecutor(10) as pool:
        statuses = list(pool.map(lambda _: site.ask(token)[0], range(200)))
    assert set(statuses) <= {200, 401}
    wait_until(lambda: site.opens(token), SECONDS, "the new key")
    assert site.opens(site.issuer.token())  # the old key is still there
    for n in range(50):
        assert "has not published" in site.refusal(site.issuer.token(kid=f"never-{n}"))
    assert site.issuer.fetches[JWKS] - before <= 2


def test_with_the_issuer_away_nothing_changes_not_even_at_a_restart(tmp_path: Path) -> None:
    with running_issuer() as issuer:
        options: dict[str, Any] = {"issuers": [issuer.options(refresh_seconds=0.2)], "workers": 1}
        with (
            running(tmp_path, **options) as control,
            running_worker(tmp_path, document=(tmp_path / "snapshot.json").read_bytes()) as worker,
        ):
            site = Site(tmp_path, issuer, control, worker)
            site.tenant("acme")
            token = issuer.token()
            wait_until(lambda: site.opens(token), SECONDS, "the issuer's keys at the worker")
            issuer.go_away()
            wait_until(lambda: "cannot be fetched" in control.log_path.read_text(), SECONDS, "a failed fetch")
            assert site.opens(token)
            control.stop()
            assert site.opens(token)
            with running(tmp_path, **options) as control:
                version = control.snapshot()["version"]
                assert [key["kid"] for key in control.snapshot()["issuers"][0]["keys"]] == ["one"]
                wait_until(
                    lambda: [w["version"] for w in _health(control)["workers"]] == [version], SECONDS, "the snapshot"
                )
                assert site.opens(token)
                issuer.published = [jwk("ES256", "one"), jwk("ES256", "two", 1)]
                issuer.come_back()
                wait_until(lambda: site.opens(issuer.token(kid="two", number=1)), SECONDS, "the issuer's return")
            settled(worker)


def _health(control: Control) -> Any:
    connection = http.client.HTTPConnection(urlsplit(control.address).netloc, timeout=SECONDS)
    connection.request("GET", "/health", headers={"authorization": f"Bearer {control.token}"})
    document = json.loads(connection.getresponse().read())
    connection.close()
    return document


# Control's own access


def refused(call: Callable[[], object]) -> tuple[int, str, str]:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.status, caught.value.code, str(caught.value)


def test_roles_of_tokens_open_what_they_should(site: Site) -> None:
    viewer, operator, admin = site.as_("watch"), site.as_("ops", "other"), site.as_("watch", "root")
    for client in (viewer, operator, admin):
        assert "acme" in [tenant["name"] for tenant in client.call("GET", "/v1/tenants")["tenants"]]
    question = {"model": "chat", "body": {"model": "chat", "messages": []}}
    assert refused(lambda: viewer.call("POST", "/v1/explain", question))[:2] == (403, "scope_missing")
    said = refused(lambda: operator.call("POST", "/v1/tenants", {"name": "mine"}))
    assert said[:2] == (403, "scope_missing")
    assert "needs the role `admin`; oidc:site:ann has the role `operator`" in said[2]
    assert refused(lambda: operator.call("GET", "/v1/audit"))[1] == "scope_missing"
    assert operator.call("POST", "/v1/explain", question)["route"] == "chat"
    assert refused(lambda: operator.call("POST", "/v1/fleet/scale", {"replicas": 1}))[1] == "supervisor_unavailable"
    assert admin.call("POST", "/v1/tenants", {"name": "by-ann"})["name"] == "by-ann"
    assert "has no role here" in refused(lambda: site.as_("other").call("GET", "/v1/tenants"))[2]
    rows = admin.call("GET", "/v1/audit")["audit"]
    assert {row["subject"]: row["who"] for row in rows if row["action"] == "tenant.create"}["by-ann"] == "oidc:site:ann"
    assert "oidc:site:ann" in {row["who"] for row in rows if row["action"] == "fleet.scale"}


def test_scopes_of_keys_open_what_they_should(site: Site) -> None:
    def made(*scopes: str) -> tuple[dict[str, Any], Client]:
        key = site.control.call("POST", "/v1/keys", {"tenant": "acme", "scopes": list(scopes)})
        return key, Client(site.control.address, key["key"])

    (root, admin), (_, watcher), (_, caller) = made("admin"), made("metrics"), made("inference", "debug")
    assert admin.call("POST", "/v1/tenants", {"name": "by-key"})["name"] == "by-key"
    rows = admin.call("GET", "/v1/audit")["audit"]
    assert next(row["who"] for row in rows if row["subject"] == "by-key") == f"key:{root['id']}"
    connection = http.client.HTTPConnection(urlsplit(site.control.address).netloc, timeout=SECONDS)
    connection.request("GET", "/metrics", headers={"authorization": f"Bearer {watcher._token}"})
    answer = connection.getresponse()
    assert (answer.status, b"vitalis_" in answer.read()) == (200, True)
    connection.close()
    assert "needs the role `viewer`" in refused(lambda: watcher.call("GET", "/v1/fleet"))[2]
    assert "has no role here" in refused(lambda: caller.call("GET", "/v1/fleet"))[2]
    site.control.call("DELETE", f"/v1/keys/{root['id']}")
    assert refused(lambda: admin.call("GET", "/v1/fleet"))[:2] == (401, "invalid_key")


def test_a_revoked_tenant_s_tokens_do_not_open_control(site: Site) -> None:
    site.tenant("ending")
    root: dict[str, Any] = {"realm_access": {"roles": ["root"]}}
    theirs, nobody_s = (
        Client(site.control.address, site.issuer.token(sub="bob", tenant=tenant, **root)) for tenant in ("ending", None)
    )
    assert theirs.call("GET", "/v1/audit")["audit"]
    assert theirs.call("DELETE", "/v1/tenants/ending")["status"] == "disabled"
    said = refused(lambda: theirs.call("GET", "/v1/audit"))
    assert said[:2] == (401, "invalid_token")
    assert "This token's tenant, `ending`, was revoked." in said[2]
    assert nobody_s.call("GET", "/v1/audit")["audit"]


def test_a_forged_token_does_not_open_control(site: Site) -> None:
    root: dict[str, Any] = {"realm_access": {"roles": ["root"]}}

    def code(token: str) -> str:
        return refused(lambda: Client(site.control.address, token).call("GET", "/v1/fleet"))[1]

    for token in (site.issuer.token(number=7, **root), site.issuer.token(exp=time.time() - 100, **root)):
        assert code(token) in ("invalid_token", "authentication_failures")
    unsigned = site.issuer.token(**root).rsplit(".", 1)[0] + "."
    assert {code(unsigned) for _ in range(15)} == {"invalid_token", "authentication_failures"}
    assert site.as_("watch").call("GET", "/v1/fleet")["replicas"] == []  # who has a right one is let in
