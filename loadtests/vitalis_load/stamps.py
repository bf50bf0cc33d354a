"""When the kernel took an answer's bytes in, whenever this process got to them.

Engines give all their streams a token at the same moment, so a hundred greenlets have something to read at once: the
last of them would take its token for several milliseconds late. Linux notes when a TCP segment came (SO_TIMESTAMPNS,
socket(7)) and tells it with `recvmsg`, at the price of a plain `recv`. Unix sockets and TLS have no such stamps.
"""

import socket
import struct
import sys
import time
from collections.abc import Iterable

_TIMESPEC = struct.Struct("@qq")
# SO_TIMESTAMPNS and SCM_TIMESTAMPNS have the same number; Python's socket module names neither. 35 is Linux' for all
# but two dead architectures, and a timespec is two 64-bit numbers where pointers have 64 bits.
_NUMBER = 35
SPACE = socket.CMSG_SPACE(_TIMESPEC.size)


def ask_for(connection: socket.socket) -> bool:
    """Has the kernel stamp what comes on a TCP connection. False: it cannot."""
    if sys.platform != "linux" or sys.maxsize < 2**32 or connection.family == socket.AF_UNIX:
        return False
    try:
        connection.setsockopt(socket.SOL_SOCKET, _NUMBER, 1)
    except OSError:
        return False
    return True


def age(ancillary: Iterable[tuple[int, int, bytes]]) -> float:
    """Seconds since the bytes of a `recvmsg` came, the last of them; 0 where no stamp says it.

    Stamps are of the wall clock, which may be set meanwhile: the caller bounds what comes of it by what it knows."""
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == _NUMBER and len(value) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(value)
            passed: int = time.time_ns() - seconds * 1_000_000_000 - nanoseconds
            return max(0.0, passed / 1e9)
    return 0.0
