"""Model folders: local ones checked, built ones made once by a real child process, whatever goes wrong said."""

import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from vitalis_serve.engines.models import check, ensure, folder_of, listing
from vitalis_serve.errors import ConfigurationError, StartError
from vitalis_serve.settings.schema import Model

TINY = Model(name="gpt-oss-tiny", build="gpt-oss-tiny")


def write_model(folder: Path, **over: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors(over.get("data", b"1234")))
    return folder


def safetensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture
def builder(tmp_path):
    """A "python" that, told to run a builder, does what `body` says with OUT instead, and counts its runs."""

    def builder(body: str) -> Path:
        path = tmp_path / "env" / "bin" / "python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"#!{sys.executable}\nimport json, os, sys, time\nfrom pathlib import Path\nout = Path(sys.argv[2])\n"
            f"with open({str(tmp_path / 'runs')!r}, 'a') as f: f.write(sys.argv[1] + '\\n')\n{body}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return builder


GOOD = """
out.mkdir(parents=True)
header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
(out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
(out / "config.json").write_text('{"model_type": "gpt_oss"}')
(out / "tokenizer.json").write_text("{}")
print("step 1", flush=True)
"""


def test_a_whole_folder_is_taken_as_it_is(tmp_path):
    folder = write_model(tmp_path / "m")
    assert check(folder) == ()
    assert ensure(Model(folder=folder), tmp_path / "cache", Path(sys.executable), print) == folder


def spoil(folder: Path, what: str) -> None:
    match what:
        case "no folder":
            folder.rename(folder.with_name("elsewhere"))
        case "no config":
            (folder / "config.json").unlink()
        case "bad config":
            (folder / "config.json").write_text("{")
        case "list config":
            (folder / "config.json").write_text("[]")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "cut weights":
            os.truncate(folder / "model.safetensors", 20)
        case "short weights":
            file = folder / "model.safetensors"
            os.truncate(file, file.stat().st_size - 1)
        case "empty weights":
            (folder / "model.safetensors").write_bytes(b"")
        case "missing shard":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}')
        case "bad index":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "there is no such folder"),
        ("no config", "config.json is missing"),
        ("bad config", "config.json cannot be read"),
        ("list config", "config.json is not a JSON object"),
        ("no tokenizer", "a tokenizer is missing"),
        ("no weights", "no *.safetensors file is there"),
        ("cut weights", "model.safetensors is cut short or damaged"),
        ("short weights", "model.safetensors is cut short or damaged"),
        ("empty weights", "model.safetensors is cut short or damaged"),
        ("missing shard", "model-2.safetensors is missing"),
        ("bad index", "model.safetensors.index.json cannot be read"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, what, words):
    folder = write_model(tmp_path / "m")
    spoil(folder, what)
    assert words in check(folder)[0]
    with pytest.raises(ConfigurationError, match="model.folder: ") as caught:
        ensure(Model(folder=folder), tmp_path / "cache", Path(sys.executable), print)
    assert words in str(caught.value)


def test_a_model_is_built_once(tmp_path, builder):
    python, lines = builder(GOOD), []
    first = ensure(TINY, tmp_path / "cache", python, lines.append)
    assert check(first) == ()
    assert "gpt-oss-tiny: step 1" in lines
    assert (
        ensure(TINY, tmp_path / "cache", python, lines.append) == first == folder_of(TINY, tmp_path / "cache", python)
    )
    runs = (tmp_path / "runs").read_text().splitlines()
    assert [Path(run).name for run in runs] == ["gpt_oss_tiny.py"]
    assert [(m.name, m.problems) for m in listing(tmp_path / "cache")] == [("gpt-oss-tiny", ())]
    assert not list((tmp_path / "cache" / "models").glob("*.part"))


def test_another_version_of_an_ingredient_makes_another_folder(tmp_path, builder):
    python = builder(GOOD)
    before = folder_of(TINY, tmp_path, python)
    packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    (packages / "requests-2.0.dist-info").mkdir(parents=True)
    assert folder_of(TINY, tmp_path, python) == before
    (packages / "torch-2.13.0+cpu.dist-info").mkdir()
    assert folder_of(TINY, tmp_path, python) != before


