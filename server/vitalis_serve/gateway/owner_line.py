"""What workers say to the one that owns admission, and what it answers. Off a request's way in a gateway of one worker.

Messages of one turn of the loop travel together: a msgpack list behind its length (four bytes, big-endian). All
clocks are CLOCK_MONOTONIC, which processes of one host share, so deadlines travel as they are.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Final

import msgspec

from vitalis_serve.gateway.limits import Claim
from vitalis_serve.gateway.seats import Demand

MAX_BYTES: Final = 64 << 20
_LENGTH: Final = struct.Struct(">I")


class Enter(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """`demand.waiter` is a number that the asking worker gave it; the same in all that follows."""

    demand: Demand


class Held(msgspec.Struct, array_like=True, frozen=True):
    """What an owner before this one granted, and is still in use. `first`: its first token has come."""

    demand: Demand
    replica: str
    incarnation: int
    first: bool


class Hello(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """The first word on a new connection."""

    worker: str
    held: list[Held]


class First(msgspec.Struct, array_like=True, tag=2, frozen=True):
    waiter: int


class Gone(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Out of the queue, or done: everything of it is given back."""

    waiter: int


class Settle(msgspec.Struct, array_like=True, tag=4, frozen=True):
    tenant: str
    class_: str
    difference: int
    weight: float


class Answered(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """To the circuit breaker; only while one is not closed or has failures in a row."""

    waiter: int


class Failed(msgspec.Struct, array_like=True, tag=6, frozen=True):
    waiter: int


class Granted(msgspec.Struct, array_like=True, tag=7, frozen=True):
    waiter: int
    replica: str
    incarnation: int
    reason: str


class Refused(msgspec.Struct, array_like=True, tag=8, frozen=True):
    """Not let in, or out of the queue without a slot: by the code of the error that its client is to get."""

    waiter: int
    code: str
    message: str
    retry_after: float


class Troubles(msgspec.Struct, array_like=True, tag=9, frozen=True):
    """Replicas with failures in a row, each with its breaker's state. Empty: all is well."""

    states: dict[str, str]


class Noted(msgspec.Struct, array_like=True, tag=10, frozen=True):
    """A request was running when an engine seemed to die (`killers.py`). Both ways: all workers are to know it."""

    replica: str
    incarnation: int
    digest: bytes
    length: int


class Cleared(msgspec.Struct, array_like=True, tag=11, frozen=True):
    """And came to a good end elsewhere."""

    digest: bytes


class Reserve(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """May this be, by its limits? `number`: the asking worker's, the same in all that follows."""

    number: int
    claim: Claim


class Reserved(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """It may. `lines`: of the answer's head."""

    number: int
    lines: bytes


class Unreserved(msgspec.Struct, array_like=True, tag=14, frozen=True):
    """It may not, by the code of the error that its client is to get."""

    number: int
    code: str
    message: str
    retry_after: float
    lines: bytes


class Settled(msgspec.Struct, array_like=True, tag=15, frozen=True):
    number: int
    tokens: int


class Released(msgspec.Struct, array_like=True, tag=16, frozen=True):
    """No engine ever got it."""

    number: int


class Kept(msgspec.Struct, array_like=True, frozen=True):
    """What an owner before this one let be, and still runs."""

    number: int
    claim: Claim


class Late(msgspec.Struct, array_like=True, frozen=True):
    """What ended while there was no owner, at `ended` (Unix seconds)."""

    claim: Claim
    tokens: int
    ended: float


class Limited(msgspec.Struct, array_like=True, tag=17, frozen=True):
    """Of limits, the first word on a new connection."""

    held: list[Kept]
    late: list[Late]


OfLimits = Reserve | Settled | Released | Limited
Message = (
    Enter | Hello | First | Gone | Settle | Answered | Failed | Granted | Refused | Troubles | Noted | Cleared
    | Reserve | Reserved | Unreserved | Settled | Released | Limited
)  # fmt: skip
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[Message]).decode


class Line(asyncio.Protocol):
    """One end of a connection between two workers. `on_message` hears each message, `on_lost` its end, once."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[["Line", Message], None],
        on_lost: Callable[["Line"], None],
        on_made: Callable[["Line"], None] | None = None,
    ) -> None:
        self._loop = loop
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_made = on_made
        self._transport: asyncio.Transport | None = None
        self._unsaid: list[Message] = []
        self._rest = b""

    def say(self, message: Message) -> None:
        if not self._unsaid:
            self._loop.call_soon(self._flush)
        self._unsaid.append(message)

    def close(self) -> None:
        """What was said before is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        unsaid, self._unsaid = self._unsaid, []
        if unsaid and self._transport is not None and not self._transport.is_closing():
            batch = _encode(unsaid)
            self._transport.write(_LENGTH.pack(len(batch)) + batch)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """A peer that is not one of ours loses its connection."""
        data = self._rest + data if self._rest else data
        at = 0
        while len(data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            end = at + _LENGTH.size + length
            if length > MAX_BYTES:
                self._break()
                return
            if end > len(data):
                break
            try:
                batch = _decode(data[at + _LENGTH.size : end])
            except msgspec.DecodeError:
                self._break()
                return
            at = end
            for message in batch:
                self._on_message(self, message)
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)

    def _break(self) -> None:
        self._rest = b""
        if self._transport is not None:
            self._transport.abort()
