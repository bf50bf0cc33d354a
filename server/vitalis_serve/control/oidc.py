"""The keys of the OIDC issuers whose tokens are taken: fetched, kept, fetched again.

How it works: one task for each issuer asks for its keys every `refresh_seconds`, and at once where somebody presented
a key id that is not known, but so no more than once in ASKED_SECONDS. An issuer that is away, or answers nonsense,
costs nothing for `stale_seconds`: what it said last stays in force, over restarts too. Redirects are not followed, and
what an https issuer says of itself never leads to plain http.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec

from vitalis_serve.control.files import publish, stage
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.tokens import MAX_KEYS, Issuer, public_key

logger = logging.getLogger(__name__)

ASKED_SECONDS: Final = 10.0
MAX_BYTES: Final = 256 << 10
_ANSWER_SECONDS: Final = 10.0  # discovery and keys together
_RETRY_SECONDS: Final = 10.0  # doubled with each failure in a row
_LONGEST_RETRY_SECONDS: Final = 300.0
_DISCOVERY: Final = "/.well-known/openid-configuration"
# A proxy for the rest of the world has no way to this machine's own addresses.
_NO_PROXY: Final = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}


class _Unusable(Exception):
    """What an issuer answered, in words for the log."""


class _Kept(msgspec.Struct, frozen=True):
    """What an issuer said last. `fetched_at` in Unix seconds."""

    issuer: str
    jwks_uri: str
    fetched_at: float
    keys: tuple[dict[str, str], ...]


_KEPT: Final = msgspec.json.Decoder(dict[str, _Kept])


class _Watched:
    """One issuer."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.issuer = msgspec.convert(document, Issuer)
        self.jwks_uri: str = document.get("jwks_uri") or ""
        self.refresh_seconds = float(document.get("refresh_seconds", 3600))
        self.stale_seconds = float(document.get("stale_seconds", 86_400))
        self.kept: _Kept | None = None
        self.asked = asyncio.Event()
        self.asked_at = -ASKED_SECONDS  # when keys were last fetched because of that
        self.failures = 0

    @property
    def keys(self) -> tuple[dict[str, str], ...]:
        return self.kept.keys if self.kept is not None else ()

    @property
    def good_until(self) -> float:
        """Unix seconds; no longer than that do its keys hold without it."""
        return self.kept.fetched_at + self.refresh_seconds + self.stale_seconds if self.kept is not None else 0.0


