"""The run's folder: whole lines, and nothing lost by a disk that is full."""

from pathlib import Path

import pytest
from vitalis_load import reading, recorder
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.meter import Meter
from vitalis_load.records import Record, RepeatEnd, RunInfo, Sample

ANY = Record(task="chat", api="chat", scheduled=0, sent=0, ended=1)


def batch(records: int) -> recorder.Batch:
    meter = Meter(0)
    for _ in range(records):
        meter.begin(0)
        meter.end(ANY)
    meter.second(0, 0.1, 1, 1)
    return meter.batch(1.0)


def info(name: str = "a") -> RunInfo:
    return RunInfo(id=name, scenario={}, scale="small", url="", model="", repeats=1, processes=1, began_at=0)


def test_what_is_taken_can_be_read_again(tmp_path: Path) -> None:
    run = recorder.make_run(tmp_path, info())
    writer = recorder.Recorder(run / "repeat-1")
    writer.take(batch(3))
    writer.sample(Sample(at=1.0, gateway={"vitalis_in_flight": 2}))
    writer.take(batch(2))
    writer.end(RepeatEnd(began_at=5, seconds=2))
    (repeat,) = reading.read(run).repeats
    assert (len(repeat.records), len(repeat.client), len(repeat.samples), repeat.unread) == (5, 2, 1, 0)
    assert repeat.end == RepeatEnd(began_at=5, seconds=2)
    assert not (run / "repeat-1" / ".reserved").exists()


def test_a_full_disk_is_a_sentence_and_the_rest_is_kept(tmp_path: Path) -> None:
    run = recorder.make_run(tmp_path, info())
    (run / "repeat-1").mkdir()
    (run / "repeat-1" / "gaps.jsonl").touch()
    (run / "repeat-1" / "samples.jsonl").symlink_to("/dev/full")
    writer = recorder.Recorder(run / "repeat-1")
    writer.take(batch(3))
    with pytest.raises(LoadFailure, match="the disk of .* is full: make room") as raised:
        writer.sample(Sample(at=1.0))
    assert raised.value.code == Exit.CANNOT_WRITE
    writer.end(RepeatEnd(began_at=0, seconds=1, complete=False, reason="the disk is full"))
    (run / "repeat-1" / "samples.jsonl").unlink()
    (repeat,) = reading.read(run).repeats
    assert len(repeat.records) == 3
    assert repeat.end is not None
    assert not repeat.end.complete


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadFailure, match="cannot be written .*: name another folder with --out"):
        recorder.make_run(tmp_path / "file", info())
    recorder.make_run(tmp_path, info("twice"))
    with pytest.raises(LoadFailure, match="is there already"):
        recorder.make_run(tmp_path, info("twice"))
