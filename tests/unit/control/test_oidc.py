"""Issuers' keys, fetched from a real server on loopback that misbehaves on command."""

import asyncio
import contextlib
import json
import logging
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.control.oidc import Issuers
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.tokens import MAX_KEYS

from tests.support.control import SECONDS, control_options
from tests.support.issuer import DISCOVERY, JWKS, Issuer, jwk, running_issuer


@pytest.fixture
def site() -> Iterator[Issuer]:
    with running_issuer() as issuer:
        yield issuer


class Fetching:
    """An `Issuers` that runs, and how often it said that something changed."""

    def __init__(self, folder: Path, *entries: dict[str, Any]) -> None:
        self.issuers = Issuers(ControlOptions(**control_options(folder) | {"routes": (), "issuers": entries}))
        self.issuers.changed = self._changed
        self.changes = 0

    async def _changed(self) -> None:
        self.changes += 1

    def kids(self, name: str = "site") -> list[str | None]:
        return next([key.get("kid") for key in one.keys] for one in self.issuers.current() if one.name == name)


@contextlib.asynccontextmanager
async def fetching(folder: Path, *entries: dict[str, Any]) -> AsyncIterator[Fetching]:
    running = Fetching(folder, *entries)
    task = asyncio.create_task(running.issuers.run())
    try:
        yield running
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        await asyncio.sleep(0.01)


def test_keys_are_found_by_discovery_and_kept_for_the_next_start(tmp_path: Path, site: Issuer) -> None:
    site.published = [jwk("ES256", "one"), jwk("RS256", "rsa", alg="RS256", use="sig"), jwk("ES256", "no", use="enc")]

    async def first() -> None:
        async with fetching(tmp_path, site.options()) as running:
            assert running.kids() == []
            await until(lambda: running.changes == 1, "the first keys")
            assert running.kids() == ["one", "rsa"]

    async def second() -> None:
        site.go_away()
        async with fetching(tmp_path, site.options()) as running:
            assert running.kids() == ["one", "rsa"]  # before anything was fetched
            elsewhere = site.options() | {"jwks_uri": site.url + "/others"}
            assert Fetching(tmp_path, elsewhere).kids() == []  # what that one said was never heard

    asyncio.run(first())
    assert dict(site.fetches) == {DISCOVERY: 1, JWKS: 1}
    assert stat.S_IMODE((tmp_path / "oidc.json").stat().st_mode) == 0o600
    asyncio.run(second())


def test_a_jwks_uri_needs_no_discovery(tmp_path: Path, site: Issuer) -> None:
    async def run() -> None:
        entry = site.options(jwks_uri=site.url + JWKS) | {"issuer": "https://login.example.org"}
        async with fetching(tmp_path, entry) as running:
            await until(running.kids, "the keys")

    asyncio.run(run())
    assert dict(site.fetches) == {JWKS: 1}


def test_workers_get_no_roles(tmp_path: Path, site: Issuer) -> None:
    entry = site.options(roles_claim="roles", roles={"x": "admin"})
    running = Fetching(tmp_path, entry)
    assert running.issuers.current()[0].roles == {"x": "admin"}
    said = running.issuers.documents()[0]
    assert (said["roles_claim"], said["roles"], said["class"]) == (None, {}, "standard")


