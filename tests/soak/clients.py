"""Clients of every manner, on threads: polite, slow, leaving, without a key, and with garbage."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.soak.site import Site
from tests.support import client, gateway


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
        self._url = self.site.stack.url
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
        """Each is another one: equal ones that met two dead engines would be refused."""
        api = dice.choice(gateway.APIS)
        salt: dict[str, Any] = {"metadata": {"user_id" if api == "messages" else "salt": str(dice.random())}}
        if api == "completions":
            salt = {"user": str(dice.random())}
        auth = {"authorization": f"Bearer {dice.choice(self.site.keys)}"}
        return api, gateway.request(api, tokens=tokens, headers=auth, **more, **salt)

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
