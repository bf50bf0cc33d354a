"""`vitalis-load run` and the locustfile as people start them, against simulated engines: whole runs, and all that may
happen to one. The runs go on side by side; what each left behind is then looked at."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import loading, simulator
from tests.support.installation import Installation
from tests.support.loading import Load, lines, run_folder

SCENARIO = """
name: steady
arrivals: {kind: constant, rate: 20}
shape: {kind: steady, seconds: 3}
warmup_seconds: 0.5
cooldown_seconds: 0.5
repeats: 1
deadline_seconds: 30
slo: {failed_share: 0}
tasks:
  - {name: chat, weight: 2, tenant: guests, class: interactive, prompt: {tokens: 40}, output: 12, stream: true}
  - {name: plain, api: completions, stream: false, prompt: {tokens: 30}, output: 6}
  - {name: answer, api: responses, prompt: {tokens: 30}, output: 8}
"""
FILE_BYTES = 90_000
SPEED = ("--decode-step-ms", "3", "--per-sequence-ms", "0", "--prefill-tokens-per-second", "50000")


class Stage:
    """One run with its own engine and folder; `play` does to it what shall happen, and waits for its end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.out = self.folder / "results"
        self.scenario = self.folder / "steady.yaml"
        self.scenario.write_text(SCENARIO)
        self.keys: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.code = -1
        self.said = ""
        self.problem: BaseException | None = None

    def words(self, engine: simulator.Simulator, *more: str) -> tuple[str, ...]:
        return (
            "run", str(self.scenario), "--url", engine.address, "--direct", "--engine", f"e0={engine.address}",
            "--out", str(self.out), *more,
        )  # fmt: skip

    def play(self, python: Path, act: Callable[[Load, simulator.Simulator], None], *more: str) -> None:
        """Against an engine itself."""
        try:
            with (
                simulator.started(*SPEED, preset="sim-20b") as engine,
                loading.started(python, *self.words(engine, *more), out=self.folder / "said") as load,
            ):
                act(load, engine)
                self.code = load.ended()
                self.said = load.said()
        except BaseException as problem:  # noqa: BLE001  told by the test that looks at this run
            self.problem = problem

    def play_whole(self, python: Path) -> None:
        """Beside a running server, which is found by its data folder."""
        ours = Installation(self.folder)
        words = ("run", str(self.scenario), "--data-folder", str(ours.var), "--make-keys", "--out", self.out.name)
        try:
            ours.start("up")
            ours.until(lambda: "Ready. Try it" in ours.said(), loading.SECONDS)
            with loading.started(python, *words, "--processes", "2", out=self.folder / "said") as load:
                self.code = load.ended()
                self.said = load.said()
            self.keys = json.loads(ours.ask("keys", "list", "--json").stdout)
        except BaseException as problem:  # noqa: BLE001  told by the test that looks at this run
            self.problem = problem
        finally:
            ours.stop()

    def play_web(self, python: Path) -> None:
        """Locust's plain command, a master with two workers; the test is begun and stopped in the web UI."""
        web, master = free_port(), free_port()
        try:
            with (
                simulator.started(*SPEED, preset="sim-20b") as engine,
                loading.started(
                    python, "-f", str(loading.ROOT / "loadtests" / "locustfile.py"), "--scenario", str(self.scenario),
                    "--host", engine.address, "--set", "shape.seconds=60", "--out", str(self.out), "--processes", "2",
                    "--web-host", "127.0.0.1", "--web-port", str(web), "--master-bind-port", str(master),
                    "--master-port", str(master), module="locust", out=self.folder / "said",
                ) as load,
            ):  # fmt: skip
                load.until(lambda: load.said().count("reported as ready") == 2)
                load.until(lambda: web_ui(web, "POST", "/swarm", host=engine.address))
                load.until(lambda: self.see(web_ui(web, "GET", "/stats/requests")) > 10)
                assert web_ui(web, "POST", "/stop")["success"]
                load.process.send_signal(signal.SIGINT)
                self.code = load.ended()
                self.said = load.said()
        except BaseException as problem:  # noqa: BLE001
            self.problem = problem

    def see(self, shown: Any) -> int:
        """Keeps Locust's rows; how many answers of the task chat have a TPOT."""
        self.rows = shown["stats"]
        return sum(row["num_requests"] for row in self.rows if (row["method"], row["name"]) == ("TPOT", "chat"))

    @property
    def run(self) -> Path:
        if self.problem is not None:
            raise self.problem
        return run_folder(self.out)

    @property
    def records(self) -> list[dict[str, Any]]:
        return lines(self.run / "repeat-1" / "requests.jsonl")

    @property
    def end(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "repeat-1" / "end.json").read_text()))

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "result.json").read_text()))


