"""What the routes work with: changes, each with its audit row, and who asked for them."""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from typing import Any, Final, TypeVar

from fastapi import Request

from vitalis_serve.control import schemas
from vitalis_serve.control.ledger import Ledger
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.control.snapshots import Snapshots
from vitalis_serve.control.supervision import Supervision
from vitalis_serve.control.workers import Workers
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import Act, Change, Store

logger = logging.getLogger(__name__)
T = TypeVar("T")
PRINCIPAL: Final = "vitalis.principal"  # of a request's scope: who asks, where that is known
_WHO: Final = "control.token"


class Control:
    """What the routes work with. Built once, by `process.py`."""

    def __init__(
        self,
        options: ControlOptions,
        store: Store,
        workers: Workers,
        snapshots: Snapshots,
        supervision: Supervision,
        ledger: Ledger | None = None,
    ) -> None:
        """`ledger`: None where no use is recorded."""
        self.options = options
        self.store = store
        self.workers = workers
        self.snapshots = snapshots
        self.supervision = supervision
        self.ledger = ledger

    def route_names(self) -> set[str]:
        """Without routes of its own the gateway offers what the engines say that they serve."""
        return {route.name for route in self.options.routes} or {*self.supervision.fleet.models}

    async def change(
        self, act: Act | Callable[[T], Iterable[Act]], work: Callable[[Change], Awaitable[T]]
    ) -> tuple[T, int, bool]:
        """A change with its audit rows (those of its result, where that tells), published; and whether the workers
        have it yet."""

        async def recorded(change: Change) -> T:
            result = await work(change)
            await change.record(*([act] if isinstance(act, Act) else act(result)))
            return result

        result, version = await self.snapshots.change(recorded)
        applied = await self.workers.applied(version, self.options.workers, self.options.apply_seconds)
        return result, version, applied

    async def command(self, request: Request, document: dict[str, Any]) -> schemas.FleetDone:
        """A fleet command, in the audit table before it is sent and again with its outcome."""
        action = f"fleet.{document['command']}"
        subject = str(document.get("replica") or "fleet")
        details = {k: v for k, v in document.items() if k not in ("command", "replica")}
        await self._record(act(request, action, subject, details))
        outcome: dict[str, Any] = {"ok": False, "message": "not finished"}
        try:
            *progress, last = await self.supervision.command(document)
            outcome = {"ok": True, "message": str(last.get("message", ""))}
        except ServeError as error:
            outcome = {"ok": False, "message": error.message}
            raise
        finally:
            await self._record(act(request, f"{action}.done", subject, outcome))
        return schemas.FleetDone(
            message=str(outcome["message"]), progress=[str(line.get("message", "")) for line in progress]
        )

    async def _record(self, act: Act) -> None:
        """The log takes what the store cannot: a full disk must not keep anyone from draining a replica."""
        try:
            async with self.store.change() as change:
                await change.record(act)
        except ServeError as error:
            logger.error("audit row not stored", extra={"row": asdict(act), "reason": error.message})


def act(request: Request, action: str, subject: str, details: dict[str, Any] | None = None) -> Act:
    """The audit row of a request: who, what, when, from where."""
    peer = f"{request.client.host}:{request.client.port}" if request.client else "unknown"
    agent = request.headers.get("user-agent", "")
    who = str(request.scope.get(PRINCIPAL) or _WHO)
    subject = subject.replace("\0", "")[:128]
    return Act(int(time.time()), who[:128], action, subject, f"{peer} {agent}"[:256].rstrip(), details or {})
