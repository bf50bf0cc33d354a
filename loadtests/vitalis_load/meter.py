"""What one process of the load generator has measured and not yet handed over, second by second. Pure."""

from collections.abc import Sequence

import msgspec

from vitalis_load.histograms import Histogram
from vitalis_load.records import ClientSecond, GapsOfSecond, Record

_encode = msgspec.json.Encoder().encode


class Batch(msgspec.Struct, kw_only=True):
    """Lines of the run folder's files, as they are written there, and counts for whoever watches."""

    process: int
    number: int  # from 0, of this process
    repeat: str = ""  # which repeat it is of: what comes late is of none that has begun since
    requests: bytes = b""
    gaps: bytes = b""
    client: bytes = b""
    in_flight: int = 0
    scheduled: int = 0  # all since the repeat began, as are the next ones
    ended: int = 0
    failed: int = 0
    tokens: int = 0  # of output
    behind: float = 0.0  # seconds that the request sent last was late
    idle: bool = False  # nothing in flight, and nothing more to come
    last: bool = False  # nothing more will be handed over


class Meter:
    """Counts for the process `process`. Times are seconds since the repeat began."""

    def __init__(self, process: int, repeat: str = "") -> None:
        self.process = process
        self.repeat = repeat
        self.in_flight = 0
        self.scheduled = 0
        self.ended = 0
        self.failed = 0
        self.tokens = 0
        self.behind = 0.0
        self._handed = 0
        self._records: list[bytes] = []
        self._gaps: dict[int, Histogram] = {}
        self._seconds: list[ClientSecond] = []
        self._marks = (0, 0, 0)  # scheduled, ended and chunks when the last second was closed
        self._chunks = 0

    def begin(self, late: float) -> None:
        """A request is about to be sent, `late` seconds after its time."""
        self.behind = late
        self.scheduled += 1
        self.in_flight += 1

    def gap(self, seconds: float, now: float) -> None:
        """Between two chunks of one answer, the second of which came `now`."""
        second = int(now)
        histogram = self._gaps.get(second)
        if histogram is None:
            histogram = self._gaps[second] = Histogram()
        histogram.add(seconds)

    def end(self, record: Record) -> None:
        """It ended, well or not, or was cut short by the run's end."""
        self.in_flight -= 1
        self._chunks += record.chunks
        if not record.unfinished:
            self.ended += 1
            self.failed += bool(record.error)
            self.tokens += record.completion_tokens or 0
        self._records.append(_encode(record))

    def second(self, at: int, cpu: float, loop_lag_ms: float, users: int, chunks_open: int = 0) -> None:
        """Closes the second `at`. `chunks_open`: chunks so far of requests still going."""
        chunks = self._chunks + chunks_open
        started, ended, before = self._marks
        self._seconds.append(
            ClientSecond(
                at=at,
                process=self.process,
                cpu=round(cpu, 4),
                loop_lag_ms=round(loop_lag_ms, 3),
                in_flight=self.in_flight,
                started=self.scheduled - started,
                ended=self.ended - ended,
                events=max(0, chunks - before),
                users=users,
            )
        )
        self._marks = (self.scheduled, self.ended, chunks)

    def batch(self, now: float, *, idle: bool = False, last: bool = False) -> Batch:
        """What came since the last batch. Gaps of the second that is not over stay until it is, or until the last."""
        open_second = int(now)
        done = sorted(second for second in self._gaps if last or second < open_second)
        made = Batch(
            process=self.process,
            number=self._handed,
            repeat=self.repeat,
            requests=_lines(self._records),
            gaps=_lines([_encode(self._gaps_of(second)) for second in done]),
            client=_lines([_encode(second) for second in self._seconds]),
            in_flight=self.in_flight,
            scheduled=self.scheduled,
            ended=self.ended,
            failed=self.failed,
            tokens=self.tokens,
            behind=self.behind,
            idle=idle,
            last=last,
        )
        self._handed += 1
        self._records, self._seconds = [], []
        return made

    def _gaps_of(self, second: int) -> GapsOfSecond:
        return GapsOfSecond(at=second, process=self.process, hdr=self._gaps.pop(second).encode())


def _lines(encoded: Sequence[bytes]) -> bytes:
    return b"".join([line + b"\n" for line in encoded])
