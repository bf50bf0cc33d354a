"""Whom a run asks and with which key: what is given, what is found, and a sentence for what is missing."""

import json
import socket
import threading
from pathlib import Path

import pytest
from vitalis_load import discovery, options, plain_http, scenario
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.target import Target


@pytest.fixture
def data_folder(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Of a running supervisor, as far as its socket and its files go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "control.token").write_text("token\n")
    (tmp_path / "control.address").write_text("http://127.0.0.1:8081\n")
    (tmp_path / "first-key").write_text("vts_first\n")
    status = {
        "gateway": {"host": "0.0.0.0", "port": 8080}, "control": "http://127.0.0.1:8081", "done": True,
        "fleet": {"version": 3, "replicas": [{"name": "engine-0", "address": "unix:/run/e.sock", "state": "ready"}]},
    }  # fmt: skip
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(tmp_path / "run" / "supervisor.sock"))
    server.listen()

    def serve() -> None:
        while True:
            try:
                channel, _ = server.accept()
            except OSError:
                return
            with channel, channel.makefile("rb") as lines:
                assert json.loads(lines.readline()) == {"command": "status"}
                channel.sendall(json.dumps(status).encode() + b"\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield tmp_path
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def test_a_running_server_is_found_by_its_data_folder(data_folder: Path) -> None:
    assert options.target(None, data_folder=str(data_folder), environ={}) == Target(
        url="http://127.0.0.1:8080",
        keys={"": "vts_first"},
        metrics_url="http://127.0.0.1:8081",
        metrics_token="token",
        engines={"engine-0": "unix:/run/e.sock"},
    )


def test_a_key_of_one_s_own_goes_before_the_first(data_folder: Path) -> None:
    found = options.target(None, data_folder=str(data_folder), key_env="MINE", environ={"MINE": "vts_mine"})
    assert found.key("") == "vts_mine"
    (data_folder / "first-key").unlink()
    assert options.target(None, data_folder=str(data_folder), environ={"VITALIS_KEY": "v"}).key("") == "v"
    with pytest.raises(LoadFailure, match=r"no key: there is no .*first-key; paste the line") as raised:
        discovery.find(data_folder)
    assert raised.value.code == Exit.NO_TARGET


def test_a_server_that_does_not_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoadFailure, match=r"no server runs on the data folder .*: start one \(make serve\)") as raised:
        options.target(None, data_folder=str(tmp_path), environ={})
    assert raised.value.code == Exit.NO_TARGET


def test_tenants_have_keys_of_their_own() -> None:
    neighbours = scenario.load("noisy-neighbour")
    first, second = (label for label in neighbours.labels if label)
    environ = {"A": "key-a", neighbours.credential(second).env: "key-b", "RUN": "key-run"}
    found = options.target(
        neighbours, url="http://h:1/v1/", key_env="RUN", keys=[f"{first}=A"], environ=environ
    )  # fmt: skip
    assert found.url == "http://h:1"
    assert (found.key(first), found.key(second), found.key("")) == ("key-a", "key-b", "key-run")
    assert options.without_own_key(neighbours, found) == []
    alone = options.target(neighbours, url="http://h:1", key_env="RUN", environ={"RUN": "k"})
    assert options.without_own_key(neighbours, alone) == [first, second]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"url": "h:1"}, "is no address: give http://HOST:PORT"),
        ({"url": "http://h:port"}, "is no address"),
        ({"url": "http://h", "key_env": "NOWHERE"}, "the variable NOWHERE is not set"),
        ({"url": "http://h", "key_file": "/nowhere"}, r"the key file /nowhere cannot be read \(No such file"),
        ({"url": "http://h", "key_file": "/etc/passwd"}, "needs one key and nothing else"),
        ({"url": "http://h", "key_file": "a", "key_env": "b"}, "not both"),
        ({"url": "http://h", "keys": ["heavy"]}, "--keys heavy: give it as TENANT=VARIABLE"),
        ({"url": "http://h", "keys": ["nobody=HOME"]}, "the scenario has no tenant 'nobody'; it has none"),
        ({"url": "http://h", "engines": ["e0"]}, "--engine e0: give it as NAME=ADDRESS"),
    ],
)
def test_wrong_options_are_sentences(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(LoadFailure, match=sentence):
        options.target(scenario.load("short-chat"), environ={"HOME": "x"}, **given)  # type: ignore[arg-type]


def test_why_nobody_answers_is_told(tmp_path: Path) -> None:
    for url, why in (
        ("http://127.0.0.1:1", "connection refused"),
        ("http://no-such-host.invalid", "there is no host of that name"),
        (f"unix:{tmp_path}/no.sock", "no such file or directory"),
    ):
        with pytest.raises(OSError, match=r".*") as raised:
            plain_http.ask(url, "/v1/models", seconds=5)
        assert plain_http.reason(raised.value) == why
