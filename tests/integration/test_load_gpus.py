"""GPUs' use, memory and power during a run, by NVML. There is none here: a library of its name says what one would."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import loading, simulator
from tests.support.missing import missing

SOURCE = Path(__file__).parents[1] / "support" / "nvml.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        missing("a C compiler is needed: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True)
    return folder


def test_a_run_has_what_its_gpus_said(load_python: Path, library: Path, tmp_path: Path) -> None:
    changes = ["--set", "shape.seconds=4", "--set", "warmup_seconds=0", "--set", "cooldown_seconds=0"]
    with simulator.started(preset="sim-20b") as engine:
        ran = subprocess.run(
            [load_python, "-m", "vitalis_load", "run", "short-chat", "--scale", "small", "--url", engine.address,
             "--direct", "--repeats", "1", "--out", tmp_path, "--set", "capacity=20", *changes],
            env=loading.environment(LD_LIBRARY_PATH=str(library)), capture_output=True, text=True, check=False,
            timeout=loading.SECONDS,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (folder,) = tmp_path.iterdir()
    samples = [json.loads(line) for line in (folder / "repeat-1" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= 3
    for sample in samples:
        first, second = sample["gpus"]
        assert first == {"index": 0, "utilisation": 0.87, "memory_bytes": 120 * 2**30, "power_watts": 612.5}
        assert second == {"index": 1, "utilisation": None, "memory_bytes": 121 * 2**30, "power_watts": 612.501}
        assert sample["engines"][0]["name"] == "engine", "an engine that is asked directly tells of itself too"
    result = json.loads((folder / "result.json").read_text())
    assert result["run"]["machine"]["gpus"] == ["NVIDIA Whole", "NVIDIA Half"]
    page = (folder / "report.html").read_text()
    for frame in ("GPU use", "GPU memory, GiB", "GPU power, W"):
        assert f"<h3>{frame}" in page or f">{frame}" in page
