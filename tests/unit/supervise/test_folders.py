"""Folders, the lock, the journal and orphans' notes: small things on disk."""

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from vitalis_serve.errors import StartError
from vitalis_serve.supervise import folders, orphans
from vitalis_serve.supervise.commands import NotRunning, request
from vitalis_serve.supervise.journal import Journal


def test_folders_are_private(tmp_path):
    os.umask(os.umask(0o022))
    run = folders.prepare(tmp_path / "var")
    assert run == tmp_path / "var" / "run"
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "var", run)] == [0o700, 0o700]


def test_a_folder_of_other_things_is_refused_and_stays_as_it_is(tmp_path):
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    (home / "notes").write_text("")
    home.chmod(0o755)
    (home / "run").chmod(0o755)
    with pytest.raises(StartError, match=r"data folder .*/home holds other things .*: set data_folder"):
        folders.prepare(home)
    assert home.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in home.iterdir()) == ["notes", "run"]


@pytest.mark.parametrize("ours", ["", "vitalis.db", "fleet.json", "run/"])
def test_an_open_folder_that_is_empty_or_ours_is_closed(tmp_path, ours):
    folder = tmp_path / "var"
    folder.mkdir()
    if ours.endswith("/"):
        (folder / ours).mkdir(mode=0o700)
    elif ours:
        (folder / ours).write_text("")
    folder.chmod(0o755)
    folders.prepare(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_may_hold_other_things(tmp_path):
    (tmp_path / "var").mkdir(mode=0o700)
    (tmp_path / "var" / "notes").write_text("")
    assert folders.prepare(tmp_path / "var").is_dir()


def test_sockets_of_a_deep_data_folder_have_short_paths(tmp_path):
    deep = tmp_path / ("d" * 100) / "var"
    runtime = tmp_path / "x"
    run = folders.run_folder(deep, {"XDG_RUNTIME_DIR": str(runtime)})
    assert run.parent == runtime
    assert run != folders.run_folder(deep.parent, {"XDG_RUNTIME_DIR": str(runtime)})
    assert len(os.fsencode(folders.run_folder(deep, {}) / "supervisor.sock")) < 104


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"data folder .*file/var cannot be used \(Not a directory"):
        folders.prepare(tmp_path / "file" / "var")


def test_a_full_disk_is_one_sentence():
    with pytest.raises(OSError, match="No space left"):
        Path("/dev/full").write_bytes(b"x")  # what prepare's trial would meet
    with pytest.raises(StartError, match="cannot be used"):
        folders.prepare(Path("/proc/no-such-place"))


def test_the_lock_is_exclusive_and_leaves_no_file(tmp_path):
    first = folders.Lock(tmp_path / "lock", tmp_path)
    first.acquire()
    with pytest.raises(StartError, match=f"process {os.getpid()}"):
        folders.Lock(tmp_path / "lock", tmp_path).acquire()
    first.release()
    assert not (tmp_path / "lock").exists()
    again = folders.Lock(tmp_path / "lock", tmp_path)
    again.acquire()
    again.release()


def test_the_journal_keeps_what_was_ordered(tmp_path):
    path = tmp_path / "fleet.json"
    Journal(path, 1).write(replicas=3, stopped=("engine-2",), order={"command": "scale", "replicas": 3})
    found = Journal(path, 1).desired
    assert (found.replicas, found.stopped, found.order) == (3, ("engine-2",), {"command": "scale", "replicas": 3})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_changed_configuration_beats_the_journal(tmp_path):
    path = tmp_path / "fleet.json"
    Journal(path, 1).write(replicas=3, stopped=("engine-0",))
    found = Journal(path, 2).desired
    assert (found.replicas, found.configured, found.stopped) == (2, 2, ("engine-0",))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"replicas": "many"}', json.dumps({"replicas": 1, "configured": 1})])
def test_a_broken_journal_is_set_aside(tmp_path, text):
    path = tmp_path / "fleet.json"
    path.write_text(text)
    journal = Journal(path, 2)
    assert journal.desired.replicas == 2
    assert str(path) in journal.complaint
    assert (tmp_path / "fleet.json.broken").read_text() == text


def test_asking_where_nobody_runs_says_so(tmp_path):
    with pytest.raises(NotRunning, match="no supervisor answers"):
        list(request(tmp_path / "supervisor.sock", {"command": "status"}))


def start(mark: str, **options: object) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen(["sleep", "100"], env={orphans.VARIABLE: mark, "PATH": os.environ["PATH"]}, **options)
    while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\n":  # not yet exec'ed
        time.sleep(0.001)
    return child


def test_the_sweep_takes_marked_processes_and_nobody_else(tmp_path):
    ours, other_tree, other_name = start("t1:engine-0"), start("t2:engine-0"), start("t1:engine-01")
    try:
        assert orphans.find("t1:engine-0") == [ours.pid]
        assert set(orphans.find("t1:")) == {ours.pid, other_name.pid}
        assert asyncio.run(orphans.sweep("t1:")) == (2, [])
        assert other_tree.poll() is None
    finally:
        for child in (ours, other_tree, other_name):
            child.kill()
            child.wait()


def test_a_noted_session_is_ours_although_the_mark_is_gone(tmp_path):
    """As with vLLM's workers, which write their title over their environment."""
    leader = start("else", start_new_session=True)
    try:
        orphans.note_session(tmp_path, "engine-0", leader.pid)
        assert orphans.noted_sessions(tmp_path) == {leader.pid}
        assert orphans.find("t1:", {leader.pid}) == [leader.pid]
        number, started, boot = (tmp_path / "engine-0.session").read_text().split()
        (tmp_path / "engine-0.session").write_text(f"{number} {int(started) - 1} {boot}")
        assert orphans.noted_sessions(tmp_path) == set(), "the number belongs to somebody else now"
        (tmp_path / "engine-0.session").write_text(f"{number} {started} another-boot")
        assert orphans.noted_sessions(tmp_path) == set()
        orphans.forget_session(tmp_path, "engine-0")
        assert list(tmp_path.iterdir()) == []
    finally:
        leader.send_signal(signal.SIGKILL)
        leader.wait()
