"""How many tokens each key, tenant and route has used today and this month (UTC), as far as this host's spool knows.

Control counts the spool's files into `spent.json`, sums and how far each file was counted in one document that is
replaced as a whole, so that a record is in the sums or beyond the position, never both. Whoever owns the limits reads
it at its start, and the files from there on; it needs neither control nor the store.
"""

import contextlib
import datetime
import errno
import logging
import os
from pathlib import Path
from typing import Annotated, Final

import msgspec

from vitalis_serve.spool.reader import cuts, files, is_finished, scan
from vitalis_serve.spool.record import Closed

logger = logging.getLogger(__name__)

_DAYS_KEPT: Final = 8  # those nearest to today: a clock that was wrong for a while spoils no other day's sums
_MONTHS_KEPT: Final = 3
_GONE_KEPT: Final = 200  # positions of files that are not there (or whose disk is not, just now)
_RESERVE_BYTES: Final = 1 << 16
_LAST_DAY: Final = 2_932_896  # the end of the year 9999
_EPOCH: Final = datetime.date(1970, 1, 1)
_SEED_TRIES: Final = 20
_MOST_TOKENS: Final = 1 << 40  # of a request, whatever an engine says; millions of such still have a sum

Sums = dict[int, dict[str, int]]


class Counted(msgspec.Struct, array_like=True):
    """How far a file is in the sums. done: to its end, and so are its requests that were cut."""

    position: Annotated[int, msgspec.Meta(ge=0)] = 0
    done: bool = False


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    days: Sums  # by days since 1970-01-01
    months: Sums  # by months since January 1970
    files: dict[str, Counted]


