"""The format of a spool file: records in frames, each with its length and checksum. Pure.

A file is made in its full size, so what follows the last frame is zeros. A frame is its payload's length (four bytes,
little-endian, never 0), the payload's CRC-32, and the payload: a record as msgpack.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Final

import msgspec

_HEAD: Final = struct.Struct("<II")
MAX_PAYLOAD_BYTES: Final = 4096  # a longer one is none: the file is damaged there
MAX_FRAME_BYTES: Final = 768  # none longer is written; more than names and ids of full length take together
_CUT_FIRST: Final = ("request_id", "model", "route", "api", "class_", "code", "outcome", "key", "tenant")
_LARGEST: Final = (1 << 63) - 1


class Opened(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """A request that an engine is about to get. Without a `Closed` of its id it was cut by the worker's death.

    id: ours, 16 bytes, unique for ever; a caller's request id is not. at: Unix seconds. prompt_tokens, output_tokens:
    what it is expected to use.
    """

    id: bytes
    at: float
    tenant: str
    key: str
    route: str
    model: str
    api: str
    class_: str
    request_id: str
    stream: bool
    prompt_tokens: int
    output_tokens: int


class Closed(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """A request that came to its end. outcome and code as the access log has them; status: of HTTP. Cached tokens are
    among the prompt's, reasoning ones among the completion's."""

    id: bytes
    began: float
    ended: float
    tenant: str
    key: str
    route: str
    model: str
    api: str
    class_: str
    request_id: str
    stream: bool
    outcome: str
    code: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    prompt_estimated: bool
    completion_estimated: bool


Record = Opened | Closed
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Record).decode


class Torn(Exception):
    """What stands there is no whole frame. `position`: where it begins. `past`: where the next one would be, if its
    length can be believed, else 0."""

    def __init__(self, position: int, past: int = 0) -> None:
        self.position = position
        self.past = past
        super().__init__(f"no whole record at byte {position}")


def frame(record: Record) -> bytes:
    """At most MAX_FRAME_BYTES: of a record that would be longer, texts are cut short, the caller's request id first and
    the tenant last."""
    try:
        payload = _encode(record)
    except (ValueError, OverflowError):  # half a surrogate pair; an integer beyond 64 bits
        payload = _shortened(record)
    if len(payload) > MAX_FRAME_BYTES - _HEAD.size:
        payload = _shortened(record)
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _shortened(record: Record) -> bytes:
    values: dict[str, object] = {}
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, str):
            values[name] = value.encode(errors="replace").decode()
        elif isinstance(value, int):
            values[name] = type(value)(max(-_LARGEST, min(value, _LARGEST)))
    for name in _CUT_FIRST:
        excess = len(_encode(msgspec.structs.replace(record, **values))) - (MAX_FRAME_BYTES - _HEAD.size)
        if excess <= 0:
            break
        if name in values:
            text = str(values[name]).encode()
            values[name] = text[: max(0, len(text) - excess)].decode(errors="ignore")
    return _encode(msgspec.structs.replace(record, **values))


def frames(content: bytes, position: int = 0) -> Iterator[tuple[int, Record]]:
    """Each record of a file from `position` on, with where it ends. Ends at the first zeros, or at the end of the
    content; raises Torn at what is neither, once what stands before it was yielded."""
    size = len(content)
    while position + _HEAD.size <= size:
        length, checksum = _HEAD.unpack_from(content, position)
        if not length:
            if checksum:
                raise Torn(position)
            return
        begin = position + _HEAD.size
        payload = content[begin : begin + length]
        if length > MAX_PAYLOAD_BYTES or len(payload) < length or zlib.crc32(payload) != checksum:
            raise Torn(position, begin + length if length <= MAX_PAYLOAD_BYTES else 0)
        try:
            record = _decode(payload)
        except msgspec.DecodeError as error:
            raise Torn(position, begin + length) from error
        position = begin + length
        yield position, record
