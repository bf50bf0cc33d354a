"""A real `vitalis-serve gateway` before simulated engines on Unix sockets, and clients of every manner on threads."""

import contextlib
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import client, engines, gateway, simulator
from tests.support.engines import ROOT, Stack

ENGINES = 3
GAUGES = ("vitalis_open_contexts", "vitalis_in_flight", "vitalis_queued", "vitalis_body_bytes",
          "vitalis_client_connections")  # fmt: skip
SETTINGS = {
    "ENGINES_SLOTS": "4", "ENGINES_PROBE_SECONDS": "0.2", "ENGINES_HUNG_SECONDS": "5",
    "GATEWAY_QUEUE_MAX_REQUESTS": "12", "GATEWAY_QUEUE_MAX_SECONDS": "3", "GATEWAY_HEADER_SECONDS": "2",
    "GATEWAY_BODY_SECONDS": "2", "GATEWAY_DEADLINES_CONNECT_SECONDS": "1",
    "GATEWAY_DEADLINES_FIRST_TOKEN_SECONDS": "2", "GATEWAY_DEADLINES_IDLE_SECONDS": "2",
    "GATEWAY_DEADLINES_TOTAL_SECONDS": "20",
}  # fmt: skip


class Site:
    """The gateway (`stack`) and its engines, which keep their addresses when they are killed and started again."""

    def __init__(self, folder: Path, step_ms: float) -> None:
        self._flags = ("--decode-step-ms", str(step_ms))
        self.sockets = [folder / f"{index}.sock" for index in range(ENGINES)]
        self.engines = [simulator.start(*self._flags, uds=path) for path in self.sockets]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("VITALIS_")}
        environ |= {
            "PYTHONPATH": str(ROOT / "server"), "VITALIS_CONFIG": str(ROOT / "config" / "gpt-oss.yaml"),
            "VITALIS_DATA_FOLDER": str(folder / "var"), "VITALIS_GATEWAY_HOST": "127.0.0.1",
            "VITALIS_GATEWAY_PORT": "0", "VITALIS_CONTROL_PORT": "0",
            **{f"VITALIS_{name}": value for name, value in SETTINGS.items()},
        }  # fmt: skip
        where = [word for path in self.sockets for word in ("--engine", f"unix:{path}")]
        argv = (sys.executable, "-P", "-m", "vitalis_serve", "gateway", *where, "--model", gateway.MODEL)
        self.stack = Stack(folder, environ, argv)

    def restart(self, index: int, dead_seconds: float) -> None:
        """SIGKILL, and after a while the same engine at the same address."""
        self.engines[index].kill()
        self.engines[index].stop()
        time.sleep(dead_seconds)
        self.engines[index] = simulator.start(*self._flags, uds=self.sockets[index])

    def processes(self) -> dict[str, int]:
        """The gateway's own, by name."""
        assert self.stack.process is not None
        children = {
            child["name"]: child["pid"] for child in self.stack.status()["children"] if child["kind"] != "engine"
        }
        return {"supervisor": self.stack.process.pid, **children}

    def descriptors(self) -> dict[str, int]:
        """Of each process, without the worker's kept-alive connections to engines."""
        found = {name: len(open_files(pid)) for name, pid in self.processes().items()}
        found["worker-0"] -= int(self.stack.metrics().get("vitalis_upstream_connections", 0))
        return found

    def quiet(self, before: dict[str, int]) -> None:
        """Nothing is left of any request, here or in the engines, and no traceback was ever written."""
        engines.until(lambda: not any(self.gauges().values()), 30, "every gauge zero", every=0.2)
        for engine in self.engines:
            engine.wait_for(lambda state: not state["running"] and not state["waiting"], 30)
        least: dict[str, int] = {}  # a probe of the supervisor's, or our own question, may be open in any one look

        def back() -> bool:
            for name, count in self.descriptors().items():
                least[name] = min(count, least.get(name, count))
            return all(least[name] <= before[name] for name in before)

        try:
            engines.until(back, 30, "descriptors", every=0.5)
        except AssertionError:
            opened = {name: open_files(pid) for name, pid in self.processes().items()}
            raise AssertionError(f"descriptors: {before} before, {least} now: {opened}") from None
        for path in [self.stack.folder / "terminal.log", *(self.stack.data / "log").glob("*.log")]:
            assert "Traceback" not in path.read_text(), path.read_text()[-4000:]

    def gauges(self) -> dict[str, float]:
        said = self.stack.metrics()
        return {name: said[name] for name in GAUGES}


