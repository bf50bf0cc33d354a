"""The ledger: what workers leave in the spool goes to the store, every request once.

How it works: every half second the spool's files are read from where the store has them (`undrained.py`); rows and the
new positions are one transaction (`store/usage.py`). Whatever fails or is killed, the positions in the store say where
to go on. After any failure they are asked for anew: whether the last transaction happened may not be known. The sums
for who counts limits (`spool/spent.py`) are kept beside that with positions of their own, store or no store. A file
is deleted when both have all of it.
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Final

from vitalis_serve.control.undrained import FINISHED, Batch, Depth, Undrained
from vitalis_serve.errors import ServeError
from vitalis_serve.spool.reader import files
from vitalis_serve.spool.spent import Spent
from vitalis_serve.store.records import Store
from vitalis_serve.store.usage import Moved

logger = logging.getLogger(__name__)

ROUND_SECONDS: Final = 0.5
MOST_BACK_OFF_SECONDS: Final = 5.0
MOST_ROWS: Final = 1000
STOP_SECONDS: Final = 2.0
# How often: sums on the disk (fsync), drained files, retention.
SPENT_SECONDS: Final = 5.0
DELETE_SECONDS: Final = 10.0
KEEP_SECONDS: Final = 3600.0
RETRY_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.05  # between two steps of a roll-up, for whoever else wants to write
_SPENT_STEP: Final = 2000
_DAY: Final = 86_400
_MARKS_KEPT: Final = _DAY  # after its file was deleted: a disk or a folder may come back as it was
_STRANGE_MARKS_KEPT: Final = 400 * _DAY  # of hosts that may never come back


class Ledger:
    """Counts since its start: drained (requests stored), duplicates (stored before), cut, torn (places in the spool
    that held no record), rolled_up. `away`: the store does not take what is there."""

    def __init__(
        self, store: Store, folder: Path, spent_path: Path | None, keep_days: int, keep_daily_days: int
    ) -> None:
        """`keep_days`, `keep_daily_days`: of single requests and of their sums; 0 for ever."""
        self.drained_total = self.duplicates = self.cut = self.torn = self.rolled_up = 0
        self.away = False
        self._store = store
        self._spool = Undrained(folder)
        self._folder = folder
        self._spent_path = spent_path
        self._spent: Spent | None = None
        self._spent_unwritten = False
        self._keep_days = keep_days
        self._keep_daily_days = keep_daily_days
        self._known = False
        self._stored = False  # anything, since the store was asked last how far it has each file
        self._since = 0.0
        self._depth = Depth(0, 0, 0.0)
        self._ready = asyncio.Event()  # positions were known once
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._keep_small())]

    async def close(self) -> None:
        """Drains once more, for 2 s at most. What then waits is drained after the next start."""
        self._stopping = True
        self._wake.set()
        await asyncio.wait(self._tasks[:1], timeout=STOP_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drained(self, seconds: float) -> Depth:
        """Returns when all that is in the spool now has been drained, or could not be, or after `seconds`; with what
        waits then."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        await asyncio.wait([waiter], timeout=seconds)
        return self._depth

    def figures(self) -> dict[str, float]:
        """By metric."""
        return {
            "vitalis_spool_bytes": self._depth.bytes,
            "vitalis_spool_records": self._depth.records,
            "vitalis_spool_oldest_seconds": self._depth.oldest_seconds,
            "vitalis_ledger_drained_total": self.drained_total,
            "vitalis_ledger_duplicates_total": self.duplicates,
            "vitalis_ledger_cut_total": self.cut,
            "vitalis_ledger_torn_total": self.torn,
            "vitalis_ledger_rolled_up_total": self.rolled_up,
            "vitalis_ledger_store_away": float(self.away),
        }

    async def _run(self) -> None:
        pause = ROUND_SECONDS
        spent_at = deleted_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()
            waiters, self._waiters = self._waiters, []
            last = self._stopping
            well = await self._round()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
            pause = ROUND_SECONDS if well else min(pause * 2, MOST_BACK_OFF_SECONDS)
            now = time.monotonic()
            if last or now >= spent_at:
                spent_at = now + SPENT_SECONDS
                await self._spend()
            if last:
                return
            if now >= deleted_at:
                deleted_at = now + DELETE_SECONDS
                await self._delete()

    async def _round(self) -> bool:
        """Whether all that was there is in the store."""
        try:
            await self._drain()
        except Moved:
            # Another control drains the same folder: an old one that has not ended yet.
            self._known = False
            return False
        except (ServeError, OSError) as error:
            self._known = False
            self._went(error.message if isinstance(error, ServeError) else str(error))
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._spool.count)
            self._depth = self._spool.depth(time.time())
            return False
        except Exception:
            self._known = False
            logger.exception("the ledger goes on after an error of its own")
            return False
        self._spool.nothing_waits()
        self._depth = Depth(0, 0, 0.0)
        self._came_back()
        return True

    async def _drain(self) -> None:
        usage = self._store.usage
        if not self._known:
            await self._learn()
        while True:
            batch: Batch = await asyncio.to_thread(self._spool.batch, MOST_ROWS)
            if batch.marks:
                new = await usage.add(batch.rows, batch.marks, int(time.time()))
                self._spool.stored(batch)
                self._stored = True
                self._came_back()
                self.drained_total += new
                self.duplicates += len(batch.rows) - new
                self.cut += batch.cut
                self.torn += batch.torn
            if not batch.more:
                return
            # A backlog: how long it is belongs to what is told of it.
            if not await asyncio.to_thread(self._spool.count):
                await asyncio.sleep(0)
            self._depth = self._spool.depth(time.time())

    async def _learn(self) -> None:
        """How far the store has each file."""
        self._known = False
        marks = await self._store.usage.positions(await asyncio.to_thread(self._spool.prefix))
        self._spool.knows({name: position for name, (position, _) in marks.items()})
        self._known = True
        self._stored = False
        self._ready.set()

    def _went(self, reason: str) -> None:
        if not self.away:
            self.away = True
            self._since = time.monotonic()
            logger.error("usage cannot be stored; it waits on the disk and is tried again", extra={"reason": reason})

    def _came_back(self) -> None:
        if self.away:
            self.away = False
            seconds = round(time.monotonic() - self._since, 1)
            logger.warning("usage is stored again", extra={"seconds": seconds})

    async def _spend(self) -> None:
        if self._spent_path is None:
            return
        try:
            if self._spent is None:
                self._spent = await asyncio.to_thread(Spent.read, self._spent_path)
            while not await asyncio.to_thread(self._spent.advance, self._folder, _SPENT_STEP):
                if self._stopping:
                    break
            await asyncio.to_thread(self._spent.write, self._spent_path, time.time())
            self._spent_unwritten = False
        except OSError as error:
            if not self._spent_unwritten:
                logger.warning("the sums for limits cannot be written", extra={"reason": str(error)})
            self._spent_unwritten = True
        except Exception:
            logger.exception("the ledger goes on after an error of its own")

    async def _delete(self) -> None:
        """Deletes files once nobody needs them, and the store has just said so: one that was restarted may have lost
        its last commits (PostgreSQL with `synchronous_commit` off), which are then drained again."""
        spent = self._spent
        if not self._known or (self._spent_path is not None and spent is None):
            return
        try:
            if not self._stored and not await asyncio.to_thread(self._unneeded, spent):
                return
            await self._learn()
            for path in await asyncio.to_thread(self._unneeded, spent):
                await asyncio.to_thread(path.unlink, missing_ok=True)
        except ServeError:
            pass  # and `_known` is false
        except OSError as error:
            logger.warning("a drained spool file cannot be deleted", extra={"reason": str(error)})
        except Exception:
            logger.exception("the ledger goes on after an error of its own")

    def _unneeded(self, spent: Spent | None) -> list[Path]:
        return self._spool.unneeded(time.time(), lambda path: spent is None or spent.covers(path))

    async def _keep_small(self) -> None:
        """Retention, at the start and then each hour. What fails is tried again sooner: after 1 s, 2 s, 4 s ..."""
        await self._ready.wait()
        again = RETRY_SECONDS
        while True:
            pause = min(again, KEEP_SECONDS)
            again *= 2
            try:
                await self._roll_up()
                await self._forget()
                pause, again = KEEP_SECONDS, RETRY_SECONDS
            except ServeError as error:
                logger.warning("usage is not rolled up", extra={"reason": error.message, "again_seconds": pause})
            except Exception:
                logger.exception("usage is not rolled up", extra={"again_seconds": pause})
            await asyncio.sleep(pause)

    async def _roll_up(self) -> None:
        today = int(time.time()) // _DAY
        usage = self._store.usage
        if self._keep_days:
            before = today - self._keep_days
            while moved := await usage.roll_up(before):
                self.rolled_up += moved
                await asyncio.sleep(_PAUSE_SECONDS)
        if self._keep_daily_days:
            await usage.drop_sums(today - self._keep_daily_days)

    async def _forget(self) -> None:
        """Marks of files that were deleted go when even a restored disk is unlikely to bring the files back."""
        now = int(time.time())
        there = {path.name for path in await asyncio.to_thread(files, self._folder)}
        gone = self._spool.gone(there)
        marks = await self._store.usage.positions(self._spool.prefix())
        old = {
            name for name in gone & marks.keys() if marks[name][0] == FINISHED and marks[name][1] < now - _MARKS_KEPT
        }
        if old:
            await self._store.usage.forget(sorted(old))
            self._spool.forgot(old)
        await self._store.usage.forget_before(now - _STRANGE_MARKS_KEPT)
