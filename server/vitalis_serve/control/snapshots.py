"""The one owner of what workers serve from: every change of tenants and keys goes through here.

How it works: within the transaction that changes the store, the next version is counted, the snapshot is
made and written beside its file. Then the transaction commits, the file is moved into its place, the
workers get it. So a disk without room fails the change as a whole, and a version once seen is never used
for anything else.
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from vitalis_serve.control.files import publish, stage
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.control.workers import Workers
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import Change, Contents, Store

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Snapshots:
    """Serialises changes, one at a time."""

    def __init__(self, store: Store, workers: Workers, options: ControlOptions, cache_secret: str) -> None:
        """`cache_secret`: of the deployment; the workers salt each tenant's prefix cache with what they derive
        from it."""
        self._store = store
        self._workers = workers
        self._path = Path(options.snapshot_path)
        self._routes = [{**route.policy, "name": route.name, "model": route.model} for route in options.routes]
        self._cache_groups = {tenant: group for group, tenants in options.cache_groups.items() for tenant in tenants}
        self._weights = options.tenant_weights
        self._cache_secret = cache_secret
        self._lock = asyncio.Lock()
        self.version = 0

    async def start(self) -> None:
        """Publishes what the store holds under a new version: the routes may be others than last time.

        A disk without room does not keep control from starting: the workers then get what the last version
        should be, and the file stays as it is. Raises ServeError if the store cannot even be read.
        """
        try:
            await self.outgrow(_version_on_disk(self._path))
        except ServeError as error:
            logger.warning("the snapshot cannot be written", extra={"reason": error.message})
            version, contents = await self._store.contents()
            self._push(version, self._body(version, contents))

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
                    result = await work(change)
                    version = await change.next_version(max(above, self.version))
                    body = self._body(version, await change.contents())
                    staged = await asyncio.to_thread(stage, self._path, body)
            except OSError as error:
                raise _storage_error(error) from error
            except BaseException:
                if staged is not None:
                    staged.unlink(missing_ok=True)
                raise
            await asyncio.to_thread(self._move, staged)
            self._push(version, body)
        return result, version

    def _move(self, staged: Path) -> None:
        try:
            publish(staged, self._path)
        except OSError as error:
            # Committed already: the workers must have it, whether their file says so or not.
            logger.error("the snapshot file cannot be replaced", extra={"reason": str(error)})

    def _push(self, version: int, body: bytes) -> None:
        self.version = version
        self._workers.push(version, msgspec.Raw(body))

    def _configured(self, tenant: str) -> dict[str, str | float]:
        """What the configuration says of it."""
        group, weight = self._cache_groups.get(tenant), self._weights.get(tenant)
        return ({} if group is None else {"cache_group": group}) | ({} if weight is None else {"weight": weight})

    def _body(self, version: int, contents: Contents) -> bytes:
        return msgspec.json.encode(
            {
                "version": version,
                "tenants": [{"name": t.name, "status": t.status, **self._configured(t.name)} for t in contents.tenants],
                "keys": [
                    {
                        "id": key.id,
                        "digest": key.digest,
                        "tenant": key.tenant,
                        "scopes": key.scopes,
                        "routes": key.routes,
                        "class": key.class_,
                        "expires_at": key.expires_at,
                    }
                    for key in contents.keys
                ],
                "routes": self._routes,
                "cache_secret": self._cache_secret,
            }
        )


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
