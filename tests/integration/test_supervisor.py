"""The supervisor as a real process over real children: what is killed comes back or ends, nothing is left."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from vitalis_serve.supervise.commands import request

from tests.support.tree import Tree, tree


@pytest.fixture
def var(tmp_path):
    with tree(tmp_path) as made:
        yield made


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def whoami(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        return connection.makefile().readline()


def test_comes_up_is_told_to_stop_and_leaves_nothing(var):
    var.start(replicas=2)
    assert {c["name"]: c["state"] for c in var.status()["children"]} == {
        "worker-0": "ready", "control": "ready", "engine-0": "ready", "engine-1": "ready",
    }  # fmt: skip
    assert var.order(command="stop")["ok"]
    assert var.wait() == 0
    assert var.pids() == []
    assert list((var.data_folder / "run").iterdir()) == []


def test_stopping_goes_in_order(var):
    """Unready, settle, workers finish what runs, engines, control last."""
    var.start(settle_seconds=0.3)
    var.in_flight(engine_0=1)
    engine = var.child("engine-0")["pid"]
    var.process.send_signal(signal.SIGINT)
    var.until(lambda: "drain" in var.told())
    assert not dead(engine), "an engine ended while requests ran"
    assert var.told("control") == []
    var.in_flight()
    assert var.wait() == 0
    assert var.told() == ["unready", "drain", "eof"]
    assert var.told("control") == ["sigterm"]
    lines = [line.split() for path in var.data_folder.glob("log/*.told") for line in path.read_text().splitlines()]
    times = {word: float(at) for word, at in lines}
    assert times["drain"] - times["unready"] >= 0.3
    assert times["eof"] < times["sigterm"]


def test_a_worker_that_died_before_is_drained_all_the_same(var):
    """Its earlier life's end must not pass for having drained: what runs would be cut."""
    var.start()
    first = var.child("worker-0")["pid"]
    os.kill(first, signal.SIGKILL)
    var.until(lambda: (c := var.child("worker-0"))["state"] == "ready" and c["pid"] != first)
    var.in_flight(engine_0=1)
    engine = var.child("engine-0")["pid"]
    var.process.send_signal(signal.SIGTERM)
    var.until(lambda: "drain" in var.told())
    time.sleep(0.5)  # something that must not happen meanwhile
    assert "eof" not in var.told()
    assert not dead(engine)
    var.in_flight()
    assert var.wait() == 0
    assert var.told()[-2:] == ["drain", "eof"]


def test_new_connections_are_refused_once_it_drains(var):
    var.start()
    port = var.status()["gateway"]["port"]
    assert whoami(port).startswith("worker-0")
    var.in_flight(engine_0=1)
    var.process.send_signal(signal.SIGTERM)
    var.until(lambda: "drain" in var.told())

    def refused():
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return True
        return False

    var.until(refused)
    var.in_flight()


def test_a_second_interrupt_hastens(var):
    var.start(engine_flags=["--ignore-sigterm"], policy={"drain_seconds": 60, "stop_seconds": 60})
    var.in_flight(engine_0=1)
    var.process.send_signal(signal.SIGINT)
    var.until(lambda: "drain" in var.told())
    var.process.send_signal(signal.SIGINT)
    assert var.wait(5) == 0


def test_an_engine_that_ignores_sigterm_is_killed_at_its_deadline(var):
    var.start(engine_flags=["--ignore-sigterm", "--below"], policy={"stop_seconds": 0.5})
    assert len(var.pids()) >= 6
    began = time.monotonic()
    var.process.send_signal(signal.SIGTERM)
    assert var.wait() == 0
    assert time.monotonic() - began >= 0.5
    assert var.pids() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_engine_takes_its_tree_along_and_comes_back(var, number):
    """kill -9 of vLLM's API server orphans its workers; ours has one in its group and one in its own session."""
    var.start(engine_flags=["--below"])
    old = set(var.pids())
    child = var.child("engine-0")
    keeper = parent(child["pid"])
    below = {pid for pid in old if parent(pid) == child["pid"]}
    assert len(below) == 2
    os.kill(child["pid"], number)
    var.until(lambda: var.replica()["incarnation"] == 2 and var.replica()["state"] == "ready")
    assert all(dead(pid) for pid in {child["pid"], keeper, *below})
    assert var.child("engine-0")["restarts"] == 1


