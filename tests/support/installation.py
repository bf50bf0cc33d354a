"""`vitalis-serve` as people start it, with the simulated engine in vLLM's place."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vitalis_serve.supervise import folders, orphans

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("VITALIS_")},
    "PYTHONPATH": str(ROOT / "server"),
}
COMMAND = [sys.executable, "-c", "import sys; from vitalis_serve.cli import main; sys.exit(main())"]


class Installation:
    """A configuration and a data folder of their own; `start` runs a command of ours in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.var = folder / "var"
        self.out = folder / "out"
        self.process: subprocess.Popen[bytes] | None = None
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "gpt_oss"}')
        header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
        (model / "tokenizer.json").write_text("{}")
        python = folder / "python"
        simulator = f"exec {sys.executable} -m simulator"
        python.write_text(
            f'#!/bin/sh\nshift 2\nPYTHONPATH={ROOT / "loadtests"} {simulator} "$@" --preset instant --lenient\n'
        )
        python.chmod(0o755)
        self.configure(model)

    def configure(self, model: Path, **engines: object) -> None:
        document = {
            "profile": "plain",
            "data_folder": str(self.var),
            "gateway": {"host": "127.0.0.1", "port": 0},
            "control": {"port": 0},
            "model": {"name": "tiny", "folder": str(model)},
            "engines": {"device": "cpu", "engine_python": str(self.folder / "python"), "probe_seconds": 0.2, **engines},
        }
        (self.folder / "c.yaml").write_text(json.dumps(document))
        (self.folder / "profiles").mkdir(exist_ok=True)
        (self.folder / "profiles" / "plain.yaml").write_text("{}")

    def argv(self, *words: str) -> list[str]:
        return [*COMMAND, *words, "--config", str(self.folder / "c.yaml")]

    def start(self, *words: str, terminal: int | None = None) -> None:
        with open(self.out, "ab") as out:
            screen = out if terminal is None else terminal
            self.process = subprocess.Popen(
                self.argv(*words), env=ENVIRONMENT, stdout=screen, stderr=out, start_new_session=True
            )

    def ask(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.argv(*words), env=ENVIRONMENT, capture_output=True, text=True, timeout=60)

    def said(self) -> str:
        return self.out.read_text()

    def until(self, wanted: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{self.said()}"
            time.sleep(0.05)

    def stop(self) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(30)
        self.until(lambda: not orphans.find(f"{folders.tree_mark(self.var)}:"), 5)
        return code
