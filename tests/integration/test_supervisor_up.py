"""`vitalis-serve up` and `gateway` as people start them, with the simulated engine in vLLM's place."""

import http.client
import json
import os
import pty
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.supervise import folders, orphans

from tests.support import simulator
from tests.support.installation import COMMAND, ENVIRONMENT, ROOT, Installation


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path)
    yield made
    made.stop()


def test_up_serves_what_it_prints_and_leaves_nothing(ours):
    """The curl line and the Python snippet are pasted as they stand."""
    ours.start("up")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    key_file = ours.var / "first-key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    key = key_file.read_text().strip()
    assert key.startswith("vts_")
    assert key not in ours.said()
    curl = next(line for line in ours.said().splitlines() if line.startswith("curl "))
    shown = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=30).stdout
    answer = json.loads(shown)["choices"][0]["message"]["content"]
    assert answer
    snippet = ours.said().partition("in Python:\n\n")[2].partition("\n\n")[0]
    pasted = subprocess.run([sys.executable, "-"], input=snippet, capture_output=True, text=True, timeout=60)
    assert pasted.stdout.split()[:3] == answer.split()[:3], pasted.stderr

    status = ours.ask("fleet", "status", "--json")
    children = {c["name"]: c["state"] for c in json.loads(status.stdout)["children"]}
    assert children == {"worker-0": "ready", "control": "ready", "engine-0": "ready"}
    assert "engine-0" in ours.ask("fleet", "status").stdout
    smoke = ours.ask("smoke", "--json")
    assert smoke.returncode == 0, smoke.stderr
    assert [chat["ok"] for chat in json.loads(smoke.stdout)] == [True, True]

    assert ours.stop() == 0
    assert not [path for path in (ours.var / "run").iterdir() if path.suffix == ".sock" or path.name == "lock"]
    assert "Traceback" not in ours.said()


def test_a_refused_second_start_changes_nothing_of_the_first(ours):
    """Its options would be read by the next worker that is replaced."""
    ours.start("up")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    files = {path: path.read_bytes() for path in (ours.var / "run").glob("*.json")}
    assert files
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["gateway"]["max_body_bytes"] = 4096
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    done = ours.ask("up")
    assert done.returncode == 3
    assert "already runs" in done.stderr
    assert {path: path.read_bytes() for path in (ours.var / "run").glob("*.json")} == files


