"""Speaks the supervisor's protocol like a worker or control does; standard library only.

It writes every fleet it is told of to `<log>/<name>.fleets` (one JSON a line) and what it is told to do
to `<name>.told`. Its in-flight counts come from the file `<log>/in_flight.json`, so that a test can change them.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("log", type=Path)
parser.add_argument("--exit-at-start", type=int)
options = parser.parse_args()
if options.exit_at_start is not None:
    print("port 1 is in use", flush=True)
    sys.exit(options.exit_at_start)
channel = socket.socket(fileno=int(os.environ["VITALIS_SUPERVISOR_FD"]))
data = socket.socket(fileno=int(os.environ["VITALIS_DATA_FD"])) if "VITALIS_DATA_FD" in os.environ else None


def say(**message: object) -> None:
    with contextlib.suppress(OSError):  # gone; the next read says so
        channel.sendall(json.dumps(message).encode() + b"\n")


def note(suffix: str, line: str) -> None:
    with open(options.log / f"{options.name}.{suffix}", "a") as file:
        file.write(line + "\n")


def in_flight() -> dict[str, int]:
    try:
        return json.loads((options.log / "in_flight.json").read_text())
    except FileNotFoundError:
        return {}


def on_sigterm(*_: object) -> None:
    note("told", f"sigterm {time.monotonic()}")
    os._exit(0)


signal.signal(signal.SIGTERM, on_sigterm)
say(type="ready")
received = b""
drain_until = None
while True:
    say(type="heartbeat")
    watched = [channel] + ([data] if data else [])
    ready, _, _ = select.select(watched, [], [], 0.1)
    if data in ready:
        connection, _ = data.accept()
        connection.sendall(options.name.encode() + f" {os.getpid()}\n".encode())
        connection.close()
    if channel in ready:
        try:
            read = channel.recv(65536)
        except ConnectionResetError:  # the supervisor was killed with words of ours unread
            read = b""
        if not read:
            note("told", f"eof {time.monotonic()}")
            os._exit(0)
        *lines, received = (received + read).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["type"] == "fleet":
                note("fleets", json.dumps(message))
            elif message["type"] == "in_flight?":
                counts = in_flight()
                say(type="in_flight", count=sum(counts.values()), replicas=counts)
            else:
                note("told", f"{message['type']} {time.monotonic()}")
            if message["type"] == "drain":
                data = None
                drain_until = time.monotonic() + message["seconds"]
    if drain_until is not None and (not in_flight() or time.monotonic() > drain_until):
        drain_until = None
        say(type="drained")