def sending(load: Load, folder: Path) -> None:
    """Waits until something was measured."""
    load.until(lambda: any(folder.glob("*/repeat-1/requests.jsonl")))
    (path,) = folder.glob("*/repeat-1/requests.jsonl")
    load.until(lambda: path.stat().st_size > 0)


def stalled(stage: Stage) -> Callable[[Load, simulator.Simulator], None]:
    """The engine stands still while requests go on coming; then comes Ctrl-C."""

    def act(load: Load, engine: simulator.Simulator) -> None:
        sending(load, stage.out)
        engine.misbehave("freeze")
        before = engine.state()["requests_seen"]
        engine.wait_for(lambda state: state["requests_seen"] > before + 30, seconds=loading.SECONDS)
        load.process.send_signal(signal.SIGINT)

    return act


def worker_killed(stage: Stage) -> Callable[[Load, simulator.Simulator], None]:
    def act(load: Load, engine: simulator.Simulator) -> None:
        sending(load, stage.out)
        (path,) = stage.out.glob("*/repeat-1/requests.jsonl")
        load.until(lambda: len(written_by(path)) == 2)
        (master,) = children(load.process.pid)
        os.kill(children(master)[0], signal.SIGKILL)

    return act


def written_by(path: Path) -> set[int]:
    """The processes whose requests are there, while they are being written."""
    whole, _, _ = path.read_text().rpartition("\n")
    return {json.loads(line).get("process", 0) for line in whole.splitlines()}


def file_limit(load: Load, engine: simulator.Simulator) -> None:
    """No file may grow beyond this: a write fails in its middle, as on a full disk."""
    resource.prlimit(load.process.pid, resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))