def test_doctor_knows_the_ports_of_its_own_installation(ours):
    """While it runs they are in use as they should be; another's are not."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [each.getsockname()[1] for each in (first, second)]
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["gateway"]["port"], document["control"]["port"] = ports
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    ours.start("up")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    found = {finding["what"]: finding for finding in json.loads(ours.ask("doctor", "--json").stdout)}
    for what, port in zip(("gateway port", "control port"), ports, strict=True):
        assert found[what]["state"] == "ok", found[what]
        assert found[what]["detail"] == f"127.0.0.1:{port} is in use by this installation (running)"
    document["data_folder"] = str(ours.folder / "another")
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    done = ours.ask("doctor", "--json")
    assert done.returncode == 1
    states = {finding["what"]: finding["state"] for finding in json.loads(done.stdout)}
    assert (states["gateway port"], states["control port"]) == ("failed", "failed")


def test_a_second_start_makes_no_second_key(ours):
    for _ in range(2):
        ours.start("up")
        ours.until(lambda: "Ready. Try it:" in ours.said())
        key = (ours.var / "first-key").read_text()
        ours.stop()
        assert (ours.var / "first-key").read_text() == key
        first = ours.said()
        ours.out.write_text("")
    assert "The first key" not in first


def test_on_a_terminal_what_is_shown_works_when_pasted_and_the_key_is_kept_nowhere(ours):
    """Into a second shell: the export line, README's smoke, the curl line and the Python snippet, all as they stand."""
    master, terminal = pty.openpty()
    ours.start("up", terminal=terminal)
    os.close(terminal)
    shown = ""
    while "print(client" not in shown:
        shown += os.read(master, 4096).decode().replace("\r\n", "\n")
    early, requests = shown.split("Ready. Try it:")
    export = re.search(r"^ *(export VITALIS_KEY=vts_\w+)$", early, re.MULTILINE)[1]
    key = export.partition("=")[2]
    assert not (ours.var / "first-key").exists()
    assert key not in ours.said()
    assert requests.count(key) == 1
    readme = (ROOT / "README.md").read_text().partition("A second shell")[2]
    smoke = next(line.strip() for line in readme.splitlines() if "vitalis-serve smoke" in line)
    assert "`export VITALIS_KEY=...`" in readme.partition(smoke)[0]
    smoke = smoke.replace(".venv/bin/vitalis-serve", shlex.join(COMMAND))

    def paste(*lines: str) -> "subprocess.CompletedProcess[str]":
        environment = {**ENVIRONMENT, "VITALIS_CONFIG": str(ours.folder / "c.yaml")}
        typed = "".join(f"{line}\n" for line in lines)
        return subprocess.run(["bash"], input=typed, env=environment, capture_output=True, text=True, timeout=60)

    smoked = paste(export, smoke)
    assert smoked.returncode == 0, smoked.stderr
    assert smoked.stdout.count(" ok ") == 2
    assert "paste the line `export VITALIS_KEY=...`" in paste(smoke).stderr
    in_shell, _, in_python = requests.partition("\n\nor, with `pip install openai`, in Python:\n\n")
    assert json.loads(paste(in_shell).stdout)["choices"][0]["message"]["content"]
    asked = paste(export, f"{sys.executable} - <<'END'", in_python, "END")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    ours.stop()
    os.close(master)
    kept = [path for path in ours.var.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert kept == []


def test_gateway_serves_an_engine_that_is_already_there(ours):
    python = str(ours.folder / "python")
    path = ours.folder / "there.sock"
    engine = subprocess.Popen([python, "-m", "x", "--uds", str(path), "--served-model-name", "there"])
    try:
        ours.start("gateway", "--engine", f"unix:{path}", "--model", "there")
        ours.until(lambda: "Ready. Try it:" in ours.said())
        smoke = ours.ask("smoke", "--model", "there")
        assert smoke.returncode == 0, smoke.stderr
        refused = ours.ask("fleet", "scale", "2")
        assert refused.returncode == 1
        assert "given by address" in refused.stderr
        assert ours.stop() == 0
        assert engine.poll() is None, "an engine that is not ours was ended"
    finally:
        engine.kill()
        engine.wait()


class GivenEngine:
    """An engine that somebody else runs, and stops and starts as he likes."""

    def __init__(self, ours: Installation) -> None:
        self.python = str(ours.folder / "python")
        self.path = ours.folder / "there.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *models: str) -> None:
        argv = [self.python, "-m", "x", "--uds", str(self.path), "--served-model-name", *models]
        self.process = subprocess.Popen(argv)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.path.unlink(missing_ok=True)


@pytest.fixture
def given(ours: Installation) -> Iterator[GivenEngine]:
    """One for a gateway with the shipped configuration's profile, auto; not started yet."""
    document = json.loads((ours.folder / "c.yaml").read_text())
    document |= {"profile": "auto", "engines": {"probe_seconds": 0.2}}
    del document["model"]
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    made = GivenEngine(ours)
    yield made
    made.kill()


class Client:
    """Of the gateway that runs, with its first key."""

    def __init__(self, ours: Installation) -> None:
        ours.until(lambda: (ours.var / "first-key").exists())
        self.place = json.loads(ours.ask("fleet", "status", "--json").stdout)["gateway"]
        self.headers = {
            "Authorization": f"Bearer {(ours.var / 'first-key').read_text().strip()}",
            "Content-Type": "application/json",
        }

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self.place["host"], self.place["port"], timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self.headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def models(self) -> list[str]:
        return [model["id"] for model in self.ask("GET", "/v1/models")[1]["data"]]

    def chat(self, model: str, text: str = "What now?") -> tuple[int, str]:
        """The status, and the error's code where it is one."""
        messages = [{"role": "user", "content": text}]
        status, answer = self.ask("POST", "/v1/chat/completions", {"model": model, "messages": messages})
        return status, answer["error"]["code"] if "error" in answer else ""


def engines_of(ours: Installation) -> list[dict[str, Any]]:
    children = json.loads(ours.ask("fleet", "status", "--json").stdout)["children"]
    return [child for child in children if child["kind"] == "engine"]


def engine_child(ours: Installation) -> dict[str, Any]:
    return engines_of(ours)[0]


def all_are(ours: Installation, state: str) -> bool:
    return {engine["state"] for engine in engines_of(ours)} == {state}


def test_gateway_offers_the_models_that_the_engine_lists(ours, given):
    given.start("there", "there-too")
    ours.start("gateway", "--engine", f"unix:{given.path}")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    smoke = ours.ask("smoke")
    assert smoke.returncode == 0, smoke.stderr
    client = Client(ours)
    assert client.models() == ["there", "there-too"]
    assert [client.chat(name) for name in client.models()] == [(200, ""), (200, "")]
    assert client.chat("smollm2-135m") == (404, "model_not_found")
    assert ours.ask("keys", "create", "--tenant", "default", "--routes", "there-too").returncode == 0
    refused = ours.ask("keys", "create", "--tenant", "default", "--routes", "nowhere")
    assert refused.returncode == 2
    assert "there is no route 'nowhere'" in refused.stderr


def test_gateway_waits_for_the_engine_to_say_what_it_serves(ours, given):
    """Also after the engine was started anew with other models."""
    ours.start("gateway", "--engine", f"unix:{given.path}")
    client = Client(ours)
    assert client.ask("GET", "/readyz")[0] == 503
    assert client.models() == []
    for name in ("smollm2-135m", "gpt-oss-20b", "late"):
        assert client.chat(name) == (503, "no_ready_engine")
    ours.until(lambda: "it has not said yet which models it serves (nobody listens)" in engine_child(ours)["detail"])
    assert engine_child(ours)["state"] == "starting"

    given.start("late")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    assert '"model": "late"' in ours.said()
    ours.until(lambda: client.models() == ["late"])
    assert client.ask("GET", "/readyz")[0] == 200
    assert client.chat("late") == (200, "")
    assert client.chat("gpt-oss-20b") == (404, "model_not_found")

    given.kill()
    ours.until(lambda: client.chat("late") == (503, "no_ready_engine"))
    assert client.models() == ["late"], "it is only away"
    given.start("other", "another")
    ours.until(lambda: client.models() == ["other", "another"])
    assert client.chat("other") == (200, "")
    assert client.chat("another") == (200, "")
    assert client.chat("late") == (404, "model_not_found")
    assert "Traceback" not in ours.said()


@pytest.mark.parametrize(("engines", "slots"), [({}, 64), ({"slots": 7}, 7)])
def test_slots_of_a_given_engine_are_not_guessed_from_this_machine(ours, given, engines, slots):
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["engines"] |= engines
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    ours.start("gateway", "--engine", f"unix:{given.path}")
    ours.until(lambda: "control is ready" in ours.said())
    ours.until(lambda: json.loads(ours.ask("fleet", "status", "--json").stdout)["fleet"]["replicas"])
    (replica,) = json.loads(ours.ask("fleet", "status", "--json").stdout)["fleet"]["replicas"]
    assert replica["slots"] == slots


def test_a_configured_route_leads_to_the_model_that_is_given(ours, given):
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["routes"] = [{"name": "vitalis-chat"}]
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    given.start("there")
    ours.start("gateway", "--engine", f"unix:{given.path}", "--model", "there")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    client = Client(ours)
    ours.until(lambda: client.models() == ["vitalis-chat"])
    assert client.chat("vitalis-chat") == (200, "")


def test_a_given_engine_is_not_restarted_and_comes_back_from_a_drain(ours, given):
    given.start("there")
    ours.start("gateway", "--engine", f"unix:{given.path}")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    for words in (["engine-0"], []):
        refused = ours.ask("fleet", "restart", *words)
        assert refused.returncode == 1
        assert refused.stderr == (
            "vitalis-serve: engine-0: not restarted, because given by address and not ours: restart it where it runs\n"
        )
    client = Client(ours)
    assert ours.ask("fleet", "drain", "engine-0").returncode == 0
    assert client.chat("there") == (503, "no_ready_engine")
    taken_back = ours.ask("fleet", "restart", "engine-0")
    assert taken_back.returncode == 0
    assert taken_back.stdout == "engine-0 takes requests again; it was not restarted, because it is not ours\n"
    assert client.chat("there") == (200, "")
    assert engine_child(ours)["restarts"] == 0
    assert given.process.poll() is None


def test_a_drained_engine_that_is_away_comes_back_once_it_answers(ours, given):
    given.start("there")
    ours.start("gateway", "--engine", f"unix:{given.path}")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    assert ours.ask("fleet", "drain", "engine-0").returncode == 0
    given.kill()
    taken_back = ours.ask("fleet", "restart", "engine-0")
    assert taken_back.returncode == 0
    assert "engine-0 takes requests again as soon as it answers" in taken_back.stdout
    given.start("there")
    client = Client(ours)
    ours.until(lambda: client.chat("there") == (200, ""))


@pytest.mark.parametrize("count", [1, 2])
def test_a_request_that_kills_given_engines_is_stopped_at_the_second(ours, tmp_path, count):
    """Two deaths by it, of one engine or of two, which somebody starts anew each time; and never a third."""
    paths = [tmp_path / f"{number}.sock" for number in range(count)]
    engines = [simulator.start("--served-model-name", "tiny", uds=path) for path in paths]
    words = [word for path in paths for word in ("--engine", f"unix:{path}")]
    try:
        ours.start("gateway", *words, "--model", "tiny")
        client = Client(ours)
        ours.until(lambda: all_are(ours, "ready"))
        for deaths in range(1, 3, count):
            for engine in engines:
                engine.misbehave("crash", after_requests=engine.state()["requests_seen"] + 1)
            assert client.chat("tiny") == (502, "engine_unreachable")
            for engine in engines:
                engine.process.wait(10)
                engine.stop()
            ours.until(lambda: all_are(ours, "suspect"))
            engines = [simulator.start("--served-model-name", "tiny", uds=path) for path in paths]
            ours.until(lambda: all_are(ours, "ready"))
            assert [engine["restarts"] for engine in engines_of(ours)] == [deaths] * count
        assert client.chat("tiny") == (400, "invalid_request")
        for _ in range(3):
            assert client.chat("tiny", "And now?") == (200, "")
        assert [engine.process.poll() for engine in engines] == [None] * count
    finally:
        for engine in engines:
            engine.stop()


def test_engine_runs_one_without_a_gateway(ours):
    ours.start("engine")
    ours.until(lambda: "the engine answers at unix:" in ours.said())
    children = json.loads(ours.ask("fleet", "status", "--json").stdout)["children"]
    assert [child["kind"] for child in children] == ["engine"]
    assert ours.stop() == 0


def test_an_engine_that_never_starts_ends_with_1_and_its_reason(ours):
    (ours.folder / "python").write_text("#!/bin/sh\necho no such flag; exit 0\n")
    ours.configure(ours.folder / "model", restart={"tries": 2, "first_seconds": 0.1})
    ours.start("engine")
    assert ours.process.wait(30) == 1
    assert "no such flag" in ours.said()


def test_control_port_in_use_is_said_with_3(ours):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        document = json.loads((ours.folder / "c.yaml").read_text())
        document["control"]["port"] = taken.getsockname()[1]
        (ours.folder / "c.yaml").write_text(json.dumps(document))
        done = ours.ask("up")
    assert done.returncode == 3
    assert "control.port" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_model_folder_is_said_with_2(ours):
    ours.configure(ours.folder / "nowhere")
    done = ours.ask("up")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupting_a_download_stops_at_once(ours):
    """Here the builder of a model hangs: the python it is run with never ends. It is not waited for as an engine is,
    half a minute."""
    (ours.folder / "python").write_text("#!/bin/sh\ntrap '' TERM INT\nsleep 1000 & wait; sleep 1000\n")
    document = json.loads((ours.folder / "c.yaml").read_text())
    document["model"] = {"name": "tiny", "build": "gpt-oss-tiny"}
    (ours.folder / "c.yaml").write_text(json.dumps(document))
    environment = {**ENVIRONMENT, "VITALIS_CACHE": str(ours.folder / "cache")}
    with open(ours.out, "ab") as out:
        ours.process = subprocess.Popen(ours.argv("up"), env=environment, stdout=out, stderr=out)
    ours.until(lambda: "control is ready" in ours.said() and orphans.find(f"{folders.tree_mark(ours.var)}:model"))
    began = time.monotonic()
    assert ours.stop() == 0
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("words", [("fleet", "status"), ("fleet", "scale", "2"), ("fleet", "restart")])
def test_asking_a_fleet_that_does_not_run_is_one_sentence(ours, words):
    done = ours.ask(*words)
    assert done.returncode == 1
    assert done.stderr.startswith("vitalis-serve: nothing runs on the data folder")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("engine", ["localhost:8000", "https://x", "http://", "http://x/v1", "unix:", "http://x:99999"])
def test_an_engine_that_is_no_address_is_said_with_2(ours, engine):
    done = ours.ask("gateway", "--engine", engine)
    assert done.returncode == 2
    assert shlex.quote(engine).strip("'") in done.stderr


@pytest.mark.parametrize(
    ("engines", "reason"),
    [
        (["http://user:s3cret@x:1"], "an address with a user name is not supported"),
        (["unix:/" + "x" * 103], "must be shorter than 104 bytes, this one has 104"),
        (["http://X:80", "unix:/a", "http://x"], "http://x:80 is given more than once"),
    ],
)
def test_an_engine_that_cannot_be_used_is_one_sentence(ours, engines, reason):
    done = ours.ask("gateway", *(word for engine in engines for word in ("--engine", engine)))
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "s3cret" not in done.stderr


@pytest.mark.parametrize("command", ["up", "engine"])
def test_no_gpu_is_said_before_a_missing_engine_environment(ours, command):
    ours.configure(ours.folder / "model", device="cuda", engine_python=str(ours.folder / "nowhere"))
    done = subprocess.run(
        ours.argv(command), env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "engines.device is cuda but no GPU was found" in done.stderr


def test_only_lines_of_engines_are_marked_as_an_engine_s(ours):
    ours.start("up")
    ours.until(lambda: "Ready. Try it:" in ours.said())
    assert ours.stop() == 0
    lines = [json.loads(line) for line in (ours.var / "log" / "supervisor.log").read_text().splitlines()]
    relayed = {(line["child"], line.get("engine")) for line in lines if line["logger"] == "vitalis_serve.child"}
    assert ("engine-0", "engine-0") in relayed
    assert {engine for child, engine in relayed if not child.startswith("engine-")} == {None}