def open_files(pid: int) -> list[str]:
    """What its descriptors are, as /proc writes it."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return sorted(found)


@contextlib.contextmanager
def site(folder: Path, step_ms: float) -> Iterator[Site]:
    made = Site(folder, step_ms)
    try:
        made.stack.start()
        made.stack.wait_ready(ENGINES, 60)
        terminal = folder / "terminal.log"
        engines.until(lambda: "Ready. Try it:" in terminal.read_text(), 60, "the first key")
        yield made
    finally:
        with contextlib.ExitStack() as ends:
            for engine in made.engines:
                ends.callback(engine.stop)
            if made.stack.process is not None:
                ends.callback(made.stack.stop)


@dataclass
class Clients:
    """Threads that ask again and again until the with-block ends. `outcomes` counts what became of each request;
    what must not be stands in `wrong`. `breaks`: the worker is killed meanwhile, so connections may end."""

    site: Site
    manners: list[str]
    breaks: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # when a polite answer was whole, and seconds

    def __enter__(self) -> "Clients":
        self._url, self._auth = self.site.stack.url, {"authorization": f"Bearer {self.site.stack.key}"}
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(manner, random.Random(seat)))
            for seat, manner in enumerate(self.manners)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)

    def check(self) -> None:
        print(f"\n{dict(self.outcomes.most_common())}")
        assert not self.wrong, "\n".join(self.wrong[:10])

    def has(self, outcome: str, count: int) -> bool:
        return self.outcomes[outcome] >= count

    def _go_on(self, manner: str, dice: random.Random) -> None:
        behave: Callable[[random.Random], str] = getattr(self, f"_{manner}")
        while not self._over.is_set():
            try:
                outcome = behave(dice)
            except (client.Ended, ConnectionError) as exc:
                outcome = "broken"
                if not self.breaks:
                    self.wrong.append(f"{manner}: {exc!r}")
                time.sleep(0.05)
            except Exception as exc:  # noqa: BLE001 - told by `check`, on the test's thread
                outcome = "wrong"
                self.wrong.append(f"{manner}: {exc!r}"[:2000])
            self.outcomes[f"{manner} {outcome}"] += 1

    def _request(self, dice: random.Random, tokens: int, **more: bool) -> tuple[str, bytes]:
        api = dice.choice(gateway.APIS)
        salt = {"metadata": {"salt": str(dice.random())}} if api in ("chat", "responses") else {}
        return api, gateway.request(api, tokens=tokens, headers=self._auth, **more, **salt)

    def _polite(self, dice: random.Random) -> str:
        tokens, stream = dice.randint(1, 60), dice.random() < 0.6
        api, data = self._request(dice, tokens, stream=stream)
        began = time.monotonic()
        outcome = judge(api, client.ask(self._url, data, 25), stream, tokens)
        if outcome == "whole":
            self.latencies.append((time.monotonic(), time.monotonic() - began))
        return outcome

    def _slow(self, dice: random.Random) -> str:
        """Reads a long stream in sips, through a small buffer."""
        api, data = self._request(dice, 3000, stream=True)
        with client.connect(self._url, receive_buffer=4096) as wire:
            wire.send(data)
            head, body = wire.read_head(25), b""
            for piece in wire.body_pieces(head, 25):
                body += piece
                time.sleep(0.002 if dice.random() < 0.05 else 0)
        return judge(api, client.Response(head, body), head.status == 200, 3000)

    def _leaving(self, dice: random.Random) -> str:
        stage = dice.choice(["in the request", "at once", "waiting", "in the answer"])
        _, data = self._request(dice, 500, stream=dice.random() < 0.7)
        with client.connect(self._url) as wire:
            wire.send(data[: dice.randrange(1, len(data))] if stage == "in the request" else data)
            if stage == "waiting":
                time.sleep(dice.random() * 0.2)
            elif stage == "in the answer":
                wire.read_some(25)
            if dice.random() < 0.5:
                wire.reset()
        return stage

    def _stranger(self, dice: random.Random) -> str:
        api = dice.choice(gateway.APIS)
        answer = client.ask(self._url, gateway.request(api), 25)
        assert (answer.status, gateway.error_code(answer)) == (401, "invalid_key"), answer
        time.sleep(0.05)
        return "refused"

    def _garbage(self, dice: random.Random) -> str:
        """A spoilt request: half of it random bytes, or one place in its head or its body spoilt."""
        _, data = self._request(dice, 5)
        at = dice.randrange(len(data))
        data = data[:at] + dice.randbytes(dice.randint(1, 200)) + (data[at:] if dice.random() < 0.5 else b"")
        with client.connect(self._url) as wire:
            wire.send(data)
            with contextlib.suppress(OSError):
                wire.half_close()
            try:
                said = wire.read_to_end(25)
            except ConnectionResetError:  # closed on what it had not read
                return "reset"
        assert not said or 200 <= int(said[9:12]) < 505, said
        time.sleep(0.02)
        return said[9:12].decode() or "closed"


def judge(api: str, answer: client.Response, stream: bool, tokens: int) -> str:
    """What an answer is: whole and right, cut with an error, or refused; fails on what is none of these."""
    if answer.status != 200:
        assert answer.status in (502, 503, 504), answer
        assert answer.json["error"]["message"]
        return f"{answer.status} {gateway.error_code(answer)}"
    if not stream or gateway.looks_whole(api, answer.events):
        gateway.check_answer(api, answer, stream=stream, tokens=tokens)
        return "whole"
    assert gateway.terminal_error(api, answer.events)["message"]
    text = gateway.stream_text(api, [event for event in answer.events[:-1] if not gateway.broken(event)])
    assert gateway.expected_text(api, tokens).startswith(text), text[-200:]
    return "cut"
