"""The control process: `python -m vitalis_serve.control.process OPTIONS.json`.

Started by the supervisor, with the channel to it in VITALIS_SUPERVISOR_FD; without that variable it runs
alone. Exit codes: 0 stopped, 2 unusable options, 3 could not start.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import uvicorn

from vitalis_serve import logs
from vitalis_serve.control.access import Access, Failures, control_token
from vitalis_serve.control.app import create_app
from vitalis_serve.control.changes import Control
from vitalis_serve.control.connections import BoundedProtocol
from vitalis_serve.control.files import kept_secret, publish, stage
from vitalis_serve.control.ledger import Ledger
from vitalis_serve.control.oidc import Issuers
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.control.snapshots import Snapshots
from vitalis_serve.control.supervision import Supervision
from vitalis_serve.control.workers import Workers
from vitalis_serve.errors import ConfigurationError, ServeError, StartError
from vitalis_serve.store.records import Store

logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Runs control until it is told to stop; returns the exit code."""
    # The database, its journal and the sockets hold secrets or open the way to them.
    os.umask(0o077)
    logs.configure()
    for library in ("alembic", "httpx", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        options = read_options(arguments)
        asyncio.run(run(options))
    except ConfigurationError as error:
        return _fail(error, 2)
    except StartError as error:
        return _fail(error, 3)
    return 0


def _fail(error: Exception, code: int) -> int:
    with contextlib.suppress(OSError):  # the log may lie on the disk that is full; the exit code still speaks
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
    return code


def read_options(arguments: list[str]) -> ControlOptions:
    """Raises ConfigurationError."""
    if len(arguments) != 1:
        raise ConfigurationError("give one argument, the file with control's options")
    try:
        return msgspec.json.decode(Path(arguments[0]).read_bytes(), type=ControlOptions)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"the options in {arguments[0]} cannot be used: {error}") from error


async def run(options: ControlOptions) -> None:
    """Opens everything, serves until SIGTERM or SIGINT, closes everything. Raises StartError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    access = Access(control_token(Path(options.token_path)), Failures())
    cache_secret = kept_secret(Path(options.cache_secret_path), "vcs_")
    listener = _bind(options.host, options.port)
    supervision = Supervision(options.supervisor_socket)
    workers = Workers()
    async with contextlib.AsyncExitStack() as closing:
        closing.callback(listener.close)
        channel = os.environ.get("VITALIS_SUPERVISOR_FD")
        if channel is not None:
            # First of all, so that a slow migration is not taken for a hung process.
            closing.callback(asyncio.create_task(supervision.run(int(channel))).cancel)
        store = await Store.open(Path(options.database_path), options.database_url, options.database_seconds)
        closing.push_async_callback(store.close)
        snapshots = Snapshots(store, workers, options, cache_secret)
        workers.overtaken = snapshots.overtaken
        snapshots.published = access.know
        issuers = _issuers(options, access, snapshots, workers)
        try:
            await snapshots.start()
            await workers.listen(Path(options.control_socket))
        except (ServeError, OSError) as error:
            raise StartError(f"control cannot start: {error}") from error
        closing.callback(asyncio.create_task(snapshots.follow()).cancel)
        closing.callback(asyncio.create_task(issuers.run()).cancel)
        closing.callback(Path(options.control_socket).unlink, missing_ok=True)
        closing.callback(workers.close)
        ledger = _ledger(options, store)
        if ledger is not None:
            ledger.start()
            closing.push_async_callback(ledger.close)
        app = create_app(Control(options, store, workers, snapshots, supervision, ledger), access)
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=3,
        )
        with _address(Path(options.address_path), listener):
            await _Server(config, stop, supervision).serve(sockets=[listener])


def _ledger(options: ControlOptions, store: Store) -> Ledger | None:
    if not options.spool_folder:
        return None
    spent_path = Path(options.spent_path) if options.spent_path else None
    return Ledger(store, Path(options.spool_folder), spent_path, options.keep_days, options.keep_daily_days)


def _issuers(options: ControlOptions, access: Access, snapshots: Snapshots, workers: Workers) -> Issuers:
    """Whose tokens are taken: told to the workers with each snapshot, and trusted here too."""
    issuers = Issuers(options)

    async def changed() -> None:
        access.trust(issuers.current())
        await snapshots.republish()

    access.trust(issuers.current())
    snapshots.issuers = issuers.documents
    issuers.changed = changed
    workers.unknown_kid = access.memory.on_unknown_kid = issuers.unknown_kid
    return issuers


class _Server(uvicorn.Server):
    """uvicorn's server without its ten wake-ups a second, and without its own ideas about signals."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event, supervision: Supervision) -> None:
        super().__init__(config)
        self._stop = stop
        self._supervision = supervision

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        self._supervision.ready()
        await self._stop.wait()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartError(
            f"control cannot listen on {host} port {port}: {_reason(error)}; stop what listens there, or set "
            "control.host and control.port to others"
        ) from error


def _reason(error: OSError) -> str:
    # asyncio and socket put the address into strerror; a failed look-up of a name has no errno of the system's.
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error)
    return os.strerror(error.errno)


@contextmanager
def _address(path: Path, listener: socket.socket) -> Iterator[None]:
    """Where control listens, told in a file for as long as it does."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    shown = f"[{reachable}]" if ":" in reachable else reachable
    try:
        publish(stage(path, f"http://{shown}:{port}\n".encode()), path)
    except OSError as error:
        logger.warning("the address file cannot be written", extra={"reason": str(error)})
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