@pytest.mark.parametrize(("mode", "reason"), [
    ("garbage", "is not JSON"), ("error", "answered with status 500"), ("empty", "no key that could verify"),
    ("huge", "is larger than"), ("redirect", "answered with status 302"), ("foreign", "speaks of another issuer"),
    ("away", "connection"),
])  # fmt: skip
def test_an_issuer_that_answers_nonsense_keeps_what_it_said_before(
    tmp_path: Path, site: Issuer, mode: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vitalis_serve.control.oidc")

    def said(text: str) -> list[logging.LogRecord]:
        return [record for record in caplog.records if text in record.message]

    async def run() -> None:
        async with fetching(tmp_path, site.options(refresh_seconds=0.05)) as running:
            await until(running.kids, "the first keys")
            site.published = [jwk("ES256", "two", 1)]
            site.go_away() if mode == "away" else setattr(site, "mode", mode)
            await until(lambda: len(said("cannot be fetched")) == 1, "a word in the log")
            assert reason.lower() in str(said("cannot be fetched")[-1].__dict__["reason"]).lower()
            assert running.kids() in (["one"], ["two"])  # it may have been asked in between
            site.come_back() if mode == "away" else setattr(site, "mode", "well")
            await until(lambda: running.kids() == ["two"], "the new keys")
            await until(lambda: said("fetched again"), "a word in the log")
        assert "/elsewhere" not in site.fetches

    asyncio.run(run())


def test_what_is_stale_for_too_long_is_dropped(tmp_path: Path, site: Issuer) -> None:
    async def run() -> None:
        entry = site.options(refresh_seconds=0.05, stale_seconds=0.5)
        async with fetching(tmp_path, entry) as running:
            await until(running.kids, "the first keys")
            site.mode = "error"
            await until(lambda: not running.kids(), "the end of stale keys")
            await until(lambda: running.changes == 2, "a word of it")
            assert Fetching(tmp_path, entry).kids() == []  # a new start does not bring them back
            site.mode = "well"
            await until(lambda: running.changes > 2, "new keys")
            assert running.kids() == ["one"]

    asyncio.run(run())


def test_a_slow_issuer_keeps_nobody_waiting(tmp_path: Path, site: Issuer) -> None:
    async def run() -> None:
        with running_issuer() as quick:
            site.mode = "slow"
            entries = (site.options(), quick.options() | {"name": "quick"})
            async with fetching(tmp_path, *entries) as running:
                await until(lambda: running.kids("quick"), "the quick one's keys")
                assert running.kids() == []
                site.release.set()
                await until(running.kids, "the slow one's keys")

    asyncio.run(run())


def test_unknown_key_ids_have_keys_fetched_at_once_and_no_more_than_once(tmp_path: Path, site: Issuer) -> None:
    async def run() -> None:
        async with fetching(tmp_path, site.options()) as running:
            await until(running.kids, "the first keys")
            site.published = [jwk("ES256", "two", 1)]
            for _ in range(200):
                running.issuers.unknown_kid("site")
                running.issuers.unknown_kid("nobody")
                await asyncio.sleep(0.002)
            await until(lambda: running.kids() == ["two"], "the new keys")
        assert site.fetches[JWKS] == 2

    asyncio.run(run())


def test_the_number_of_keys_is_bounded(tmp_path: Path, site: Issuer) -> None:
    site.published = [jwk("EdDSA", f"k{n}") for n in range(MAX_KEYS + 10)]

    async def run() -> None:
        async with fetching(tmp_path, site.options()) as running:
            await until(running.kids, "the keys")
            assert len(running.kids()) == MAX_KEYS

    asyncio.run(run())


@pytest.mark.parametrize("content", [b"", b"{", b'{"site": 7}', b"[]"])
def test_a_file_that_is_spoilt_is_as_good_as_none(tmp_path: Path, site: Issuer, content: bytes) -> None:
    (tmp_path / "oidc.json").write_bytes(content)

    async def run() -> None:
        async with fetching(tmp_path, site.options()) as running:
            await until(running.kids, "the keys")

    asyncio.run(run())
    assert json.loads((tmp_path / "oidc.json").read_text())["site"]["keys"][0]["kid"] == "one"


def test_an_https_issuer_never_leads_to_plain_http(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is sent: what stands there is refused before."""
    from vitalis_serve.control import oidc

    for uri, plain, fine in (
        ("https://login.example.org/keys", False, True),
        ("http://login.example.org/keys", False, False),
        ("http://login.example.org/keys", True, True),
        ("http://127.0.0.1:1/keys", False, True),
        ("http://localhost/keys", False, True),
        ("http://localhost.example.org/keys", False, False),
        ("file:///etc/passwd", True, False),
        ("", True, False),
    ):
        with contextlib.nullcontext() if fine else pytest.raises(oidc._Unusable):
            oidc._check(uri, plain)
