"""What is kept of a child's output."""

import pytest
from vitalis_serve.supervise.output import MAX_LINE_BYTES, Output


@pytest.fixture
def path(tmp_path):
    return tmp_path / "engine-0.log"


def test_lines_are_whole_however_they_arrive(path):
    seen = []
    output = Output(path, seen.append)
    for byte in b"one\ntwo \xc3\xa4\n\nthr":
        output.feed(bytes([byte]))
    assert seen == ["one", "two ä"]
    output.close()
    assert seen == ["one", "two ä", "thr"]
    assert path.read_bytes() == b"one\ntwo \xc3\xa4\n\nthr"


def test_the_last_lines_are_bounded_in_number_and_length(path):
    output = Output(path, last=3)
    output.feed(b"x" * (3 * MAX_LINE_BYTES) + b"\n" + b"".join(b"%d\n" % n for n in range(1000)))
    assert output.last_lines() == ("997", "998", "999")
    output.feed(b"y" * (10 * MAX_LINE_BYTES))
    assert all(len(line) <= MAX_LINE_BYTES for line in output.last_lines())
    output.close()


def test_a_progress_bar_is_many_lines(path):
    output = Output(path)
    output.feed(b"10%\r20%\r30%")
    assert output.last_lines() == ("10%", "20%")
    output.close()


def test_the_files_are_bounded(path):
    output = Output(path, max_bytes=100, keep=2)
    for n in range(100):
        output.feed(b"%030d\n" % n)
    output.close()
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["engine-0.log", "engine-0.log.1", "engine-0.log.2"]
    assert all(file.stat().st_size <= 100 for file in files)
    assert path.read_text().endswith(f"{99:030d}\n")


def test_a_disk_that_is_full_loses_lines_of_the_file_only(path):
    seen = []
    output = Output(type(path)("/dev/full"), seen.append)
    output.feed(b"hello\n")
    assert seen == ["hello"]
    assert output.lost_bytes == 6
    output.close()


def test_a_new_process_has_said_nothing_yet(path):
    output = Output(path)
    output.feed(b"old\nhal")
    output.clear()
    output.feed(b"new\n")
    assert output.last_lines() == ("new",)
    output.close()
