"""Changes of tenants and keys, on a real SQLite file and a real PostgreSQL."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import Act, Change, Key, Store, Tenant
from vitalis_serve.store.secrets import digest, new_key

from tests.support.stores import Place

ACME = Tenant("acme", 1000)


def key(key_id: str, **fields: Any) -> Key:
    return Key(**{"id": key_id, "tenant": "acme", "digest": digest(key_id), "created_at": 1000, **fields})


async def change(store: Store, *steps: Callable[[Change], Awaitable[Any]]) -> None:
    async with store.change() as transaction:
        for step in steps:
            await step(transaction)


def test_contents_leave_out_what_opens_nothing(place: Place) -> None:
    """A revoked key and the keys of a disabled tenant are not in it; an expired one is, to be told apart."""

    async def work(store: Store) -> list[str]:
        await change(
            store,
            lambda c: c.add_tenant(ACME),
            lambda c: c.add_tenant(Tenant("gone", 1)),
            lambda c: c.add_key(key("k1")),
            lambda c: c.add_key(key("k2")),
            lambda c: c.add_key(key("k3", expires_at=5)),
            lambda c: c.add_key(key("k4", tenant="gone")),
            lambda c: c.revoke_key("k2", 2000),
            lambda c: c.disable_tenant("gone"),
        )
        _, contents = await store.contents()
        assert [(t.name, t.status) for t in contents.tenants] == [("acme", "active"), ("gone", "disabled")]
        return [k.id for k in contents.keys]

    assert place.with_store(work) == ["k1", "k3"]


def test_key_comes_back_as_it_was_put_in(place: Place) -> None:
    made = key(
        "k1",
        name="n",
        class_="batch",
        scopes=("inference", "debug"),
        routes=("a", "b"),
        notes="x",
        expires_at=9,
    )

    async def work(store: Store) -> list[Key]:
        await change(store, lambda c: c.add_tenant(ACME), lambda c: c.add_key(made))
        return await store.keys("acme")

    assert place.with_store(work) == [made]


def test_failed_change_leaves_nothing(place: Place) -> None:
    async def work(store: Store) -> Any:
        with pytest.raises(ServeError, match="no tenant 'acmee'; did you mean 'acme'"):
            await change(
                store,
                lambda c: c.add_tenant(ACME),
                lambda c: c.record(Act(1, "me", "tenant.create", "acme", "here")),
                lambda c: c.next_version(),
                lambda c: c.add_key(key("k1", tenant="acmee")),
            )
        return await store.tenants(), await store.acts(10), (await store.contents())[0]

    assert place.with_store(work) == ([], [], 0)


def test_versions_only_grow(place: Place) -> None:
    async def work(store: Store) -> list[int]:
        async with store.change() as transaction:
            return [await transaction.next_version(above) for above in (0, 0, 70, 3)]

    assert place.with_store(work) == [1, 2, 71, 72]


def test_duplicate_tenant_is_refused(place: Place) -> None:
    async def work(store: Store) -> None:
        await change(store, lambda c: c.add_tenant(ACME))
        with pytest.raises(ServeError, match="'acme' already exists") as caught:
            await change(store, lambda c: c.add_tenant(ACME))
        assert caught.value.status == 409

    place.with_store(work)


def test_revoking_twice_keeps_the_first_time(place: Place) -> None:
    async def work(store: Store) -> int | None:
        await change(store, lambda c: c.add_tenant(ACME), lambda c: c.add_key(key("k1")))
        for now, already in ((5, False), (9, True)):
            async with store.change() as transaction:
                revoked, found = await transaction.revoke_key("k1", now)
            assert (revoked.revoked_at, found) == (5, already)
        return (await store.keys())[0].revoked_at

    assert place.with_store(work) == 5


def test_disabled_tenant_gets_no_new_key(place: Place) -> None:
    async def work(store: Store) -> None:
        await change(store, lambda c: c.add_tenant(ACME), lambda c: c.disable_tenant("acme"))
        with pytest.raises(ServeError, match="was revoked"):
            await change(store, lambda c: c.add_key(key("k1")))

    place.with_store(work)


def test_acts_come_newest_first_and_in_pages(place: Place) -> None:
    async def work(store: Store) -> list[str]:
        for n in range(5):
            act = Act(n, "me", "tenant.create", f"t{n}", "here", {"n": n})
            await change(store, lambda c, act=act: c.record(act))  # type: ignore[misc]
        first = await store.acts(2)
        return [a.subject for a in first + await store.acts(9, before=first[-1].id)]

    assert place.with_store(work) == ["t4", "t3", "t2", "t1", "t0"]


def test_new_keys_have_the_promised_form() -> None:
    made = new_key()
    prefix, key_id, secret = made.key.split("_")
    assert (prefix, key_id, len(key_id), len(secret)) == ("vts", made.id, 12, 40)
    assert secret.isalnum()
    assert secret.isascii()
    assert made.digest == digest(made.key)
    assert len({new_key().key for _ in range(100)}) == 100
