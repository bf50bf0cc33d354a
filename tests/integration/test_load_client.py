"""How true the load generator measures, against a simulated engine that logs every token; in their own environments."""

import json
import subprocess
from pathlib import Path

from tests.bench import load_client
from tests.support import loading


def test_what_is_measured_is_what_was(load_python: Path) -> None:
    """The 99th percentile and single milliseconds on a machine that others use are theirs; the bench shows them."""
    found = load_client.measure(load_python, 500, 1.0)
    assert found["failures"] == []
    assert found["requests"] >= 10
    assert found["tokens_told"] == found["tokens_made"] == found["tokens_logged"] == found["events"]
    for name in ("ttft", "gap", "tpot"):
        assert not load_client.off(found, name, "p50"), found
    assert 0 <= found["sending_min"] <= found["sending_p50"] < 0.01, found
    assert 0 <= found["reading_min"] <= found["reading_p50"] < 0.01, "nothing is seen before it was written"
    assert found["cpu"] < 0.9


CROWD = """
from gevent import monkey
monkey.patch_all()
import json
import sys
import time
import gevent
import gevent.socket
from vitalis_load import client, streams
from vitalis_load.wakes import Wakes

HEAD = b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"
CHUNK = b'data: {"choices":[{"text":"a","finish_reason":%b}]}\\n\\n'

def framed(data):
    return b"%x\\r\\n%b\\r\\n" % (len(data), data)

def busy(gap, now):
    until = time.monotonic() + 0.004
    while time.monotonic() < until:
        pass

def user(address, wakes):
    connection = client.Connection(address, wakes=wakes)
    reader = streams.reader("completions", True, busy)
    now = time.monotonic()
    record = connection.ask(b"x", reader, scheduled=now, deadline=now + 30, clock=time.monotonic)
    assert not record.error, record
    return record

def crowd(listener, address, wakes):
    listener.listen(100)
    users = [gevent.spawn(user, address, wakes) for _ in range(25)]
    ends = [listener.accept()[0] for _ in users]
    for end in ends:
        end.sendall(HEAD + framed(CHUNK % b"null"))
    gevent.sleep(0.1)
    at = time.monotonic()
    for end in ends:
        end.sendall(framed(CHUNK % b'"stop"' + b"data: [DONE]\\n\\n") + b"0\\r\\n\\r\\n")
    gevent.joinall(users, raise_error=True)
    return max(one.value.ended - at for one in users)

tcp = gevent.socket.socket()
tcp.bind(("127.0.0.1", 0))
unix = gevent.socket.socket(gevent.socket.AF_UNIX)
unix.bind(sys.argv[1])
unix_address = f"unix:{sys.argv[1]}"
print(json.dumps([
    crowd(tcp, f"http://127.0.0.1:{tcp.getsockname()[1]}", None),
    crowd(unix, unix_address, None),
    crowd(unix, unix_address, Wakes()),
]))
"""


def test_many_that_are_woken_at_once_are_not_taken_for_late(load_python: Path, tmp_path: Path) -> None:
    """25 streams get a chunk at once, and each takes 4 ms of the loop: the last has its turn after 100 ms."""
    said = subprocess.run(
        [str(load_python), "-c", CROWD, str(tmp_path / "s")], capture_output=True, text=True, check=False, timeout=60,
        env=loading.environment(),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    by_stamp, by_turn, by_wake = json.loads(said.stdout)
    assert by_turn > 0.09
    assert by_wake < by_turn / 2
    assert by_stamp < by_turn / 2
