"""Fetching a model from a stand-in for the hub that runs as a process of its own and misbehaves on command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vitalis_serve.engines import hub
from vitalis_serve.engines.models import check, ensure
from vitalis_serve.errors import ConfigurationError, StartError
from vitalis_serve.settings.schema import Model

SERVER = Path(__file__).parents[1] / "support" / "hub.py"
SMALL = Model(name="small", hub="acme/small")
WEIGHTS = "model-00001-of-00002.safetensors"
SIZE = 32 << 20


def safetensors(size: int, seed: int) -> bytes:
    data = random.Random(seed).randbytes(size)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


class Stand:
    """The stand-in's state folder and address."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.environ = {"HF_ENDPOINT": address, "HOME": str(folder)}
        self.files = sorted(str(p.relative_to(folder / "repo")) for p in (folder / "repo").rglob("*") if p.is_file())

    def fault(self, **faults: object) -> None:
        (self.folder / "faults.json").write_text(json.dumps(faults))

    @property
    def requests(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]

    def ranges(self, path: str) -> list[str | None]:
        return [r["range"] for r in self.requests if r["method"] == "GET" and r["path"].endswith(f"/{path}")]


@pytest.fixture
def stand(tmp_path):
    repo = tmp_path / "hub" / "repo"
    for folder in ("original", "metal"):
        (repo / folder).mkdir(parents=True)
        (repo / folder / "model.bin").write_bytes(b"the same again")
    (repo / "config.json").write_text('{"model_type": "llama"}')
    (repo / "tokenizer.json").write_text("{}")
    (repo / "README.md").write_text("hello")
    (repo / WEIGHTS).write_bytes(safetensors(SIZE, 1))
    (repo / "model-00002-of-00002.safetensors").write_bytes(safetensors(1000, 2))
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(tmp_path / "hub")], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            yield Stand(tmp_path / "hub", server.stdout.readline().split()[-1])
        finally:
            server.kill()


def fetch(stand: Stand, tmp_path: Path, model: Model = SMALL, **environ: str) -> tuple[Path, list[str]]:
    lines: list[str] = []
    python = Path(sys.executable)
    return ensure(model, tmp_path / "cache", python, lines.append, environ=stand.environ | environ), lines


def test_a_model_is_fetched_whole_without_the_other_formats(stand, tmp_path):
    folder, lines = fetch(stand, tmp_path)
    assert check(folder) == ()
    assert hub.verify(folder) == ()
    for name in ("config.json", WEIGHTS):
        assert (folder / name).read_bytes() == (stand.folder / "repo" / name).read_bytes()
    assert not [r for r in stand.requests if "original" in r["path"] or "metal" in r["path"] or "README" in r["path"]]
    assert not (folder / "original").exists()
    assert not (folder / ".parts").exists()
    assert lines[0] == "small: fetching 0.03 GB"
    assert {r["auth"] for r in stand.requests} == {None}


def test_a_second_start_asks_nobody(stand, tmp_path):
    folder, _ = fetch(stand, tmp_path)
    before = len(stand.requests)
    assert fetch(stand, tmp_path)[0] == folder
    assert len(stand.requests) == before


def test_a_cut_transfer_goes_on_where_it_was_cut(stand, tmp_path):
    stand.fault(cut={WEIGHTS: 20 << 20})
    folder, _ = fetch(stand, tmp_path)
    assert (folder / WEIGHTS).read_bytes() == (stand.folder / "repo" / WEIGHTS).read_bytes()
    first, second = stand.ranges(WEIGHTS)
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").split("-")[0]) <= 20 << 20


def test_a_killed_process_is_taken_up_by_the_next(stand, tmp_path):
    stand.fault(dribble=WEIGHTS)
    code = (
        "import os, sys; from pathlib import Path; from vitalis_serve.engines.models import ensure;"
        "from vitalis_serve.settings.schema import Model;"
        f"ensure(Model(hub='acme/small'), Path({str(tmp_path / 'cache')!r}), Path(sys.executable), print)"
    )
    env = os.environ | stand.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env) as first:
        deadline = time.monotonic() + 30
        while (
            not (parts := list((tmp_path / "cache").rglob(".parts/*")))
            or max(p.stat().st_size for p in parts) < 1 << 20
        ):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    stand.fault()
    folder, _ = fetch(stand, tmp_path)
    assert hub.verify(folder) == ()
    resumed = stand.ranges(WEIGHTS)[-1]
    assert resumed is not None
    assert int(resumed.removeprefix("bytes=").split("-")[0]) >= 1 << 20


def test_a_server_that_ignores_ranges_is_started_over(stand, tmp_path):
    stand.fault(cut={WEIGHTS: 20 << 20}, no_ranges=True)
    folder, _ = fetch(stand, tmp_path)
    assert hub.verify(folder) == ()


def test_the_token_is_sent_and_its_lack_is_said(stand, tmp_path):
    stand.fault(token="hf_right")
    with pytest.raises(ConfigurationError, match="acme/small: not found on .* set HF_TOKEN"):
        fetch(stand, tmp_path)
    with pytest.raises(ConfigurationError, match="the token in HF_TOKEN may not read it"):
        fetch(stand, tmp_path, HF_TOKEN="hf_wrong")
    folder, _ = fetch(stand, tmp_path, HF_TOKEN="hf_right")
    assert check(folder) == ()
    assert {r["auth"] for r in stand.requests if "resolve" in r["path"]} == {"Bearer hf_right"}


def test_wrong_names_are_said(stand, tmp_path):
    with pytest.raises(ConfigurationError, match="model.hub acme/other: not found"):
        fetch(stand, tmp_path, Model(hub="acme/other"))
    with pytest.raises(ConfigurationError, match="has no revision nowhere; correct model.revision"):
        fetch(stand, tmp_path, Model(hub="acme/small", revision="nowhere"))


def test_damage_on_the_way_is_noticed_and_not_kept(stand, tmp_path):
    stand.fault(corrupt=WEIGHTS)
    with pytest.raises(StartError, match=f"{WEIGHTS}: what the hub sent does not have the digest"):
        fetch(stand, tmp_path)
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    stand.fault()
    assert check(fetch(stand, tmp_path)[0]) == ()


def test_damage_on_the_disk_is_found_by_verify(stand, tmp_path):
    folder, _ = fetch(stand, tmp_path)
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"damaged")
    (folder / "tokenizer.json").unlink()
    assert check(folder) == ("a tokenizer is missing (tokenizer.json)",)
    assert set(hub.verify(folder)) == {f"{WEIGHTS} differs from the hub's", "tokenizer.json is missing"}


def test_no_hub_at_all_is_said(stand, tmp_path):
    with pytest.raises(StartError, match="http://127.0.0.1:1 cannot be reached .* give a local copy with model.folder"):
        fetch(stand, tmp_path, HF_ENDPOINT="http://127.0.0.1:1")


def test_a_repository_that_is_no_model_is_said(stand, tmp_path):
    (stand.folder / "repo" / "config.json").unlink()
    with pytest.raises(StartError, match="not a whole model: config.json is missing"):
        fetch(stand, tmp_path)
