"""Who is asking, and what they may use."""

import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.keys import Key, KeyTable, Route

from tests.support.worker import KEY, snapshot

ROUTES = {"a": "engine-a", "b": "engine-b"}


def table(**row: object) -> KeyTable:
    return KeyTable.decode(snapshot(3, [{"id": "one", "key": KEY, "tenant": "t", **row}], ROUTES))


def test_a_key_is_found_by_its_digest() -> None:
    key, until = table().identify(KEY.encode(), 0)
    assert (key.id, key.tenant, until) == ("one", "t", float("inf"))
    assert table().version == 3


@pytest.mark.parametrize("token", [b"", b"x", KEY[:-1].encode(), KEY.encode() + b" ", b"\xff\x00"])
def test_any_other_token_is_refused(token: bytes) -> None:
    with pytest.raises(ServeError, match="not known") as caught:
        table().identify(token, 0)
    assert (caught.value.code, caught.value.status) == ("invalid_key", 401)


def test_a_key_ends_at_its_second() -> None:
    keys = table(expires_at=1000.0)
    key, until = keys.identify(KEY.encode(), 999.9)
    assert (key.id, until) == ("one", 1000.0)
    with pytest.raises(ServeError) as caught:
        keys.identify(KEY.encode(), 1000.0)
    assert caught.value.code == "expired_key"


def test_an_unknown_model_names_what_the_key_may_use() -> None:
    keys = table(routes=["b"])
    key, _ = keys.identify(KEY.encode(), 0)
    with pytest.raises(ServeError, match=r"`c` does not exist here\. This key may use: b\.") as caught:
        keys.route(key, "c")
    assert (caught.value.code, caught.value.status, caught.value.param) == ("model_not_found", 404, "model")


def test_a_route_of_others_is_forbidden() -> None:
    keys = table(routes=["b"])
    key, _ = keys.identify(KEY.encode(), 0)
    with pytest.raises(ServeError) as caught:
        keys.route(key, "a")
    assert (caught.value.code, caught.value.status) == ("route_not_allowed", 403)
    assert keys.route(key, "b").model == "engine-b"
    assert [route.name for route in keys.allowed(key)] == ["b"]


def test_a_star_opens_every_route() -> None:
    keys = table()
    assert [route.name for route in keys.allowed(keys.identify(KEY.encode(), 0)[0])] == ["a", "b"]


def test_a_model_name_of_a_megabyte_does_not_come_back() -> None:
    keys = table()
    with pytest.raises(ServeError) as caught:
        keys.route(keys.identify(KEY.encode(), 0)[0], "x" * 1_000_000)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"version":1,"keys":[{"id":"a"}]}',
                                      b'{"version":1,"keys":[{"id":"a","digest":"zz","tenant":"t"}]}'])  # fmt: skip
def test_what_is_no_snapshot_is_an_error(document: bytes) -> None:
    with pytest.raises(ValueError):  # msgspec's errors are ValueErrors
        KeyTable.decode(document)


def salts(document: dict[str, Any]) -> Callable[[str], str]:
    keys = KeyTable.decode(json.dumps({"version": 1, **document}).encode())
    return lambda tenant: str(json.loads(bytes(keys.salt(tenant))))


def test_each_tenant_has_a_salt_that_only_the_secret_tells() -> None:
    salt = salts({"cache_secret": "vcs_one"})
    assert salt("a") == hmac.new(b"vcs_one", b"tenant:a", "sha256").hexdigest()[:32]
    assert salt("a") != salt("b")
    assert salts({"cache_secret": "vcs_one", "version": 2})("a") == salt("a")
    assert salts({"cache_secret": "vcs_two"})("a") != salt("a")


def test_the_tenants_of_a_group_share_a_salt_and_nobody_else_has_it() -> None:
    tenants = [{"name": "a", "cache_group": "g"}, {"name": "b", "cache_group": "g"}, {"name": "g"}, {"name": "c"}]
    salt = salts({"cache_secret": "vcs_one", "tenants": tenants})
    assert salt("a") == salt("b")
    assert len({salt("a"), salt("g"), salt("c")}) == 3


def test_without_a_secret_tenants_are_apart_all_the_same() -> None:
    one, other = salts({}), salts({})
    assert one("a") == one("a")
    assert len({one("a"), one("b"), other("a"), hmac.new(b"", b"tenant:a", "sha256").hexdigest()[:32]}) == 4


def test_a_salt_is_made_once_for_a_snapshot() -> None:
    keys = table()
    assert keys.salt("a") is keys.salt("a")


@pytest.mark.parametrize(("of_route", "of_key", "expected"), [
    (None, None, "standard"), (None, "batch", "batch"), ("emergency", "batch", "emergency"),
    ("batch", "emergency", "batch"),
])  # fmt: skip
def test_the_class_is_the_routes_else_the_keys(of_route: str | None, of_key: str | None, expected: str) -> None:
    route = Route("r", "m", class_=of_route)
    key = Key("id", "", "t", class_=of_key) if of_key else Key("id", "", "t")
    assert route.class_for(key) == expected