def test_a_killed_keeper_takes_its_tree_along_and_the_engine_comes_back(var):
    var.start(engine_flags=["--below"])
    engine = var.child("engine-0")["pid"]
    tree_of_it = {engine, *(pid for pid in var.pids() if parent(pid) == engine)}
    os.kill(parent(engine), signal.SIGKILL)
    var.until(lambda: var.replica()["incarnation"] == 2 and var.replica()["state"] == "ready")
    assert all(dead(pid) for pid in tree_of_it)


def test_a_killed_supervisor_takes_all_along_and_the_next_start_works(var):
    var.start(engine_flags=["--below", "--ignore-sigterm"])
    assert len(var.pids()) >= 6
    var.process.kill()
    var.process.wait()
    var.until(lambda: not var.pids())
    var.start()
    assert var.states() == {"engine-0": "ready"}


def test_supervisor_and_keeper_killed_together_are_swept_by_the_next_start(var):
    """And nobody else is."""
    var.start(engine_flags=["--below"])
    engine = var.child("engine-0")["pid"]
    below = {pid for pid in var.pids() if parent(pid) == engine}
    stranger = subprocess.Popen(["sleep", "100"])
    try:
        os.kill(var.process.pid, signal.SIGSTOP)  # so that it cannot sweep before it is killed
        os.kill(parent(engine), signal.SIGKILL)
        var.process.kill()
        var.process.wait()
        assert not all(dead(pid) for pid in below)
        var.start()
        assert all(dead(pid) for pid in below)
        assert stranger.poll() is None
        assert "an earlier run had left behind" in var.log.read_text()
    finally:
        stranger.kill()
        stranger.wait()


def test_exit_0_that_nobody_asked_for_is_a_crash(var):
    var.start()
    var.engine("exit 0")
    var.until(lambda: var.replica()["incarnation"] == 2 and var.replica()["state"] == "ready")
    assert "exited with code 0, which nobody asked for" in var.log.read_text()


def test_crashing_at_start_ends_in_failed_with_the_reason_and_the_remedy(var):
    var.start(wait=False, engine_flags=["--say", "oom", "--exit-at-start", "1"])
    var.until(lambda: var.states() == {"engine-0": "failed"})
    detail = var.replica()["detail"]
    assert "gave up after 3 tries" in detail
    assert "Buy more memory." in detail
    assert var.child("engine-0")["restarts"] == 2
    log = var.log.read_text()
    assert "engine-0 said: oom" in log
    assert log.count("backoff -> starting") == 2


def test_the_reason_holds_the_last_line_where_no_remedy_is_known(var):
    var.start(wait=False, engine_flags=["--exit-at-start", "0", "--say", "bye"])
    var.until(lambda: var.states() == {"engine-0": "failed"})
    assert "last line: bye" in var.replica()["detail"]


def test_a_frozen_engine_under_work_is_unpublished_and_then_replaced(var):
    var.start(policy={"hung_seconds": 1})
    var.engine("work 1")
    time.sleep(0.5)  # work that moves is left alone for as long as it likes
    assert var.replica()["state"] == "ready"
    var.engine("freeze")
    var.until(lambda: var.replica()["incarnation"] == 2 and var.replica()["state"] == "ready")
    seen = [r["state"] for fleet in var.fleets() for r in fleet["replicas"]]
    assert [state for n, state in enumerate(seen) if state != seen[n - 1]][-5:] == [
        "suspect", "hung", "backoff", "starting", "ready",
    ]  # fmt: skip
    assert "hung: " in var.log.read_text()


def test_an_engine_that_freezes_for_a_while_is_suspect_and_recovers(var):
    var.start(policy={"hung_seconds": 4})
    pid = var.child("engine-0")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        var.until(lambda: var.replica()["state"] == "suspect")
    finally:
        os.kill(pid, signal.SIGCONT)
    var.until(lambda: var.replica()["state"] == "ready")
    assert var.replica()["incarnation"] == 1


def test_a_killed_worker_is_replaced_without_a_refused_connection(var):
    var.start()
    port = var.status()["gateway"]["port"]
    engine = var.child("engine-0")["pid"]
    first = whoami(port)
    os.kill(var.child("worker-0")["pid"], signal.SIGKILL)
    assert whoami(port) != first  # it waited in the backlog for the next worker
    assert var.child("engine-0")["pid"] == engine
    assert var.child("worker-0")["restarts"] == 1


def test_a_silent_worker_is_replaced(var):
    var.start()
    frozen = var.child("worker-0")["pid"]
    os.kill(frozen, signal.SIGSTOP)
    var.until(lambda: dead(frozen), 9)
    var.until(lambda: var.child("worker-0")["state"] == "ready")
    assert "silent" in var.log.read_text()