def test_two_starts_build_once(tmp_path, builder):
    python = builder("time.sleep(0.3)\n" + GOOD)
    results, lines = [], []
    code = (
        "import sys; from pathlib import Path; from vitalis_serve.engines.models import ensure;"
        "from vitalis_serve.settings.schema import Model;"
        f"cache, python = Path({str(tmp_path / 'cache')!r}), Path({str(python)!r});"
        "print(ensure(Model(build='gpt-oss-tiny'), cache, python, lambda _: None))"
    )

    def other():
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        results.append(
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        )

    thread = threading.Thread(target=other)
    thread.start()
    mine = ensure(TINY, tmp_path / "cache", python, lines.append)
    thread.join()
    assert results[0].stdout.strip() == str(mine)
    assert len((tmp_path / "runs").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit('OSError: [Errno 28] No space left on device')", "exit code 1): a disk is full"),
        ("print('odd'); sys.exit(3)", "building it failed (exit code 3): odd"),
        ("import torch_that_is_not_there", "lacks the Python module torch_that_is_not_there"),
        ("out.mkdir()", "is not a whole model: config.json is missing"),
    ],
)
def test_a_builder_that_fails_leaves_nothing_in_its_place(tmp_path, builder, body, words):
    python = builder(body)
    with pytest.raises(StartError) as caught:
        ensure(TINY, tmp_path / "cache", python, lambda _: None)
    assert words in str(caught.value)
    assert not folder_of(TINY, tmp_path / "cache", python).exists()
    # The next start tries again, and may succeed.
    assert ensure(TINY, tmp_path / "cache", builder(GOOD), lambda _: None).is_dir()


def test_a_builder_that_cannot_run_is_said(tmp_path):
    with pytest.raises(StartError, match="could not be run"):
        ensure(TINY, tmp_path / "cache", tmp_path / "none" / "bin" / "python", lambda _: None)


def test_a_cache_that_cannot_be_made_is_said(tmp_path, builder):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StartError, match="cannot be written .* set VITALIS_CACHE"):
        ensure(TINY, tmp_path / "cache", builder(GOOD), lambda _: None)


def test_parts_of_killed_builds_are_removed_and_others_stay(tmp_path, builder):
    models = tmp_path / "cache" / "models"
    killed, built, fetched = (
        models / f"{name}.part"
        for name in (f"gpt-oss-tiny-{'0' * 16}", f"smollm2-135m-{'1' * 16}", f"gpt-oss-20b-{'2' * 16}")
    )
    for part in (killed, built, fetched):
        (part / "some").mkdir(parents=True)
        part.with_suffix(".lock").touch()
    with built.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ensure(TINY, tmp_path / "cache", builder(GOOD), lambda _: None)
    assert not killed.exists()
    assert (built / "some").is_dir(), "it is being built"
    assert (fetched / "some").is_dir(), "a download is continued"


def test_builder_whose_starter_was_killed_holds_the_lock_until_it_ends(tmp_path, builder):
    go = tmp_path / "go"
    os.mkfifo(go)
    python = builder(f"out.mkdir(parents=True)\nopen({str(go)!r}).read()")
    code = (
        "import sys; from pathlib import Path; from vitalis_serve.engines.models import ensure;"
        "from vitalis_serve.settings.schema import Model;"
        f"ensure(Model(build='gpt-oss-tiny'), Path({str(tmp_path / 'cache')!r}), Path({str(python)!r}), lambda _: None)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    starting = subprocess.Popen([sys.executable, "-c", code], env=env)
    with starting as starter, go.open("w"):  # waits for the builder to open it too
        starter.kill()
        starter.wait()
        (part,) = (tmp_path / "cache" / "models").glob("*.part")
        with part.with_suffix(".lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # The builder has been let go; whoever waited for its lock gets it.
    with part.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
