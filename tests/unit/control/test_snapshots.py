"""What is published when: with the store away, put back, or changed by others. On real stores and files."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.control.snapshots import Snapshots
from vitalis_serve.control.workers import Workers
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.keys import KeyTable
from vitalis_serve.store.rates import Rates, Subject
from vitalis_serve.store.records import Change, Store, Tenant

from tests.support.control import control_options
from tests.support.stores import Place


def on_disk(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "snapshot.json").read_text())
    return document


def published(place: Place, work: Callable[[Snapshots, Snapshots], Awaitable[None]], **options: Any) -> Path:
    """`work` with the snapshots of two controls on one store; returns the first one's folder."""
    folders = [place.path.parent / name for name in ("a", "b")]

    async def run(store: Store) -> None:
        both = []
        for folder in folders:
            folder.mkdir()
            told = control_options(folder) | place.options() | {"routes": ()} | options
            both.append(Snapshots(store, Workers(), ControlOptions(**told), f"vcs_{folder.name}"))
            await both[-1].start()
        await work(both[0], both[1])

    place.with_store(run)
    return folders[0]


def test_what_another_control_changes_is_published_under_its_version(place: Place) -> None:
    async def work(ours: Snapshots, others: Snapshots) -> None:
        _, version = await others.change(lambda change: change.add_tenant(Tenant("acme", 1)))
        assert ours.version < version
        await ours.catch_up()
        assert ours.version == version

    folder = published(place, work)
    assert [tenant["name"] for tenant in on_disk(folder)["tenants"]] == ["acme"]
    other = on_disk(folder.parent / "b")
    assert on_disk(folder)["version"] == other["version"]
    # On a store of one's own the file is the secret's only place.
    assert (on_disk(folder)["cache_secret"], other["cache_secret"]) == ("vcs_a", "vcs_a" if place.url else "vcs_b")


def test_a_store_that_was_put_back_is_outgrown(place: Place) -> None:
    async def work(ours: Snapshots, _: Snapshots) -> None:
        await ours.outgrow(500)
        await asyncio.to_thread(place.run, "UPDATE state SET snapshot_version = 3")
        await ours.catch_up()
        assert ours.version == 502

    assert on_disk(published(place, work))["version"] == 502


def test_issuers_are_published_without_the_store_too(place: Place) -> None:
    """From what it held last; and what comes afterwards has a newer version."""
    issuers: list[dict[str, Any]] = []

    async def work(ours: Snapshots, _: Snapshots) -> None:
        ours.issuers = lambda: issuers
        await ours.change(lambda change: change.add_tenant(Tenant("acme", 1)))
        version = ours.version
        await asyncio.to_thread(place.run, "ALTER TABLE state RENAME TO away")
        issuers.append({"name": "sso", "issuer": "https://sso", "audience": ["v"], "algorithms": ["RS256"]})
        with pytest.raises(ServeError, match="the store cannot be used now"):
            await ours.catch_up()
        await ours.republish()
        body = on_disk(place.path.parent / "a")
        assert (body["version"], body["issuers"], body["tenants"][0]["name"]) == (version + 1, issuers, "acme")
        await asyncio.to_thread(place.run, "ALTER TABLE away RENAME TO state")
        await ours.catch_up()
        assert ours.version == version + 2

    published(place, work)


def test_limits_of_routes_that_engines_offer_reach_the_route(place: Place) -> None:
    async def limit(change: Change) -> None:
        await change.set_rates({Subject("route", "tiny"): Rates(concurrent=2)})

    async def work(ours: Snapshots, _: Snapshots) -> None:
        await ours.change(limit)

    table = KeyTable.decode((published(place, work) / "snapshot.json").read_bytes()).offering(["tiny", "other"])
    assert table.routes["tiny"].rates is not None
    assert table.routes["tiny"].rates.concurrent == 2
    assert table.routes["other"].rates is None