class Issuers:
    """The one owner of their keys. `changed` is awaited when some issuer's keys are others than before."""

    def __init__(self, options: ControlOptions) -> None:
        self.changed: Callable[[], Awaitable[None]] | None = None
        self._path = Path(options.snapshot_path).with_name("oidc.json")
        self._watched = {document["name"]: _Watched(document) for document in options.issuers}
        self._recall()

    def current(self) -> list[Issuer]:
        """All of them, with the keys that hold now."""
        return [msgspec.structs.replace(one.issuer, keys=one.keys) for one in self._watched.values()]

    def documents(self) -> list[dict[str, Any]]:
        """As `current`, as JSON for the workers, who have no use for roles."""
        return [msgspec.to_builtins(msgspec.structs.replace(one, roles_claim=None, roles={})) for one in self.current()]

    def unknown_kid(self, name: str) -> None:
        """Somebody presented a token of that issuer with a key id that is not known here."""
        one = self._watched.get(name)
        if one is not None:
            one.asked.set()

    async def run(self) -> None:
        """Keeps every issuer's keys fresh, for ever; ends at once where there is no issuer."""
        if not self._watched:
            return
        async with (
            httpx.AsyncClient(timeout=5, follow_redirects=False, mounts=_NO_PROXY) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for one in self._watched.values():
                tasks.create_task(self._watch(one, client))

    async def _watch(self, one: _Watched, client: httpx.AsyncClient) -> None:
        while True:
            before = one.keys
            try:
                await self._refresh(one, client)
                if one.keys != before and self.changed is not None:
                    await self.changed()
            except Exception:  # the other issuers, and this one's next time, must not suffer for it
                logger.exception("refreshing an issuer's keys failed", extra={"issuer": one.issuer.name})
            one.asked.clear()
            rest = _rest(one, time.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await one.asked.wait()
                    await asyncio.sleep(one.asked_at + ASKED_SECONDS - time.monotonic())
                    one.asked_at = time.monotonic()

    async def _refresh(self, one: _Watched, client: httpx.AsyncClient) -> None:
        name = one.issuer.name
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                keys = await _fetch(one, client)
        except (_Unusable, httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError) as error:
            one.failures += 1
            if one.kept is not None and time.time() >= one.good_until:
                one.kept = None
                logger.error("an issuer has been away for too long: its tokens are refused", extra={"issuer": name})
            reason = str(error) or type(error).__name__
            if one.failures == 1:
                logger.warning("an issuer's keys cannot be fetched", extra={"issuer": name, "reason": reason})
            return
        if one.failures:
            logger.info("an issuer's keys are fetched again", extra={"issuer": name})
        one.failures = 0
        one.kept = _Kept(one.issuer.issuer, one.jwks_uri, time.time(), keys)
        await asyncio.to_thread(self._keep)

    def _keep(self) -> None:
        kept = {name: one.kept for name, one in self._watched.items() if one.kept is not None}
        try:
            publish(stage(self._path, msgspec.json.encode(kept)), self._path)
        except OSError as error:
            logger.warning("the issuers' keys cannot be kept", extra={"reason": str(error)})

    def _recall(self) -> None:
        if not self._watched:
            return
        try:
            kept = _KEPT.decode(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("the issuers' keys of the last run cannot be read", extra={"reason": str(error)})
            return
        for name, one in self._watched.items():
            found = kept.get(name)
            if found is not None and (found.issuer, found.jwks_uri) == (one.issuer.issuer, one.jwks_uri):
                one.kept = found
                if time.time() >= one.good_until:
                    one.kept = None


def _rest(one: _Watched, wall: float) -> float:
    """Seconds until the next fetch that nobody asks for."""
    if not one.failures:
        return one.refresh_seconds
    rest = min(_RETRY_SECONDS * 2.0 ** min(one.failures - 1, 10), _LONGEST_RETRY_SECONDS, one.refresh_seconds)
    if one.kept is not None:
        rest = min(rest, max(0.0, one.good_until - wall))
    return max(rest, 0.1)


async def _fetch(one: _Watched, client: httpx.AsyncClient) -> tuple[dict[str, str], ...]:
    plain = urlsplit(one.issuer.issuer).scheme == "http" or urlsplit(one.jwks_uri).scheme == "http"
    uri = one.jwks_uri or await _discover(one.issuer.issuer, client)
    _check(uri, plain)
    rows = (await _get(uri, client)).get("keys")
    if not isinstance(rows, list):
        raise _Unusable(f"{uri} is no set of keys")
    keys = [key for row in rows[: 4 * MAX_KEYS] if (key := public_key(row)) is not None]
    if not keys:
        raise _Unusable(f"{uri} holds no key that could verify a token here")
    if len(keys) > MAX_KEYS:
        logger.warning("an issuer has too many keys; the rest is ignored", extra={"issuer": one.issuer.name})
    return tuple(keys[:MAX_KEYS])


async def _discover(issuer: str, client: httpx.AsyncClient) -> str:
    where = issuer.rstrip("/") + _DISCOVERY
    document = await _get(where, client)
    if document.get("issuer") != issuer:
        raise _Unusable(f"{where} speaks of another issuer than {issuer}")
    uri = document.get("jwks_uri")
    if not isinstance(uri, str):
        raise _Unusable(f"{where} names no jwks_uri")
    return uri


def _check(uri: str, plain: bool) -> None:
    parts = urlsplit(uri)
    if parts.scheme == "https" or (parts.scheme == "http" and (plain or _is_loopback(parts.hostname or ""))):
        return
    raise _Unusable(f"{uri[:200]} is not https")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _get(uri: str, client: httpx.AsyncClient) -> dict[str, Any]:
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    async with client.stream("GET", uri, headers=headers) as response:
        if response.status_code != 200:
            raise _Unusable(f"{uri} answered with status {response.status_code}")
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > MAX_BYTES:
                raise _Unusable(f"{uri} is larger than {MAX_BYTES} bytes")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _Unusable(f"{uri} is not JSON") from None
    if not isinstance(document, dict):
        raise _Unusable(f"{uri} is no JSON object")
    return document
