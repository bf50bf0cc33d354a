"""A child process with its channel (a socketpair) and its output. Owns both ends' descriptors; decides
nothing."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from vitalis_serve.supervise.output import Output

KEEPER = str(Path(__file__).with_name("keeper.py"))


class Child:
    """Made by `keep` or `tether`; `close` when it has ended (and only then, or its channel's end kills
    it)."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        output: Output,
        output_fd: int,
    ) -> None:
        self._process = process
        self._reader, self._writer = channel
        self._output = output
        self._output_fd = output_fd
        self._hung_up = False
        asyncio.get_running_loop().add_reader(output_fd, self._on_output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, line: str) -> None:
        """Queues one line; a child that does not read is noticed by its silence, not here."""
        if not (self._hung_up or self._writer.is_closing()):
            self._writer.write(line.encode() + b"\n")

    async def lines(self) -> AsyncIterator[str]:
        """What it says on its channel, until it closes it. An absurdly long line ends it as well."""
        with contextlib.suppress(ConnectionError, ValueError):
            while line := await self._reader.readline():
                yield line.decode(errors="replace").rstrip("\n")

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def hang_up(self) -> None:
        """Ends our half of the channel, which means to every child of ours that it is to end at once. Closing it
        instead would be a reset to a child whose last words we have not read."""
        if not (self._hung_up or self._writer.is_closing()):
            self._hung_up = True
            self._writer.write_eof()

    def close(self) -> None:
        """Gives back the descriptors, after a last look at what it wrote."""
        self._on_output()
        self._stop_output()
        self._writer.close()

    def _on_output(self) -> None:
        if self._output_fd < 0:
            return
        try:
            data = os.read(self._output_fd, 1 << 18)
        except BlockingIOError:
            return
        if data:
            self._output.feed(data)
        else:
            self._stop_output()

    def _stop_output(self) -> None:
        if self._output_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._output_fd)
            os.close(self._output_fd)
            self._output_fd = -1


async def keep(argv: Sequence[str], environment: Mapping[str, str], output: Output) -> Child:
    """Starts `argv` below a keeper in a session of its own; the channel is the keeper's. Raises OSError."""
    return await _spawn(lambda fd: ["keep", str(fd), "--", *argv], environment, output, ())


async def tether(
    argv: Sequence[str],
    environment: Mapping[str, str],
    output: Output,
    *,
    variable: str,
    fds: Sequence[int] = (),
) -> Child:
    """Starts `argv`, tied to our life, with its end of the channel numbered in `variable`. Raises OSError."""

    def become(fd: int) -> list[str]:
        extended[variable] = str(fd)
        return ["tether", str(os.getpid()), "--", *argv]

    extended = dict(environment)
    return await _spawn(become, extended, output, fds)


async def _spawn(
    arguments: Callable[[int], list[str]], environment: Mapping[str, str], output: Output, fds: Sequence[int]
) -> Child:
    ours, theirs = socket.socketpair()
    output_read, output_write = os.pipe()
    os.set_blocking(output_read, False)
    try:
        # -I -S: the keeper must not trip over the engine's PYTHONPATH or site-packages.
        argv = [sys.executable, "-I", "-S", KEEPER, *arguments(theirs.fileno())]
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output_write,
            stderr=output_write,
            pass_fds=(theirs.fileno(), *fds),
            start_new_session=True,  # a terminal's Ctrl-C goes to the supervisor alone, who ends us in order
        )
    except BaseException:
        os.close(output_read)
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(output_write)
    try:
        channel = await asyncio.open_unix_connection(sock=ours)
    except BaseException:
        os.close(output_read)
        ours.close()
        process.kill()
        raise
    return Child(process, channel, output, output_read)
