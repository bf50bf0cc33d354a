"""Stands between the supervisor and one child, so that nothing of the child's tree can outlive its purpose.

    python -I -S keeper.py keep FD -- ARGV...     a process for an engine; FD is a socket to the supervisor
    python -I -S keeper.py tether PARENT -- ARGV...   become ARGV, tied to the life of process PARENT

Standard library only and run as a file, so that it costs a few MB and milliseconds. `keep` is a session
leader and a child subreaper: whatever below it loses its parent comes to it, whatever group or session it has
moved to. So when the direct child dies (kill -9 of vLLM's API server orphans its workers), when the
supervisor says so, or when the supervisor's end of the socket closes, everything below is killed and reaped.
Should the keeper itself be killed, the kernel kills the direct child (PR_SET_PDEATHSIG) and the supervisor
sweeps the rest (`orphans.py`).

On the socket, one line each. From the supervisor: `stop SECONDS` (SIGTERM to the child, SIGKILL to all after
that), `kill`. To it: `started PID`, `exited CODE` (negative for a signal) once all are gone, `error TEXT`.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def descendants(root: int) -> list[int]:
    """Every living process below `root`, found in /proc by parent; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # The name stands in parentheses and may hold anything, so what follows its last one counts.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue  # it ended while we looked
        if state != b"Z":
            children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


class Keeper:
    """Owns the child: `run` returns when nothing of its tree is left."""

    def __init__(self, channel: socket.socket, argv: list[str]) -> None:
        self.channel = channel
        self.argv = argv
        self.child = 0
        self.code: int | None = None
        self.kill_at: float | None = None
        self.received = b""

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.channel.sendall(line.encode(errors="replace") + b"\n")

    def run(self) -> int:
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        # Handlers that do nothing, because an ignored signal would stay ignored in the child after exec. A
        # terminal's or service manager's signal to the whole group is not ours to act on: the supervisor
        # decides the order.
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            self.spawn()
        except OSError as exc:
            self.say(f"error {self.argv[0]}: {exc.strerror}")
            return 127
        self.say(f"started {self.child}")
        self.watch(wake_read)
        self.destroy()
        self.say(f"exited {self.code}")
        return 0

    def spawn(self) -> None:
        keeper = os.getpid()

        def tie() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:  # it died before the line above
                os.kill(os.getpid(), signal.SIGKILL)

        # This process has one thread, so preexec_fn is safe here.
        # It is kept: a Popen that is dropped reaps the child itself, and its code would be lost.
        self.process = subprocess.Popen(self.argv, process_group=0, preexec_fn=tie)
        self.child = self.process.pid

    def watch(self, wake: int) -> None:
        """Until the child has ended, or everything is to be killed."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN | select.POLLRDHUP)
        poll.register(wake, select.POLLIN)
        while not self.reap():
            timeout = None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic()) * 1000
            ready = dict(poll.poll(timeout))
            if self.channel.fileno() in ready and not self.listen():
                return
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                return

    def listen(self) -> bool:
        """Obeys the supervisor; False where all are to be killed now."""
        try:
            read = self.channel.recv(4096)
        except OSError:
            read = b""
        if not read:
            return False
        *lines, self.received = (self.received + read).split(b"\n")
        for line in lines:
            word, _, argument = line.partition(b" ")
            if word == b"kill":
                return False
            if word == b"stop" and self.code is None:
                self.kill_at = time.monotonic() + float(argument)
                os.kill(self.child, signal.SIGTERM)
        return True

    def reap(self) -> bool:
        """Collects what has ended; True once the direct child has. It is told from adopted orphans by its
        pid."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return self.code is not None
            if pid == self.child:
                self.code = os.waitstatus_to_exitcode(status)

    def destroy(self) -> None:
        """SIGKILL to the group and to every descendant until none is left (at most 10 s: one may hang in a
        driver)."""
        deadline = time.monotonic() + 10
        pause = 0.005
        while time.monotonic() < deadline:
            if self.code is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.child, signal.SIGKILL)
            left = descendants(os.getpid())
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if not left and self.code is not None:
                return
            time.sleep(pause)
            pause = min(pause * 2, 0.1)


def main() -> int:
    mode, number, separator, *argv = sys.argv[1:]
    assert separator == "--"
    if mode == "tether":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(number):
            return 1
        try:
            os.execvp(argv[0], argv)  # noqa: S606
        except OSError as exc:
            sys.exit(f"{argv[0]}: {exc.strerror}")
    return Keeper(socket.socket(fileno=int(number)), argv).run()


if __name__ == "__main__":
    sys.exit(main())
