"""The journal from which a search goes on."""

import pytest
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.searching import Journal, Point

ASKED = {"scenario": "short-chat", "first": 1.0}


def test_what_was_learnt_is_there_after_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "sweep" / "journal.jsonl"
    journal = Journal(path, ASKED)
    assert not journal.resumed
    journal.add({"point": Point(load=2.0, goodput=1.5)})
    journal.add({"point": Point(load=4.0, missed=["TTFT p99"])})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    again = Journal(path, ASKED)
    assert [entry["point"]["load"] for entry in again.entries] == [2.0]
    again.add({"point": Point(load=8.0)})
    assert [entry["point"]["load"] for entry in Journal(path, ASKED).entries] == [2.0, 8.0]


def test_a_kill_before_the_first_line_was_whole_begins_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"asked": {"sce')
    assert not Journal(path, ASKED).resumed
    assert Journal(path, ASKED).entries == []


def test_another_search_is_not_mixed_with_this_one(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, ASKED)
    with pytest.raises(LoadFailure, match="holds a search with another first, seed: give the same options") as raised:
        Journal(path, {"scenario": "short-chat", "first": 2.0, "seed": 1})
    assert raised.value.code == Exit.BAD_INPUT


def test_another_file_is_left_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("no journal\n")
    with pytest.raises(LoadFailure, match="line 1 is not what a search writes"):
        Journal(path, ASKED)
    assert path.read_text() == "no journal\n"


def test_a_full_disk_is_one_sentence(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, ASKED)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(LoadFailure, match=r"cannot be written \(No space left on device\)") as raised:
        journal.add({"point": Point(load=2.0)})
    assert raised.value.code == Exit.CANNOT_WRITE
    assert journal.entries == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadFailure, match="cannot be written") as raised:
        Journal(tmp_path / "file" / "sweep" / "journal.jsonl", ASKED)
    assert raised.value.code == Exit.CANNOT_WRITE