def test_a_frozen_worker_does_not_outlive_the_supervisor(var):
    var.start()
    os.kill(var.child("worker-0")["pid"], signal.SIGSTOP)
    var.process.kill()
    var.process.wait()
    var.until(lambda: not var.pids(), 5)


def test_a_replaced_worker_is_told_of_the_fleet(var):
    var.start()
    os.kill(var.child("worker-0")["pid"], signal.SIGKILL)
    var.until(lambda: var.child("worker-0")["state"] == "ready" and var.child("worker-0")["restarts"] == 1)
    before = len(var.fleets())
    assert var.fleets()[-1]["replicas"][0]["state"] == "ready"
    assert var.fleets()[-1]["version"] == var.status()["fleet"]["version"]
    assert before >= 2


def test_a_worker_that_cannot_start_ends_the_start_with_3(var):
    var.start(wait=False, control_flags=["--exit-at-start", "3"])
    assert var.wait() == 3
    assert "control could not start: port 1 is in use" in var.log.read_text()
    assert var.pids() == []


def test_a_worker_that_keeps_dying_is_tried_again_more_slowly(var):
    var.start(wait=False, worker_flags=["--exit-at-start", "1"])
    var.until(lambda: var.log.read_text().count("worker-0 ended") >= 3)
    log = var.log.read_text()
    assert "another at once" in log
    assert "another in " in log


def test_a_port_in_use_is_said_with_3(var):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        var.start(wait=False, port=port)
        assert var.wait() == 3
    assert f"port {port} on 127.0.0.1 is in use" in var.log.read_text()
    assert "gateway.port" in var.log.read_text()
    assert "Traceback" not in var.log.read_text()


def test_a_second_one_on_the_same_folder_is_refused_and_harms_nothing(var, tmp_path):
    var.start()
    before = set(var.pids())
    (tmp_path / "second").mkdir()
    second = Tree(tmp_path / "second")
    second.data_folder = var.data_folder
    second.start(wait=False)
    assert second.wait() == 3
    assert f"already runs on {var.data_folder} (process {var.process.pid})" in second.log.read_text()
    assert set(var.pids()) == before
    assert var.states() == {"engine-0": "ready"}


def test_a_folder_that_cannot_be_made_is_said_with_3(var):
    var.data_folder.parent.joinpath("file").write_text("")
    var.data_folder = var.data_folder.parent / "file" / "var"
    var.start(wait=False)
    assert var.wait() == 3
    assert "cannot be used" in var.log.read_text()
    assert "Traceback" not in var.log.read_text()


def test_scale_up_and_down(var):
    var.start()
    assert var.order(command="scale", replicas=3) == {"done": True, "ok": True, "message": "3 replicas (there were 1)"}
    assert var.states() == {"engine-0": "ready", "engine-1": "ready", "engine-2": "ready"}
    var.in_flight(engine_2=1)
    answers = request(var.socket, {"command": "scale", "replicas": 1}, seconds=30)
    assert next(answers) == {"done": False, "message": "draining engine-2"}
    assert var.states()["engine-2"] == "draining"
    var.in_flight()
    assert list(answers)[-1]["ok"]
    assert var.states() == {"engine-0": "ready"}


def test_scale_beyond_what_fits_changes_nothing(var):
    var.start()
    answer = var.order(command="scale", replicas=9)
    assert (answer["ok"], answer["message"]) == (False, "no room for replica 4")
    assert var.states() == {"engine-0": "ready"}
    assert var.order(command="scale", replicas=-1)["ok"] is False


def test_the_ordered_fleet_outlives_the_supervisor(var):
    var.start()
    var.order(command="scale", replicas=2)
    var.order(command="drain", replica="engine-1")
    var.stop()
    var.start(wait=False)
    var.until(lambda: var.states() == {"engine-0": "ready", "engine-1": "stopped"})
    assert var.order(command="restart", replica="engine-1")["ok"]
    assert var.states() == {"engine-0": "ready", "engine-1": "ready"}


def test_a_changed_configuration_beats_the_journal(var):
    var.start()
    var.order(command="scale", replicas=3)
    var.stop()
    var.start(replicas=2)
    assert list(var.states()) == ["engine-0", "engine-1"]


def test_a_scale_cut_short_by_kill_9_is_resumed(var):
    var.start(engine_flags=["--load-seconds", "0.5"])
    answers = request(var.socket, {"command": "scale", "replicas": 3}, seconds=30)
    next(answers)
    assert json.loads((var.data_folder / "fleet.json").read_text())["order"] == {"command": "scale", "replicas": 3}
    var.process.kill()
    var.process.wait()
    var.start(wait=False)
    var.until(lambda: list(var.states().values()) == ["ready"] * 3)
    assert json.loads((var.data_folder / "fleet.json").read_text())["order"] is None


