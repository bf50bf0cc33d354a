"""The process: listeners, routes, the control route, signals, and its own death when told to die.

A second listener (`--control`) answers the same routes and never misbehaves: a test must reach an engine that refuses
connections or is silent.
"""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from typing import Any

import msgspec

from simulator.answers import prompt_tokens
from simulator.connection import Connection, Request
from simulator.engine import Engine
from simulator.exchange import Exchange
from simulator.journal import Journal
from simulator.options import VERSION, Options
from simulator.requests import APIS, Refused, Work, read_object, read_work, served_model
from simulator.rules import Rule, Rules, parse_rule
from simulator.shapes import encode, error_body

_Route = Callable[["Server", Connection, Request], None]
_BACKLOG = 2048
_BUSY = "The engine is currently busy. Please retry later."


class Server:
    """Everything one simulated engine owns."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.journal = Journal(options.log_path)
        self.engine = Engine(options, self.journal)
        self.rules = Rules()
        for rule in options.rules:
            self.rules.add(rule)
        self.connections: set[Connection] = set()
        self.stop = asyncio.Event()
        self.address = ""
        self.control_address = ""
        self._started = time.monotonic()
        self._born = int(time.time())
        self._listener: asyncio.AbstractServer | None = None
        self._bound: socket.socket
        self._port = options.port
        self._identities = f"{os.urandom(6).hex()}"
        self._loop = asyncio.get_running_loop()
        self._counts = dict.fromkeys(("connections", "requests", "finished", "aborted", "error"), 0)
        self._paths: dict[str, int] = {}
        self._apply()

    # the listeners

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT."""
        if self.options.control:
            self.control_address = await self._listen_for_control()
            print(f"control on {self.control_address}", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        if self.options.load_seconds and self.options.load_mode == "port":
            try:
                async with asyncio.timeout(self.options.load_seconds):
                    await self.stop.wait()
            except TimeoutError:
                pass
        if not self.stop.is_set():
            await self._open()
            print(f"listening on {self.address}", flush=True)
            await self.stop.wait()
        self._shut()
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # connections hear of their end, and their requests are logged
        await asyncio.sleep(0)
        self.journal.flush()

    async def _listen_for_control(self) -> str:
        host, _, port = self.options.control.rpartition(":")
        server = await self._loop.create_server(lambda: Connection(self, True), host or "127.0.0.1", int(port))
        bound = server.sockets[0].getsockname()
        return f"http://{bound[0]}:{bound[1]}"

    async def _open(self) -> None:
        def protocol() -> Connection:
            return Connection(self, False)

        if self.options.uds:
            _remove_socket(self.options.uds)
            own = socket.socket(socket.AF_UNIX)
            own.bind(self.options.uds)
            self._bound = own
            self._listener = await self._loop.create_unix_server(protocol, sock=own, backlog=_BACKLOG)
            self.address = f"unix:{self.options.uds}"
            return
        own = socket.socket(socket.AF_INET6 if ":" in self.options.host else socket.AF_INET)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((self.options.host, self._port))
        self._bound = own
        self._port = own.getsockname()[1]
        self._listener = await self._loop.create_server(protocol, sock=own, backlog=_BACKLOG)
        self.address = f"http://{self.options.host}:{self._port}"

    def _shut(self) -> None:
        if self._listener is not None:
            # uvloop closes the descriptor at the end of the turn; nobody may connect from this line on
            with contextlib.suppress(OSError):
                self._bound.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    async def _reopen(self) -> None:
        if self._listener is None and self.address:
            await self._open()

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGTERM and self.rules.has("ignore_sigterm"):
            return
        self.stop.set()

    # from connections

    def opened(self, connection: Connection) -> None:
        self.connections.add(connection)
        self._counts["connections"] += not connection.control

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if self.journal.pending:
            self.engine.flush_soon()

    def serve(self, connection: Connection, request: Request) -> None:
        """Answers a request, at once or by an exchange."""
        route = _ROUTES.get(request.path)
        if not connection.control:
            self._paths[request.path] = self._paths.get(request.path, 0) + 1
        if request.path in APIS and request.method == "POST" and self._allowed(request):
            self._generate(connection, request)
        elif not self._allowed(request):
            connection.answer(request, 401, b'{"error":"Unauthorized"}')
        elif route is None and request.path not in APIS:
            connection.answer(request, 404, b'{"detail":"Not Found"}')
        elif route is None or request.method != route[0]:
            allow = b"allow: %b\r\n" % (b"POST" if route is None else route[0].encode())
            connection.answer(request, 405, b'{"detail":"Method Not Allowed"}', extra=allow)
        else:
            lateness = self.rules.lateness if request.path in ("/health", "/metrics") else 0
            if lateness and not connection.control:
                self._loop.call_later(lateness, route[1], self, connection, request)
                return
            try:
                route[1](self, connection, request)
            except Refused as refused:
                connection.answer(request, refused.status, refused.body)

    def ended(self, exchange: Exchange, outcome: str, more: dict[str, Any]) -> None:
        """An exchange is over: counts and the log."""
        self._counts[outcome] += 1
        now = time.monotonic()
        work, sequence, request = exchange.work, exchange.sequence, exchange.request
        if outcome == "finished" and work is not None and sequence is not None:
            self.engine.measures.request(sequence, work.finish_reason, work.count, now)
        record = {
            "id": exchange.answer.id if exchange.answer else None,
            "path": request.path,
            "outcome": outcome,
            "misbehaviour": exchange.rule.kind if exchange.rule else None,
            "arrived": exchange.arrived,
            "scheduled": sequence.scheduled or None if sequence else None,
            "first_token": sequence.first_token or None if sequence else None,
            "finished": now,
            "prompt_tokens": sequence.prompt_tokens if sequence else 0,
            "cached_tokens": sequence.cached if sequence else 0,
            "completion_tokens": sequence.generated * sequence.width if sequence else 0,
            "finish_reason": work.finish_reason if work and outcome == "finished" else None,
            "stream": work.stream if work else None,
            "model": work.model if work else None,
            "events": exchange.events,
            "headers": sorted(name.decode("latin-1") for name, _ in request.headers),
            "x-request-id": request.header(b"x-request-id") or None,
            "x-vllm-priority": request.header(b"x-vllm-priority") or None,
            "fields": list(work.fields) if work else [],
            **more,
        }
        self.journal.add(record)
        self.engine.flush_soon()

    def _allowed(self, request: Request) -> bool:
        key = self.options.api_key
        return not key or not request.path.startswith("/v1/") or request.header(b"authorization") == f"Bearer {key}"

    # generation

    def _generate(self, connection: Connection, request: Request) -> None:
        self._counts["requests"] += 1
        self._die_if_told()
        rule = None
        if not connection.control and self.rules.rules:
            stream = b'"stream":true' in request.body.replace(b" ", b"")
            rule = self.rules.strike(request.path, stream, connection.answered > 0)
        exchange = Exchange(self, connection, request, rule)
        connection.take(exchange)
        if rule is not None and rule.kind == "delay":
            self._loop.call_later(rule.seconds, self._begin_late, exchange)
        elif rule is None or not exchange.strike_first(rule):
            self._begin(exchange)

    def _begin_late(self, exchange: Exchange) -> None:
        if not exchange.ended:
            self._begin(exchange)

    def _begin(self, exchange: Exchange) -> None:
        request = exchange.request
        try:
            if request.header(b"content-type").partition(";")[0].strip().lower() not in ("application/json", ""):
                raise Refused(400, "Unsupported Media Type: Only 'application/json' is allowed", "Bad Request")
            work = read_work(request.path, request.body, self.options)
        except Refused as refused:
            exchange.refuse(refused.status, refused.body)
            return
        if self.engine.full():
            self.engine.measures.rejected += 1
            exchange.refuse(503, error_body(503, _BUSY, "Service Unavailable"))
            return
        self._read_priority(work, request)
        exchange.start(work, request.header(b"x-request-id") or work.request_id or self._identity())

    @staticmethod
    def _read_priority(work: Work, request: Request) -> None:
        """The header beats the body's field; one that is no number is ignored, as vLLM does."""
        try:
            work.priority = int(request.header(b"x-vllm-priority") or work.priority)
        except ValueError:
            return

    def _identity(self) -> str:
        return f"{self._identities}{self._counts['requests']:020x}"

    # the control route

    def misbehave(self, connection: Connection, request: Request) -> None:
        """POST /sim/misbehave: adds a rule, or several in a list."""
        try:
            documents = [request.body]
            if request.body.lstrip().startswith(b"["):
                documents = [bytes(raw) for raw in msgspec.json.decode(request.body, type=list[msgspec.Raw])]
            rules = [parse_rule(document) for document in documents]
        except (ValueError, msgspec.MsgspecError) as error:
            connection.answer(request, 400, error_body(400, str(error), "BadRequestError"))
            return
        for rule in rules:
            self.rules.add(rule)
            self._apply(rule)
        connection.answer(request, 200, b'{"ok":true}')
        self._die_if_told()

    def _apply(self, rule: Rule | None = None) -> None:
        if self.engine.frozen != self.rules.has("freeze"):
            self.engine.freeze(self.rules.has("freeze"))
        if rule is not None and rule.kind == "refuse":
            self._shut()
            for connection in list(self.connections):
                if not connection.control and connection.answered and not connection.busy:
                    connection.close()
            if rule.seconds:
                self._loop.call_later(rule.seconds, self._stop_refusing, rule)

    def _stop_refusing(self, rule: Rule) -> None:
        if rule in self.rules.rules:
            self.rules.rules.remove(rule)
            self._spawn_reopen()

    def _spawn_reopen(self) -> None:
        self._reopen_task = self._loop.create_task(self._reopen())

    def reset(self, connection: Connection, request: Request) -> None:
        """POST /sim/reset: every rule is gone; the port is open again before the answer is sent."""
        self.rules.clear()
        self._apply()
        self._spawn_reopen()
        self._reopen_task.add_done_callback(lambda _: connection.answer(request, 200, b'{"ok":true}'))

    def _die_if_told(self) -> None:
        rule = self.rules.deadly(self._counts["requests"])
        if rule is None:
            return
        self.journal.flush()
        if rule.kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(rule.code)

    def state(self, connection: Connection, request: Request) -> None:
        """GET /sim/state: every count there is."""
        schedule, engine = self.engine.schedule, self.engine
        own = [open_one for open_one in self.connections if not open_one.control]
        document = {
            "pid": os.getpid(),
            "address": self.address,
            "uptime_seconds": time.monotonic() - self._started,
            "connections_opened": self._counts["connections"],
            "unsent_bytes": sum(one.transport.get_write_buffer_size() for one in self.connections if not one.gone),
            "connections_open": len(own),
            "requests_seen": self._counts["requests"],
            "requests_by_path": self._paths,
            "finished": self._counts["finished"],
            "aborts": self._counts["aborted"],
            "errors": self._counts["error"],
            "running": len(schedule.running),
            "waiting": schedule.waiting_count,
            "steps": engine.steps,
            "late_steps": engine.late_steps,
            "generation_tokens": schedule.generation_tokens,
            "prompt_tokens": schedule.prompt_tokens,
            "cached_tokens": schedule.cache_hits,
            "kv_blocks_used": schedule.blocks.used,
            "preemptions": schedule.preemptions,
            "frozen": engine.frozen,
            "hits": self.rules.hits,
            "rules": self.rules.rules,
        }
        connection.answer(request, 200, encode(document))

    # vLLM's own small routes

    def health(self, connection: Connection, request: Request) -> None:
        loading = (
            self.options.load_mode == "health"
            and time.monotonic() - self._started < self.options.load_seconds
        )  # fmt: skip
        connection.answer(request, 503 if loading or self.rules.has("unhealthy") else 200, b"")

    def metrics(self, connection: Connection, request: Request) -> None:
        page = self.engine.measures.page(self.options, self.engine.schedule)
        connection.answer(request, 200, page, b"text/plain; version=0.0.4; charset=utf-8")

    def models(self, connection: Connection, request: Request) -> None:
        models: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": self._born,
                "owned_by": "vllm",
                "root": name,
                "parent": None,
                "max_model_len": self.options.max_model_len,
                "permission": [],
            }
            for name in self.options.models
        ]
        connection.answer(request, 200, encode({"object": "list", "data": models}))

    def version(self, connection: Connection, request: Request) -> None:
        connection.answer(request, 200, encode({"version": VERSION}))

    def load(self, connection: Connection, request: Request) -> None:
        count = len(self.engine.schedule.running) + self.engine.schedule.waiting_count
        connection.answer(request, 200, encode({"server_load": count}))

    def count_tokens(self, connection: Connection, request: Request) -> None:
        fields = read_object(request.body)
        served_model(fields, self.options, required=True)
        text = bytes(fields["system"]) if "system" in fields else b""
        text += bytes(fields.get("messages", b""))
        connection.answer(request, 200, encode({"input_tokens": prompt_tokens(text)}))

    def tokenize(self, connection: Connection, request: Request) -> None:
        """Tokens are pieces of four bytes, numbered by those bytes, so that detokenize is exact for ASCII."""
        fields = read_object(request.body)
        served_model(fields, self.options)
        raw = fields.get("prompt", fields.get("messages"))
        if raw is None:
            raise Refused(400, "1 validation error:\n  Field required: 'prompt'", "Bad Request", "prompt")
        document = msgspec.json.decode(raw)
        text = document.encode() if isinstance(document, str) else bytes(raw)
        tokens = [int.from_bytes(text[at : at + 4], "big") for at in range(0, len(text), 4)]
        answer = {"count": len(tokens), "max_model_len": self.options.max_model_len, "tokens": tokens}
        connection.answer(request, 200, encode({**answer, "token_strs": None}))

    def detokenize(self, connection: Connection, request: Request) -> None:
        fields = read_object(request.body)
        served_model(fields, self.options)
        try:
            tokens = msgspec.json.decode(fields.get("tokens", b"null"), type=list[int])
            text = b"".join(token.to_bytes(4, "big").lstrip(b"\0") for token in tokens).decode(errors="replace")
        except (msgspec.MsgspecError, OverflowError):
            raise Refused(400, "1 validation error:\n  Field required: 'tokens'", "Bad Request", "tokens") from None
        connection.answer(request, 200, encode({"prompt": text}))


_ROUTES: dict[str, tuple[str, _Route]] = {
    "/health": ("GET", Server.health),
    "/metrics": ("GET", Server.metrics),
    "/v1/models": ("GET", Server.models),
    "/version": ("GET", Server.version),
    "/load": ("GET", Server.load),
    "/tokenize": ("POST", Server.tokenize),
    "/detokenize": ("POST", Server.detokenize),
    "/v1/messages/count_tokens": ("POST", Server.count_tokens),
    "/sim/misbehave": ("POST", Server.misbehave),
    "/sim/reset": ("POST", Server.reset),
    "/sim/state": ("GET", Server.state),
}


def _remove_socket(path: str) -> None:
    """Takes a dead server's socket file away: vLLM leaves one too."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        return
