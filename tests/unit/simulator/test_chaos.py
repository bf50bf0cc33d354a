"""The proxy that spoils connections, in front of a simulated engine."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import chaos, client, simulator
from tests.support.chaos import Proxy, Trouble
from tests.support.client import Ended

ASK = client.post(
    "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True, "sim_output_tokens": 40}
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with simulator.started() as engine:
        yield engine.address


@pytest.fixture
def proxy(address: str) -> Iterator[Proxy]:
    with chaos.Proxy(address) as running:
        yield running


def test_it_passes_everything(address: str, tmp_path: Path) -> None:
    with chaos.Proxy(address, uds=tmp_path / "proxy.sock") as proxy, client.connect(proxy.address) as wire:
        wire.send(ASK + ASK)
        first, second = wire.read_response(), wire.read_response()
        assert len(first.events) == len(second.events)
        assert proxy.bytes_up == 2 * len(ASK)
        assert proxy.connections == proxy.open == 1


def test_delay(proxy: Proxy) -> None:
    proxy.trouble = Trouble(delay_seconds=0.1, direction="up")
    before = time.monotonic()
    client.ask(proxy.address, ASK)
    assert time.monotonic() - before >= 0.1


def test_black_hole(proxy: Proxy) -> None:
    with client.connect(proxy.address) as wire:
        wire.send(client.get("/health"))
        assert wire.read_response().status == 200
        proxy.spoil_open(Trouble(black_hole=True))
        wire.send(client.get("/health"))
        assert wire.is_quiet(0.1)


def test_cut_and_reset_after_so_many_bytes(proxy: Proxy) -> None:
    proxy.trouble = Trouble(cut_after=1000)
    with client.connect(proxy.address) as wire:
        wire.send(ASK)
        assert len(wire.read_to_end()) == 1000
    proxy.trouble = Trouble(reset_after=1000)
    with client.connect(proxy.address) as wire:
        wire.send(ASK)
        with pytest.raises(ConnectionResetError):
            wire.read_to_end()
    proxy.trouble = Trouble(half_close_after=50)
    with client.connect(proxy.address) as wire:
        wire.send(ASK)
        with pytest.raises(Ended):
            wire.read_head()


def test_small_pieces_change_nothing(proxy: Proxy) -> None:
    proxy.trouble = Trouble(piece_bytes=7, direction="both")
    assert client.ask(proxy.address, ASK).events[-1].data == "[DONE]"
    proxy.trouble = Trouble(dribble=True)
    assert client.ask(proxy.address, client.get("/version")).json == {"version": "0.32.0"}


def test_refused_and_closed_on_command(proxy: Proxy) -> None:
    with client.connect(proxy.address) as wire:
        wire.send(client.get("/health"))
        wire.read_response()
        proxy.close_open(reset=True)
        with pytest.raises(ConnectionResetError):
            wire.read_to_end()
    proxy.trouble = Trouble(refuse=True)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.ask(proxy.address, ASK)