def test_a_broken_journal_is_set_aside(var):
    var.data_folder.mkdir()
    (var.data_folder / "fleet.json").write_text('{"replicas": ')
    var.start()
    assert "set aside" in var.log.read_text()
    assert (var.data_folder / "fleet.json.broken").exists()


def test_drain_waits_for_what_runs_and_says_draining_first(var):
    var.start(replicas=2)
    var.in_flight(engine_1=2)
    answers = request(var.socket, {"command": "drain", "replica": "engine-1"}, seconds=30)
    next(answers)
    var.until(lambda: var.fleets()[-1]["replicas"][1]["state"] == "draining")
    pid = var.child("engine-1")["pid"]
    assert not dead(pid)
    var.in_flight()
    assert list(answers)[-1]["ok"]
    assert dead(pid)
    assert var.states() == {"engine-0": "ready", "engine-1": "stopped"}


def test_drain_does_not_wait_beyond_its_deadline(var):
    var.start(policy={"drain_seconds": 0.3})
    var.in_flight(engine_0=1)
    assert var.order(command="drain", replica="engine-0")["ok"]


def test_rolling_restart_keeps_all_but_one_up(var):
    var.start(replicas=3)
    assert var.order(command="restart", replica=None)["message"] == "restarted engine-0, engine-1, engine-2"
    up_at_worst = min(
        sum(r["state"] in ("ready", "busy") for r in fleet["replicas"])
        for fleet in var.fleets()
        if any(r["incarnation"] == 2 or r["state"] == "draining" for r in fleet["replicas"])
    )
    assert up_at_worst == 2
    assert all(var.replica(f"engine-{n}")["incarnation"] == 2 for n in range(3))


def test_one_order_at_a_time(var):
    var.start(engine_flags=["--load-seconds", "0.5"])
    answers = request(var.socket, {"command": "restart", "replica": None}, seconds=30)
    next(answers)
    refused = var.order(command="scale", replicas=2)
    assert not refused["ok"]
    assert "restart all" in refused["message"]
    assert list(answers)[-1]["ok"]


@pytest.mark.parametrize(
    "other",
    [
        {"command": "restart", "replica": "engine-0"},
        {"command": "restart", "replica": "engine-1"},
        {"command": "scale", "replicas": 1},
        {"command": "drain", "replica": "engine-1"},
    ],
)
def test_no_order_waits_behind_a_long_drain(var, other):
    """It is told at once what is in its way, and the drain goes on."""
    var.start(replicas=2, policy={"drain_seconds": 60})
    var.in_flight(engine_0=1)
    answers = request(var.socket, {"command": "drain", "replica": "engine-0"}, seconds=30)
    next(answers)
    refused = var.order(**other)
    assert not refused["ok"]
    assert refused["message"] == "another order is being carried out (drain engine-0): try again when it is done"
    assert var.states() == {"engine-0": "draining", "engine-1": "ready"}
    var.in_flight()
    assert list(answers)[-1]["ok"]


def test_an_order_goes_on_when_its_caller_leaves(var):
    var.start(engine_flags=["--load-seconds", "0.3"])
    answers = request(var.socket, {"command": "scale", "replicas": 2}, seconds=30)
    next(answers)
    answers.close()
    var.until(lambda: list(var.states().values()) == ["ready", "ready"])


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"nonsense\n", b"[]\n", b'{"command":1}\n', b'{"command":"scale"}\n', b"x" * 200_000]
)
def test_nonsense_on_the_command_socket_gets_a_sentence(var, line):
    var.start(replicas=0, wait=False)
    var.until(var.socket.exists)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(15)
        var.until(lambda: not caller.connect_ex(str(var.socket)))
        threading.Thread(target=lambda: caller.sendall(line), daemon=True).start()
        if not line.endswith(b"\n"):
            time.sleep(0.2)
            caller.shutdown(socket.SHUT_WR)
        answer = json.loads(caller.makefile().readline())
    assert answer["ok"] is False
    assert answer["message"]


def test_an_idle_tree_costs_next_to_nothing(var):
    """The budget of an idle supervisor is 0.3 % of a core with probes every 2 s; these come 20 times as often."""
    var.start(replicas=1)
    ticks = os.sysconf("SC_CLK_TCK")

    def used() -> float:
        fields = Path(f"/proc/{var.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    before = used()
    time.sleep(3)
    assert (used() - before) / 3 < 0.06
