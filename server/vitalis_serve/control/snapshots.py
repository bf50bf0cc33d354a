"""The one owner of what workers serve from: every change of tenants, keys and limits goes through here.

How it works: within the transaction that changes the store, the next version is counted, the snapshot is
made and written beside its file. Then the transaction commits, the file is moved into its place, the
workers get it. So a disk without room fails the change as a whole, and a version once seen is never used
for anything else.

Where several controls share one store (PostgreSQL), each looks every FOLLOW_SECONDS whether the version has moved, and
publishes what the others changed under the version that they gave it.
"""

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from vitalis_serve.control.files import publish, stage
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.control.workers import Workers
from vitalis_serve.errors import ServeError
from vitalis_serve.store.rates import Subject
from vitalis_serve.store.records import Change, Contents, Key, Store

logger = logging.getLogger(__name__)
T = TypeVar("T")

FOLLOW_SECONDS: Final = 0.3
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Snapshots:
    """Serialises changes, one at a time.

    `issuers`: whose tokens are taken, as `gateway/keys.py` reads them; asked for each snapshot, so whoever changes what
    it answers calls `republish`. `published` hears what the workers get, each time before they do.
    """

    def __init__(self, store: Store, workers: Workers, options: ControlOptions, cache_secret: str) -> None:
        """`cache_secret`: of the deployment; the workers salt each tenant's prefix cache with what they derive
        from it. A store that several share keeps the first that it is given, for all of them."""
        self._store = store
        self._workers = workers
        self._path = Path(options.snapshot_path)
        self._routes = [{**route.policy, "name": route.name, "model": route.model} for route in options.routes]
        self._cache_groups = {tenant: group for group, tenants in options.cache_groups.items() for tenant in tenants}
        self._weights = options.tenant_weights
        self._cache_secret = cache_secret
        self._shared = bool(options.database_url)
        self._contents = Contents((), ())
        self._lock = asyncio.Lock()
        self.issuers: Callable[[], list[dict[str, Any]]] = list
        self.published: Callable[[Contents], None] | None = None
        self.version = 0

    async def start(self) -> None:
        """Publishes what the store holds under a new version: the routes may be others than last time.

        A disk without room does not keep control from starting: the workers then get what the last version
        should be, and the file stays as it is. Raises ServeError if the store cannot even be read.
        """
        try:
            await self.change(self._first, above=_version_on_disk(self._path))
        except ServeError as error:
            logger.warning("the snapshot cannot be written", extra={"reason": error.message})
            version, contents = await self._store.contents()
            self._push(version, contents, self._body(version, contents))

    async def _first(self, change: Change) -> None:
        if self._shared:
            await change.share_cache_secret(self._cache_secret)

    async def republish(self) -> None:
        """Publishes again, because `issuers` answers something else. Without the store too, from what it held last:
        its version is then counted on when it is back."""
        try:
            await self.outgrow(self.version)
        except ServeError as error:
            logger.warning("published without the store", extra={"reason": error.message})
            async with self._lock:
                await self._publish(self.version + 1, self._contents)

    async def follow(self) -> None:
        """Publishes what other controls on the same store change, for ever. Where nobody else can, it ends."""
        away = not self._shared
        while self._shared:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.catch_up()
                away = False
            except ServeError as error:
                if not away:
                    logger.warning("the store does not say what others changed", extra={"reason": error.message})
                away = True

    async def catch_up(self) -> None:
        """Publishes what the store holds if its version is not ours. Raises ServeError if it cannot be read."""
        known = self.version
        version = await self._store.version()
        if version < known:  # it was put back to an older copy
            await self.outgrow(known)
        elif version > known:
            async with self._lock:
                version, contents = await self._store.contents()
                if version > self.version:
                    await self._publish(version, contents)

    async def outgrow(self, version: int) -> None:
        """Publishes the same contents under a version above `version`."""

        async def unchanged(_change: Change) -> None:
            return None

        await self.change(unchanged, above=version)

    async def overtaken(self, version: int) -> None:
        """A worker serves from a newer snapshot than ours: the store was put back to an older copy."""
        try:
            await self.outgrow(version)
        except ServeError as error:
            logger.warning("the snapshot cannot be written", extra={"reason": error.message})

    async def change(self, work: Callable[[Change], Awaitable[T]], *, above: int = 0) -> tuple[T, int]:
        """Does `work` in the store and publishes the outcome; returns its result and the snapshot's version.

        Returns when the change is committed and on disk, before the workers have it. Raises ServeError, from
        `work` or for want of a usable disk; then nothing has happened.
        """
        async with self._lock:
            staged: Path | None = None
            try:
                async with self._store.change() as change:
                    await change.alone()
                    result = await work(change)
                    version = await change.next_version(max(above, self.version))
                    contents = await change.contents()
                    body = self._body(version, contents)
                    staged = await asyncio.to_thread(stage, self._path, body)
            except OSError as error:
                raise _storage_error(error) from error
            except BaseException:
                if staged is not None:
                    staged.unlink(missing_ok=True)
                raise
            await asyncio.to_thread(self._move, staged)
            self._push(version, contents, body)
        return result, version

    async def _publish(self, version: int, contents: Contents) -> None:
        """What is in force already, so that no disk can keep it from the workers."""
        body = self._body(version, contents)
        try:
            await asyncio.to_thread(self._move, await asyncio.to_thread(stage, self._path, body))
        except OSError as error:
            logger.error("the snapshot file cannot be written", extra={"reason": str(error)})
        self._push(version, contents, body)

    def _move(self, staged: Path) -> None:
        try:
            publish(staged, self._path)
        except OSError as error:
            # Committed already: the workers must have it, whether their file says so or not.
            logger.error("the snapshot file cannot be replaced", extra={"reason": str(error)})

    def _push(self, version: int, contents: Contents, body: bytes) -> None:
        self.version = version
        self._contents = contents
        if self.published is not None:
            self.published(contents)
        self._workers.push(version, msgspec.Raw(body))

    def _configured(self, tenant: str) -> dict[str, str | float]:
        """What the configuration says of it."""
        group, weight = self._cache_groups.get(tenant), self._weights.get(tenant)
        return ({} if group is None else {"cache_group": group}) | ({} if weight is None else {"weight": weight})

    def _body(self, version: int, contents: Contents) -> bytes:
        def limited(kind: str, name: str) -> dict[str, dict[str, int]]:
            rates = contents.rates.get(Subject(kind, name))
            return {} if rates is None else {"rates": rates.given()}

        now = time.time()
        body: dict[str, Any] = {
            "version": version,
            "tenants": [
                {"name": t.name, "status": t.status, **self._configured(t.name), **limited("tenant", t.name)}
                for t in contents.tenants
            ],
            "keys": [{**_credential(key, now), **limited("key", key.id)} for key in contents.keys],
            "routes": [{**route, **limited("route", route["name"])} for route in self._routes],
            "cache_secret": contents.cache_secret or self._cache_secret,
        }
        if not self._routes:  # the engines say which there are
            rates = {name: rates.given() for (kind, name), rates in contents.rates.items() if kind == "route"}
            body |= {"route_rates": rates} if rates else {}
        if issuers := self.issuers():
            body["issuers"] = issuers
        return msgspec.json.encode(body)


def _credential(key: Key, now: float) -> dict[str, Any]:
    known = {
        "id": key.id,
        "digest": key.digest,
        "tenant": key.tenant,
        "scopes": key.scopes,
        "routes": key.routes,
        "class": key.class_,
        "expires_at": key.expires_at,
    }
    if key.old_digest is not None and key.old_until is not None and key.old_until > now:
        known |= {"old_digest": key.old_digest, "old_until": key.old_until}
    return known


def _version_on_disk(path: Path) -> int:
    """The version that workers may have read at their start; 0 if there is none to read."""
    try:
        found: Any = msgspec.json.decode(path.read_bytes())["version"]
        return int(found)
    except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
        return 0


def _storage_error(error: OSError) -> ServeError:
    if error.errno in _NO_ROOM:
        return ServeError("storage_full", f"the data folder has no room left ({error.strerror}); nothing was changed")
    return ServeError("store_unavailable", f"the data folder cannot be written ({error.strerror}); nothing was changed")
