"""Every complaint is one line that begins with the program's name."""

import json
import socket
import threading
from pathlib import Path

import pytest
from vitalis_serve.cli import main
from vitalis_serve.supervise import folders


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    gateway = {"host": "127.0.0.1", "port": 1}  # nobody listens there
    path.write_text(json.dumps({"profile": "plain", "data_folder": str(tmp_path / "var"), "gateway": gateway}))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "plain.yaml").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("smoke", "--key", "k"), 1, "the gateway at 127.0.0.1:1 did not answer as it should: "),
        (
            ("smoke",),
            2,
            "no key: paste the line `export VITALIS_KEY=...` that the first start has shown, or give --key",
        ),
        (("fleet", "status"), 1, "nothing runs on the data folder "),
        (("fleet", "scale", "many"), 2, "REPLICAS 'many': give a whole number from 0 to 1024, for example "),
        (("fleet", "scale", "1025"), 2, "REPLICAS '1025': give a whole number"),
        (("keys", "list"), 1, "control is not running "),
        (
            ("keys", "create", "--tenant", "t", "--expires-in", "soon"),
            2,
            "--expires-in 'soon': give a whole number from 1 to ",
        ),
        (("tenants", "create", "t"), 1, "control is not running "),
        (("gateway", "--engine", "ftp://x", "--model", "m"), 2, "--engine ftp://x is no engine's address"),
        (("nonsense",), 2, "No such command 'nonsense'"),
    ],
)
def test_complaint_names_the_program(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.setenv("VITALIS_CONFIG", str(config))
    assert main([*words]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"vitalis-serve: {sentence}")
    assert said.err.count("\n") == 1


def test_refusal_of_the_supervisor_names_the_program(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITALIS_CONFIG", str(config))
    run = folders.prepare(config.parent / "var")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(run / "supervisor.sock"))
        server.listen()

        def refuse() -> None:
            caller, _ = server.accept()
            with caller, caller.makefile("rb") as lines:
                lines.readline()
                caller.sendall(b'{"done": true, "ok": false, "message": "there is no replica engine-7"}\n')

        thread = threading.Thread(target=refuse)
        thread.start()
        code = main(["fleet", "drain", "engine-7"])
        thread.join()
    assert code == 1
    assert capsys.readouterr().err == "vitalis-serve: there is no replica engine-7\n"
