"""`make serve` as a person uses it on a machine without a GPU: first run, what it prints pasted, Ctrl-C, second run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import engines
from tests.support.engines import ROOT, STOP_SECONDS, Stack, alive, descendants, until


@pytest.fixture
def tree(no_tree: None) -> Iterator[Stack]:
    try:
        with engines.stack(make="serve") as running:
            yield running
    except engines.NotHere as reason:
        pytest.skip(str(reason))


def printed(tree: Stack) -> str:
    return (tree.folder / "terminal.log").read_text()


def stop(tree: Stack, number: int, *, group: bool) -> None:
    """As a terminal does it (the whole group) or as a service would (one process); nothing may be left."""
    assert tree.process is not None
    family = descendants(tree.process.pid)
    assert len(family) > 5
    assert list((tree.run / "engine-0.ipc").iterdir()), "vLLM's own sockets are not in the temporary folder"
    if group:
        os.killpg(tree.process.pid, number)
    else:
        os.kill(tree.process.pid, number)
    tree.process.wait(STOP_SECONDS)
    until(lambda: not [pid for pid in family if alive(pid)], 5, "no process left")
    assert [path for path in tree.run.iterdir() if path.is_dir() or path.is_socket()] == []


def test_first_run_ctrl_c_and_second_run(tree: Stack) -> None:
    tree.wait_ready(1)
    until(lambda: "Ready. Try it:" in printed(tree), 10, "the requests are shown")
    text = printed(tree)
    assert tree.key not in text, "a key is shown on a terminal only"
    assert (tree.data / "first-key").stat().st_mode & 0o777 == 0o600

    (curl,) = re.findall(r"^curl .*$", text, re.MULTILINE)
    answered = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=100, check=True).stdout
    assert "Paris" in answered
    snippet = re.search(r"^import os\nfrom openai.*\n.*\n.*$", text, re.MULTILINE)
    assert snippet is not None
    said = subprocess.run([sys.executable, "-c", snippet[0]], capture_output=True, text=True, timeout=100, check=True)
    assert "Paris" in said.stdout
    smoked = subprocess.run(
        [sys.executable, "-m", "vitalis_serve", "smoke"],
        env=dict(tree.environ), cwd=tree.folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert smoked.returncode == 0, smoked.stdout + smoked.stderr
    key = tree.key
    stop(tree, signal.SIGINT, group=True)

    tree.start()
    began = time.monotonic()
    tree.wait_ready(1)
    print(f"the second start took {time.monotonic() - began:.0f} s")  # told, not judged: it is the machine's
    assert tree.key == key
    chat = tree.openai().chat.completions.create(
        model=tree.openai().models.list().data[0].id, temperature=0, max_tokens=32,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )  # fmt: skip
    assert "Paris" in (chat.choices[0].message.content or "")
    content = ""
    for chunk in tree.openai().chat.completions.create(
        model=chat.model, temperature=0, max_tokens=32, stream=True,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    ):  # fmt: skip
        content += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert content == chat.choices[0].message.content
    stop(tree, signal.SIGTERM, group=False)


def test_make_alone_prints_help() -> None:
    shown = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=30, check=True).stdout
    targets = set(re.findall(r"^([a-z-]+):", (Path(ROOT) / "Makefile").read_text(), re.MULTILINE))
    assert {"serve", "test"} <= targets
    assert {target for target in targets if f"make {target} " not in shown} == set()