def day_of(wall: float) -> int:
    """Days since 1970-01-01 UTC. wall: Unix seconds."""
    return min(max(0, int(wall // 86_400)), _LAST_DAY)


def month_of(day: int) -> int:
    """Months since January 1970."""
    date = _EPOCH + datetime.timedelta(days=day)
    return (date.year - 1970) * 12 + date.month - 1


def subjects(closed: Closed) -> tuple[str, ...]:
    """Whose use that is: `key:<id>`, `tenant:<name>`, `route:<name>`."""
    return f"key:{closed.key}", f"tenant:{closed.tenant}", f"route:{closed.route}"


class Spent:
    """The sums, one owner at a time; of `spent.json` control's ledger is. Blocks on the disk: from an event loop use
    `asyncio.to_thread`, one call after the other.

        spent = Spent.read(path)
        while not spent.advance(folder): ...    # each round, whether the store is there or not
        spent.write(path, time.time())
        # a file may be deleted once spent.covers(it) and the store has it too, in the order of `files(folder)`

    torn: places in finished files that held no record, as far as this object has read.
    """

    def __init__(self) -> None:
        self.torn = 0
        self._days: Sums = {}
        self._months: Sums = {}
        self._files: dict[str, Counted] = {}
        self._covered: set[str] = set()
        self._changed = True

    @classmethod
    def read(cls, path: Path) -> "Spent":
        """What the file says. Without one, or with one that cannot be read (said in the log), nothing was used and no
        spool file was counted."""
        spent = cls()
        try:
            document = msgspec.json.decode(path.read_bytes(), type=_Document)
        except FileNotFoundError:
            return spent
        except (OSError, ValueError) as error:
            logger.warning(
                "%s cannot be read (%s): budgets of this day and month start from what the spool still holds",
                path,
                error,
            )
            return spent
        spent._days = document.days
        spent._months = document.months
        spent._files = document.files
        spent._covered = {name for name, counted in document.files.items() if counted.done}
        spent._changed = False
        return spent

    def add(self, closed: Closed) -> None:
        """Counts one request, on the day on which it ended. `advance` does that for what stands in the spool."""
        tokens = min(closed.prompt_tokens + closed.completion_tokens, _MOST_TOKENS)
        if tokens <= 0:
            return
        self._changed = True
        day = day_of(closed.ended)
        for sums in (self._days.setdefault(day, {}), self._months.setdefault(month_of(day), {})):
            for subject in subjects(closed):
                sums[subject] = sums.get(subject, 0) + tokens

    def advance(self, folder: Path, limit: int = 20_000) -> bool:
        """Counts what the spool holds beyond the positions, cut requests of finished files too; about `limit` records
        at most. True when nothing was left. A file that cannot be read is left as it is (said in the log)."""
        try:
            found = files(folder)
        except OSError as error:
            logger.warning("%s cannot be read (%s); what it holds is not counted", folder, error.strerror)
            return True
        for path in found:
            counted = self._files.get(path.name) or Counted()
            try:
                while not counted.done:
                    if limit <= 0:
                        return False
                    read, end = self._count(path, counted, limit)
                    limit -= read
                    if end:
                        break
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("%s cannot be read (%s); its use is not counted", path, error.strerror)
        gone = self._files.keys() - {path.name for path in found}
        for name in [name for name in self._files if name in gone][:-_GONE_KEPT]:
            del self._files[name]
        return True

    def _count(self, path: Path, counted: Counted, limit: int) -> tuple[int, bool]:
        """How many records were read, and whether that is all for now. Sums and position move together or not at
        all."""
        finished = is_finished(path)
        found = scan(path, counted.position, finished=finished, limit=limit)
        done = finished and found.end
        closed = [record for record in found.records if isinstance(record, Closed)]
        if done:
            closed += cuts(path)
        for record in closed:
            self.add(record)
        self.torn += found.torn
        if done or found.position != counted.position:
            counted.position = found.position
            counted.done = done
            self._files[path.name] = counted
            self._changed = True
        return len(found.records), found.end

    def covers(self, path: Path) -> bool:
        """Whether `spent.json`, as it was last written or read, holds all of that file: it may go."""
        return path.name in self._covered

    def tokens(self, subject: str, day: int) -> tuple[int, int]:
        """What the subject used on that day, and in the month of that day."""
        return (
            self._days.get(day, {}).get(subject, 0),
            self._months.get(month_of(day), {}).get(subject, 0),
        )

    def today(self, now_wall: float) -> dict[str, tuple[int, int]]:
        """By subject: tokens of the day and of the month. now_wall: Unix seconds."""
        day = day_of(now_wall)
        named = self._days.get(day, {}).keys() | self._months.get(month_of(day), {}).keys()
        return {subject: self.tokens(subject, day) for subject in named}

    def write(self, path: Path, now_wall: float) -> None:
        """Replaces the file, durably, if anything changed. Sums of other times are forgotten. Raises OSError, and then
        the file is as it was, and so is what `covers` says."""
        today = day_of(now_wall)
        _keep_nearest(self._days, today, _DAYS_KEPT)
        _keep_nearest(self._months, month_of(today), _MONTHS_KEPT)
        if not self._changed:
            return
        content = msgspec.json.encode(_Document(1, self._days, self._months, self._files))
        # On a full disk nothing of the spool may go before this is written, so room for it is kept.
        reserve = path.with_name(f"{path.name}.reserve")
        try:
            _replace(path, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            reserve.unlink(missing_ok=True)
            _replace(path, content)
        self._changed = False
        self._covered = {name for name, counted in self._files.items() if counted.done}
        _keep_room(reserve, max(_RESERVE_BYTES, 2 * len(content)))


def seed(spent_path: Path, spool_folder: Path, now_wall: float) -> dict[str, tuple[int, int]]:
    """By subject (`key:<id>`, `tenant:<name>`, `route:<name>`): tokens used on this day and in this month, of all
    requests that had ended when it was called. Reads `spent.json` and the spool from its positions on; writes nothing
    and raises nothing. now_wall: Unix seconds."""
    for _ in range(_SEED_TRIES):
        before = _version(spent_path)
        spent = Spent.read(spent_path)
        while not spent.advance(spool_folder):
            pass
        # Replaced meanwhile: files that it covers may have been deleted before they were read here.
        if _version(spent_path) == before:
            break
    return spent.today(now_wall)


def _keep_nearest(sums: Sums, now: int, count: int) -> None:
    for when in sorted(sums, key=lambda when: abs(when - now))[count:]:
        del sums[when]


def _replace(path: Path, content: bytes) -> None:
    trial = path.with_name(f"{path.name}.new")
    try:
        with open(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(trial, path)
    except OSError:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _keep_room(path: Path, size: int) -> None:
    """Best effort: on a full disk there is none until something was deleted."""
    with contextlib.suppress(OSError):
        if path.exists() and path.stat().st_size >= size:
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