def children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture(scope="module")
def stages(load_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("runs")
    made = {name: Stage(folder, name) for name in ("whole", "stalled", "killed", "full", "web")}
    long = ("--seconds", "60")
    plays = (
        (made["stalled"], stalled(made["stalled"]), long),
        (made["killed"], worker_killed(made["killed"]), ("--processes", "2", "--seconds", "8")),
        (made["full"], file_limit, (*long, "--set", "arrivals.rate=100")),
    )
    threads = [threading.Thread(target=made["whole"].play_whole, args=(load_python,), daemon=True)]
    threads += [threading.Thread(target=made["web"].play_web, args=(load_python,), daemon=True)]
    threads += [
        threading.Thread(target=stage.play, args=(load_python, act, *more), daemon=True) for stage, act, more in plays
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_a_run_beside_a_running_server(stages: dict[str, Stage]) -> None:
    stage = stages["whole"]
    assert stage.run is not None
    assert stage.code == 0, stage.said
    assert stage.end["complete"] is True
    assert len(stage.records) == 80  # 20 a second for 4 s, of which each process sent half
    assert {record.get("process", 0) for record in stage.records} == {0, 1}
    assert not [record for record in stage.records if record.get("error")]
    asked = {"chat": ("chat", "guests", 12), "plain": ("completions", "", 6), "answer": ("responses", "", 8)}
    found = {r["task"]: (r["api"], r.get("tenant", ""), r["completion_tokens"]) for r in stage.records}
    assert found == asked
    assert sorted(round(record["scheduled"], 6) for record in stage.records) == [
        round(0.025 + number / 20, 6) for number in range(80)
    ]
    assert all(record["sent"] >= record["scheduled"] for record in stage.records)
    result = stage.result
    assert result["figures"]["failed_share"]["median"] == 0
    assert result["partial"] is False
    assert (stage.run / "report.html").is_file()
    assert "output tokens/s" in stage.said


def test_gateway_and_engines_are_sampled_meanwhile(stages: dict[str, Stage]) -> None:
    stage = stages["whole"]
    samples = lines(stage.run / "repeat-1" / "samples.jsonl")
    assert len(samples) >= 3
    tokens = sum(record["completion_tokens"] for record in stage.records)
    assert samples[-1]["engines"][0]["name"] == "engine-0"
    assert samples[-1]["engines"][0]["generation_tokens"] >= tokens
    assert samples[-1]["gateway"]["vitalis_completion_tokens_total"] >= tokens
    assert samples[-1]["gateway"]["vitalis_in_flight"] == 0


def test_keys_that_were_made_for_a_run_are_taken_back(stages: dict[str, Stage]) -> None:
    stage = stages["whole"]
    assert stage.run is not None
    (made,) = (key for key in stage.keys if key["tenant"] == "load-guests")
    assert (made["class"], made["status"]) == ("interactive", "revoked")
    assert "made tenants load-guests with a key each" in stage.said
    secrets = [(path / name).read_text() for path in (stage.run, stage.run / "repeat-1") for name in os.listdir(path)
               if (path / name).is_file()]  # fmt: skip
    assert not [text for text in secrets if "vts_" in text]


def test_a_stalled_server_does_not_slow_the_arrivals(stages: dict[str, Stage]) -> None:
    stage = stages["stalled"]
    unfinished = [record for record in stage.records if record.get("unfinished")]
    assert len(unfinished) >= 30  # sent while nothing came back, on connections of their own
    moments = sorted(record["scheduled"] for record in stage.records)
    gaps = [round(b - a, 6) for a, b in zip(moments, moments[1:], strict=False)]
    assert set(gaps) == {0.05}  # none was left out, none put off
    assert not [record for record in stage.records if record.get("error")]


def test_ctrl_c_keeps_what_was_measured(stages: dict[str, Stage]) -> None:
    stage = stages["stalled"]
    assert stage.code == 130, stage.said
    assert stage.end["complete"] is False
    assert stage.end["reason"].startswith("interrupted after")
    assert stage.result["partial"] is True
    assert f"interrupted; what was measured until then is kept: {stage.run / 'report.html'}" in stage.said
    assert "Traceback" not in stage.said


def test_a_lost_worker_is_named_and_the_others_go_on(stages: dict[str, Stage]) -> None:
    stage = stages["killed"]
    (lost,) = stage.end["lost_processes"]
    assert stage.end["reason"].startswith(f"1 of 2 workers were lost (process {lost})")
    assert f"worker {lost} is lost" in stage.said
    last = {number: max(r["scheduled"] for r in stage.records if r.get("process", 0) == number) for number in (0, 1)}
    assert last[1 - lost] > 8.8  # to the end of warm-up, what is measured and cool-down
    assert last[lost] < last[1 - lost] - 1
    assert stage.result["partial"] is True
    honesty = stage.result["honesty"]
    assert honesty["requested_rate"] == pytest.approx(20)  # what nobody sent was asked for all the same
    assert honesty["achieved_rate"] < 19
    assert stage.code == 1, stage.said
    assert "the run is partial" in stage.said


def test_what_fits_on_a_disk_is_kept(stages: dict[str, Stage]) -> None:
    stage = stages["full"]
    assert stage.code == 4, stage.said
    assert stage.said.splitlines()[-1].startswith("vitalis-load: ")
    assert "cannot be written" in stage.said
    size = (stage.run / "repeat-1" / "requests.jsonl").stat().st_size
    assert FILE_BYTES - 1000 < size <= FILE_BYTES
    assert len(stage.records) > 100  # every line whole
    assert stage.end["complete"] is False
    assert "Traceback" not in stage.said


def test_a_key_that_is_refused_ends_the_command(load_python: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, "stage")
    with simulator.started("--api-key", "right") as engine:
        ran = loading.command(load_python, *stage.words(engine, "--key-env", "WRONG"), cwd=tmp_path, WRONG="wrong")
    assert ran.returncode == 3
    assert f"vitalis-load: {engine.address} refuses the key (401: Unauthorized)" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not stage.out.exists()


def test_locust_s_own_statistics_and_web_ui(stages: dict[str, Stage]) -> None:
    stage = stages["web"]
    assert stage.run is not None
    assert stage.code == 0, stage.said
    rows = {(row["method"], row["name"]): row for row in stage.rows}
    assert rows["TPOT", "chat"]["median_response_time"] > 2  # the engine's step is 3 ms
    assert rows["TTFT", "chat"]["num_requests"] == rows["chat", "chat"]["num_requests"]
    assert rows["tokens", "chat"]["num_requests"] == 12 * rows["chat", "chat"]["num_requests"]
    assert ("TPOT", "plain") not in rows
    usual = sum(row["num_requests"] for (kind, _), row in rows.items() if kind in ("chat", "completions", "responses"))
    assert rows["", "Aggregated"]["num_requests"] == usual
    assert stage.end["reason"].startswith("interrupted after")
    assert len(stage.records) >= rows["", "Aggregated"]["num_requests"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def web_ui(port: int, method: str, path: str, **fields: str) -> Any:
    """Its answer; None while it does not listen."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = "&".join(f"{name}={value}" for name, value in fields.items())
    headers = {"content-type": "application/x-www-form-urlencoded"} if body else {}
    with contextlib.closing(connection), contextlib.suppress(ConnectionRefusedError):
        connection.request(method, path, body or None, headers)
        return json.loads(connection.getresponse().read())
    time.sleep(0.1)
    return None
