"""When the kernel took bytes in: on real sockets."""

import socket
import time

import pytest
from vitalis_load import stamps


def test_the_age_of_what_waited_in_a_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        with other:
            assert stamps.ask_for(one)
            before = time.monotonic()
            other.sendall(b"a")
            time.sleep(0.2)
            _, ancillary, _, _ = one.recvmsg(10, stamps.SPACE)
            age = stamps.age(ancillary)
            assert 0.2 <= age <= time.monotonic() - before


def test_a_unix_socket_has_none() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert not stamps.ask_for(left)
        right.sendall(b"a")
        _, ancillary, _, _ = left.recvmsg(10, stamps.SPACE)
        assert stamps.age(ancillary) == 0


@pytest.mark.parametrize("stamp", [b"", b"12", (2**60).to_bytes(8, "little") + bytes(8)])
def test_what_is_no_stamp_or_of_the_future_is_no_age(stamp: bytes) -> None:
    assert stamps.age([(socket.SOL_SOCKET, 35, stamp)]) == 0
    assert stamps.age([(socket.SOL_SOCKET, 1, bytes(16))]) == 0
