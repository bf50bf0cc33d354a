"""An engine that does nothing but write events when they are due, and knows when it did: what feeds a client that
reads more than a simulated engine can give.

    python -m tests.bench.pacer INTERVAL_SECONDS TOKENS GROUP     prints its address, then runs until its input ends

Each streamed completion gets TOKENS events, one every INTERVAL. GROUP streams share their moments, as those of one
engine do; groups are spread over the interval. Asked for `/log`, it gives a JSON line for every finished stream, as
the simulator's log has them: "x-request-id", "arrived", "written_times" (monotonic seconds), "completion_tokens".
"""

import contextlib
import heapq
import json
import select
import socket
import sys
import time

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
START = b'data: {"id":"cmpl-0","object":"text_completion","created":1,"model":"gpt-oss-20b","choices":'
EVENT = START + b'[{"index":0,"text":" carrying","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
LAST = START + b'[{"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def usage(tokens: int) -> bytes:
    told = b'{"prompt_tokens":600,"total_tokens":%d,"completion_tokens":%d}' % (600 + tokens, tokens)
    return START + b'[],"usage":' + told + b"}\n\n"


class Stream:
    """A connection, and the answer under way on it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.heard = b""
        self.identity = ""
        self.arrived = 0.0
        self.written: list[float] = []

    def request(self, data: bytes) -> str:
        """The path of a request that is now whole, else nothing."""
        self.heard += data
        head, found, body = self.heard.partition(b"\r\n\r\n")
        if not found:
            return ""
        fields = {}
        lines = head.decode("latin-1").split("\r\n")
        for line in lines[1:]:
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        if len(body) < int(fields.get("content-length", "0")):
            return ""
        self.heard = b""
        self.identity = fields.get("x-request-id", "")
        return lines[0].split(" ")[1]


class Pacer:
    """One thread: what is due is written, and between that what comes is read."""

    def __init__(self, interval: float, tokens: int, group: int) -> None:
        self.interval, self.tokens, self.group = interval, tokens, group
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.poll = select.epoll()
        self.poll.register(self.listener, select.EPOLLIN)
        self.poll.register(sys.stdin, select.EPOLLIN)
        self.streams: dict[int, Stream] = {}
        self.due: list[tuple[float, int]] = []
        self.told: list[bytes] = []
        self.began = time.monotonic()
        self.event = framed(EVENT)
        self.end = framed(LAST) + framed(usage(tokens)) + framed(DONE) + b"0\r\n\r\n"

    def run(self) -> None:
        print(self.listener.getsockname()[1], flush=True)
        while True:
            wait = self.due[0][0] - time.monotonic() if self.due else 1.0
            for descriptor, _ in self.poll.poll(max(0.0, wait)):
                if descriptor == sys.stdin.fileno():
                    return
                if descriptor == self.listener.fileno():
                    self.accept()
                else:
                    self.read(self.streams[descriptor])
            now = time.monotonic()
            while self.due and self.due[0][0] <= now:
                self.write(*heapq.heappop(self.due))

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.streams[connection.fileno()] = Stream(connection)
        self.poll.register(connection, select.EPOLLIN)

    def read(self, stream: Stream) -> None:
        now = time.monotonic()
        try:
            data = stream.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.leave(stream)
            return
        path = stream.request(data)
        if path == "/log":
            body = b"\n".join(self.told)
            stream.connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        elif path:
            stream.arrived, stream.written = now, []
            number = stream.connection.fileno()
            phase = (number // self.group * 0.37) % 1 * self.interval
            turns = int((now - self.began - phase) / self.interval) + 2
            heapq.heappush(self.due, (self.began + phase + turns * self.interval, number))

    def write(self, due: float, number: int) -> None:
        stream = self.streams.get(number)
        if stream is None:
            return
        piece = self.event if stream.written else HEAD + self.event
        ends = len(stream.written) + 1 == self.tokens
        stream.written.append(time.monotonic())
        try:
            sent = stream.connection.send(piece + self.end if ends else piece)
        except OSError:
            self.leave(stream)
            return
        if sent < len(piece):
            raise SystemExit("a client does not read")
        if ends:
            line = {"x-request-id": stream.identity, "arrived": stream.arrived, "written_times": stream.written,
                    "completion_tokens": self.tokens}  # fmt: skip
            self.told.append(json.dumps(line).encode())
        else:
            heapq.heappush(self.due, (due + self.interval, number))

    def leave(self, stream: Stream) -> None:
        with contextlib.suppress(OSError):
            self.poll.unregister(stream.connection)
        self.streams.pop(stream.connection.fileno(), None)
        stream.connection.close()


if __name__ == "__main__":
    Pacer(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])).run()
