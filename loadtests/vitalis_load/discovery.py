"""Finds a running `vitalis-serve up` or `gateway` by its data folder: its supervisor's socket says where everything is,
the files beside it hold the credentials."""

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec

from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.target import Target

ANSWER_SECONDS = 10
LONGEST_SOCKET_PATH = 104
FIRST_KEY = "first-key"
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


class Place(msgspec.Struct):
    host: str
    port: int


class Replica(msgspec.Struct):
    name: str
    address: str
    state: str = ""
    models: list[str] = []
    detail: str = ""  # why it failed


class Process(msgspec.Struct):
    name: str
    kind: str  # worker, control, engine
    pid: int | None


class Fleet(msgspec.Struct):
    replicas: list[Replica] = []


class Status(msgspec.Struct):
    """What a supervisor says of its tree; more is passed over."""

    gateway: Place
    control: Any = ""
    fleet: Fleet = msgspec.field(default_factory=Fleet)
    children: list[Process] = []
    pid: int = 0  # the supervisor's


def find(data_folder: Path, *, key: str = "", model: str = "") -> Target:
    """The server that runs on this data folder; its first key where none is given. Raises LoadFailure."""
    found = status(data_folder)
    host = EVERYWHERE.get(found.gateway.host, found.gateway.host)
    token = _read(data_folder / "control.token")
    return Target(
        url=f"http://{host}:{found.gateway.port}",
        model=model,
        keys={"": key or first_key(data_folder)},
        metrics_url=_read(data_folder / "control.address") if token else "",
        metrics_token=token,
        engines={replica.name: replica.address for replica in found.fleet.replicas},
        engine_pids={child.name: child.pid for child in found.children if child.kind == "engine" and child.pid},
    )


def first_key(data_folder: Path) -> str:
    """Raises LoadFailure where the server showed it on a terminal and kept it nowhere."""
    if found := os.environ.get("VITALIS_KEY") or _read(data_folder / FIRST_KEY):
        return found
    raise LoadFailure(
        f"no key: there is no {data_folder / FIRST_KEY}; paste the line `export VITALIS_KEY=...` that the first start "
        "has shown, or give --key-file or --key-env (`vitalis-serve keys create --tenant default` makes another key)",
        Exit.NO_TARGET,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise LoadFailure(
            f"{path} cannot be read ({error.strerror}): run this as the user that runs vitalis-serve", Exit.NO_TARGET
        ) from None


def _sockets(data_folder: Path) -> list[Path]:
    """Where the supervisor listens: below its data folder, or in a short stand-in where that path would be too long."""
    folder = data_folder.resolve() / "run"
    if len(os.fsencode(folder / "supervisor.sock")) < LONGEST_SOCKET_PATH:
        return [folder / "supervisor.sock"]
    name = hashlib.sha256(os.fsencode(data_folder.resolve())).hexdigest()[:16]
    bases = (os.environ.get("XDG_RUNTIME_DIR"), f"/tmp/vitalis-serve-{os.getuid()}")  # noqa: S108  only connected to
    return [Path(base) / f"vitalis-{name}" / "supervisor.sock" for base in bases if base]


def status(data_folder: Path) -> Status:
    """What the supervisor on this data folder says. Raises LoadFailure where none runs."""
    for path in _sockets(data_folder):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(ANSWER_SECONDS)
            channel.connect(str(path))
            channel.sendall(json.dumps({"command": "status"}).encode() + b"\n")
            with channel.makefile("rb") as lines:
                line = lines.readline()
            try:
                return msgspec.json.decode(line, type=Status)
            except msgspec.DecodeError as error:
                raise LoadFailure(
                    f"what listens at {path} is no supervisor that this program knows ({error}): give --url and "
                    "--key-file", Exit.NO_TARGET,
                ) from None  # fmt: skip
    raise LoadFailure(
        f"no server runs on the data folder {data_folder}: start one (make serve), name its folder with --data-folder, "
        "or give --url and --key-file",
        Exit.NO_TARGET,
    )
