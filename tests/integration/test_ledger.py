"""From the spool to the store and to whoever asks: a real control process, and the real writer in processes that are
killed."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vitalis_serve.control.client import Refused
from vitalis_serve.spool.files import files
from vitalis_serve.spool.writer import SpoolWriter

from tests.support.control import Control
from tests.support.postgres import Postgres
from tests.support.spooling import Worker, closed, opened, read_log
from tests.support.stores import Place

SEGMENT = 1 << 16
TODAY = int(time.time()) // 86_400 * 86_400.0


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def started(folder: Path, place: Place, **options: Any) -> Control:
    folder.mkdir(exist_ok=True)
    mine = {"spool_folder": str(folder / "spool"), "spent_path": str(folder / "spent.json")}
    return Control(folder, **{**place.options(), **mine, **options}).wait_ready()


@contextmanager
def control_on(folder: Path, place: Place, **options: Any) -> Iterator[Control]:
    control = started(folder, place, **options)
    try:
        yield control
    except BaseException:
        print(control.log_path.read_text())
        raise
    finally:
        control.stop()


def metric(control: Control, name: str) -> float:
    wanted = urllib.request.Request(f"{control.address}/metrics", headers={"authorization": f"Bearer {control.token}"})
    with urllib.request.urlopen(wanted, timeout=60) as answer:
        content = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(content) for s in family.samples]
    return next(s.value for s in samples if s.name == name)


def stored(place: Place) -> dict[str, str]:
    """Outcome by id; an id cannot be there twice."""
    return {str(name): str(outcome) for name, outcome in place.run("SELECT id, outcome FROM usage")}


def check(place: Place, log: Path) -> None:
    """What workers promised: each closed request is there as it ended, and nothing that nobody opened; what was open at
    the kill is there as cut, or was not written at all."""
    begun, ended = read_log(log)
    found = stored(place)
    assert len(ended) > 100
    assert [found[name] for name in ended] == ["ok"] * len(ended)
    assert found.keys() <= begun.keys()
    assert {found[name] for name in found.keys() - ended.keys()} <= {"cut", "ok"}
    assert "cut" in found.values()


def drain(control: Control) -> int:
    """How many requests are in the store; all that the spool holds is."""
    deadline = time.monotonic() + 60
    while True:
        answer = control.call("GET", "/v1/usage?from=1970-01-01&to=9999-12-31")
        if not answer["waiting"]["records"]:
            return int(answer["total"]["requests"])
        assert time.monotonic() < deadline, answer["waiting"]


def test_control_and_workers_killed_at_any_moment_lose_and_double_nothing(tmp_path: Path, place: Place) -> None:
    seed = random.Random(place.url)
    folder, log = tmp_path / "host", tmp_path / "log"
    folder.mkdir()
    workers = [Worker(folder / "spool", log, f"worker-{n}") for n in range(2)]
    control = started(folder, place)
    try:
        for turn in range(3):
            time.sleep(0.2 + seed.random() * 0.8)
            if turn % 2:
                workers[0].kill()
                workers[0] = Worker(folder / "spool", log, "worker-0")
            control.process.kill()
            control.process.wait()
            control.stop()
            control = started(folder, place)
        for worker in workers:
            worker.kill()
        total = drain(control)
        check(place, log)
        assert total == len(stored(place))
        assert metric(control, "vitalis_ledger_duplicates_total") == 0
        # What limits begin with agrees with the store, though it is counted apart.
        tokens = place.run("SELECT SUM(prompt_tokens + completion_tokens) FROM usage")[0][0]
        spent = folder / "spent.json"
        until(
            lambda: (
                spent.exists()
                and sum(day.get("tenant:acme", 0) for day in json.loads(spent.read_text())["days"].values()) == tokens
            ),
            "spent.json agrees",
        )
    finally:
        for worker in workers:
            worker.kill()
        control.stop()


def test_postgresql_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path, postgres: Postgres) -> None:
    """A server that does not even keep every commit: what it loses is drained again."""
    place = Place(tmp_path / "unused", postgres.database())
    folder, log = tmp_path / "host", tmp_path / "log"
    with control_on(folder, place) as control:
        worker = Worker(folder / "spool", log, "worker-0")
        try:
            for _ in range(3):
                time.sleep(0.7)
                postgres.kill()
                time.sleep(0.3)
                postgres.start()
            postgres.stop()
            before = len(read_log(log)[1])
            until(lambda: len(read_log(log)[1]) > before + 200, "work goes on")
            until(lambda: metric(control, "vitalis_spool_records") > 150, "what waits is told")
            assert metric(control, "vitalis_ledger_store_away") == 1
            assert metric(control, "vitalis_spool_bytes") > 10_000
            assert metric(control, "vitalis_spool_oldest_seconds") > 0
            with pytest.raises(Refused, match=r"\d+ records of finished requests .* wait safely on this host's disk"):
                control.call("GET", "/v1/usage")
            postgres.start()
        finally:
            worker.kill()
            postgres.restart()
        until(lambda: metric(control, "vitalis_ledger_store_away") == 0, "the store is back")
        ended = read_log(log)[1].keys()
        until(lambda: stored(place).keys() >= ended, "all is drained")
        drain(control)
        check(place, log)
        assert metric(control, "vitalis_spool_records") == 0
        log_of_control = control.log_path.read_text()
    assert log_of_control.count("usage cannot be stored") <= 5
    assert "usage is stored again" in log_of_control


def test_a_locked_store_keeps_requests_waiting_and_says_how_many(tmp_path: Path) -> None:
    place = Place(tmp_path / "v.db")
    with control_on(tmp_path / "host", place) as control:
        writer = SpoolWriter(tmp_path / "host" / "spool", "w", segment_bytes=SEGMENT)
        with closing(sqlite3.connect(place.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(20):
                writer.close(closed(number, ended=TODAY))
            until(lambda: metric(control, "vitalis_spool_records") == 20, "20 wait")
            answer = control.call("GET", "/v1/usage")
            assert answer["waiting"]["records"] == 20
            assert answer["usage"] == []
            other.execute("ROLLBACK")
        assert drain(control) == 20
        writer.stop()


def test_hosts_that_share_a_store_drain_their_own(tmp_path: Path, postgres_url: str) -> None:
    """Even where their files have the same names."""
    place = Place(tmp_path / "unused", postgres_url)
    for number, host in enumerate(("one", "other")):
        writer = SpoolWriter(tmp_path / host / "spool", "w", segment_bytes=SEGMENT)
        for n in range(10):
            writer.close(closed(100 * number + n))
        writer.stop()
        (found,) = files(tmp_path / host / "spool")
        found.rename(found.with_name("w-1-1-000001.spool"))
    with control_on(tmp_path / "one", place) as one, control_on(tmp_path / "other", place) as other:
        drain(one)
        assert drain(other) == 20
    assert len(place.run("SELECT name FROM spool_files")) == 2


def test_drained_files_go_after_a_while_and_are_never_drained_again(tmp_path: Path) -> None:
    place = Place(tmp_path / "v.db")
    spool = tmp_path / "host" / "spool"
    writer = SpoolWriter(spool, "w", segment_bytes=SEGMENT)
    for number in range(10):
        writer.close(closed(number, ended=TODAY))
    writer.stop()
    (path,) = files(spool)
    content = path.read_bytes()
    with control_on(tmp_path / "host", place) as control:
        assert drain(control) == 10
        time.sleep(1)
        assert files(spool) == [path]
    os.utime(path, (time.time() - 200, time.time() - 200))
    with control_on(tmp_path / "host", place) as control:
        until(lambda: not files(spool), "the file goes")
        path.write_bytes(content)  # as a disk that was put back would have it
        place.run("DELETE FROM usage")
        time.sleep(1)
        assert drain(control) == 0


def test_old_days_are_rolled_up_and_nothing_changes_for_who_asks(tmp_path: Path, place: Place) -> None:
    spool = tmp_path / "host" / "spool"
    writer = SpoolWriter(spool, "w", segment_bytes=SEGMENT)
    for number in range(30):
        writer.close(closed(number, ended=TODAY - 86_400 * (number % 3) * 50))
    everything = "/v1/usage?by=day,tenant&from=1970-01-01"
    with control_on(tmp_path / "host", place) as control:
        assert drain(control) == 30
        before = control.call("GET", everything)
        assert len(before["usage"]) == 3
    with control_on(tmp_path / "host", place, keep_days=40) as control:
        until(lambda: metric(control, "vitalis_ledger_rolled_up_total") == 20, "two days of three are rolled up")
        assert control.call("GET", everything) == before
        singles = control.call("GET", "/v1/usage/requests?from=1970-01-01")["requests"]
        assert [int(found["id"], 16) % 3 for found in singles] == [0] * 10
        writer.close(closed(1000, ended=TODAY - 86_400 * 50))  # late
        assert drain(control) == 31
    with control_on(tmp_path / "host", place, keep_days=40, keep_daily_days=80) as control:
        until(lambda: drain(control) == 21, "sums are kept for 80 days")
    writer.stop()


# Who asks


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """A control whose tenants have used something."""
    folder = tmp_path_factory.mktemp("used")
    with control_on(folder, Place(folder / "vitalis.db")) as control:
        (folder / "config.yaml").write_text(f"profile: cpu-tiny\ndata_folder: {folder}\n")
        (folder / "profiles").mkdir()
        (folder / "profiles" / "cpu-tiny.yaml").write_text("")
        for name in ("acme", "other", "idle"):
            control.call("POST", "/v1/tenants", {"name": name})
        key = control.call("POST", "/v1/keys", {"tenant": "acme"})["id"]
        writer = SpoolWriter(folder / "spool", "w", segment_bytes=SEGMENT)
        for number in range(6):
            writer.open(opened(number))
            fields: dict[str, Any] = {"tenant": "other", "key": "k9"} if number == 5 else {"key": key}
            if number == 4:
                fields |= {"outcome": "cut", "code": "worker_died", "completion_estimated": True, "route": "reason"}
            writer.close(closed(number, ended=1_790_000_000.0 + 86_400 * number, **fields))
        yield control
        writer.stop()


def command(control: Control, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "vitalis_serve", *words]
    environ = {**os.environ, "VITALIS_CONFIG": str(control.folder / "config.yaml")}
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)


RANGE = ("--from", "2026-09-21", "--to", "2026-09-30")


def test_sums_over_the_api(used: Control) -> None:
    answer = used.call("GET", "/v1/usage?by=tenant,route&from=2026-09-21&to=2026-09-25")
    row = {"prompt_tokens": 7, "cached_tokens": 2, "completion_tokens": 5, "reasoning_tokens": 1}
    assert answer == {
        "from": "2026-09-21",
        "to": "2026-09-25",
        "by": ["tenant", "route"],
        "usage": [
            {"tenant": "acme", "route": "chat", "requests": 4, "failed": 0, "estimated": 0}
            | {name: 4 * count for name, count in row.items()},
            {"tenant": "acme", "route": "reason", "requests": 1, "failed": 1, "estimated": 1} | row,
        ],
        "total": {"requests": 5, "failed": 1, "estimated": 1} | {name: 5 * count for name, count in row.items()},
        "waiting": {"records": 0, "bytes": 0, "oldest_seconds": 0.0},
    }
    days = used.call("GET", "/v1/usage?by=day&tenant=acme&from=2026-09-22&to=2026-09-23")["usage"]
    assert [day["day"] for day in days] == ["2026-09-22", "2026-09-23"]
    today = datetime.now(UTC).date()
    month = used.call("GET", "/v1/usage")
    assert (month["from"], month["to"]) == (str(today.replace(day=1)), str(today))
    assert used.call("GET", "/v1/usage?tenant=idle&from=2026-09-01")["usage"] == []
    used_at = {key["tenant"]: key["last_used_at"] for key in used.call("GET", "/v1/keys")["keys"]}
    assert used_at == {"acme": 1_790_000_000 + 86_400 * 4}


def test_single_requests_over_the_api_page_by_page(used: Control) -> None:
    path = "/v1/usage/requests?from=2026-09-01&to=2026-09-30&limit=4"
    first = used.call("GET", path)
    second = used.call("GET", f"{path}&before={first['next']}")
    assert [found["request_id"] for found in (*first["requests"], *second["requests"])] == [
        f"r{n}" for n in (5, 4, 3, 2, 1, 0)
    ]
    assert second["next"] is None
    (cut,) = used.call("GET", f"{path}&route=reason")["requests"]
    assert (cut["outcome"], cut["code"], cut["completion_estimated"], cut["class"]) == (
        "cut", "worker_died", True, "standard",
    )  # fmt: skip
    assert "day" not in cut
    assert len(used.call("GET", f"{path}&request_id=r2")["requests"]) == 1


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("from=2026-13-01", "from: '2026-13-01' is no day: write YYYY-MM-DD, for example 2026-11-01"),
        ("to=yesterday", "to: 'yesterday' is no day: write YYYY-MM-DD, for example 2026-11-01"),
        ("from=2026-W40-4", "from: '2026-W40-4' is no day: write YYYY-MM-DD, for example 2026-11-01"),
        ("from=2026-09-02&to=2026-09-01", "from 2026-09-02 is after to 2026-09-01: give the earlier day first"),
        ("by=tenat", "by: there is no group 'tenat'; did you mean 'tenant'?"),
        ("by=", "by: there is no group ''; there are: day, key, route, tenant"),
        ("tenant=acm", "there is no tenant 'acm'; did you mean 'acme'?"),
        ("route=chad", "nothing was used on a route 'chad'; did you mean 'chat'?"),
        ("key=nobody", "there is no key 'nobody'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(used: Control, query: str, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        used.call("GET", f"/v1/usage?{query}")
    assert str(refused.value).startswith(sentence)
    words = [f"--{part}" for part in query.split("&")]
    ended = command(used, "usage", *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"vitalis-serve: {sentence}")
    assert ended.stderr.count("\n") == 1


def test_places_of_pages_that_nobody_gave_are_refused(used: Control) -> None:
    for place in ("x", "-1-a", "1" * 30):
        with pytest.raises(Refused, match="give `next` of the answer before"):
            used.call("GET", f"/v1/usage/requests?before={place}")


def test_usage_as_a_table(used: Control) -> None:
    table = command(used, "usage", "--by", "tenant,day", *RANGE, "--tenant", "other")
    assert table.returncode == 0, table.stderr
    *lines, note = table.stdout.splitlines()
    assert note.startswith("2026-09-21 to 2026-09-30, UTC; tokens: cached ones are among the prompt's")
    assert lines == [
        "tenant  day         requests  failed  estimated  prompt  cached  completion  reasoning",
        "other   2026-09-26         1       0          0       7       2           5          1",
        "total                      1       0          0       7       2           5          1",
    ]


def test_usage_as_csv_and_json(used: Control) -> None:
    table = command(used, "usage", *RANGE, "--csv")
    assert table.stdout.splitlines() == [
        "tenant,requests,failed,estimated,prompt_tokens,cached_tokens,completion_tokens,reasoning_tokens",
        "acme,5,1,1,35,10,25,5",
        "other,1,0,0,7,2,5,1",
    ]
    document = json.loads(command(used, "usage", *RANGE, "--json", "--by", "key,route").stdout)
    assert document == used.call("GET", "/v1/usage?by=key,route&from=2026-09-21&to=2026-09-30")
    both = command(used, "usage", "--csv", "--json")
    assert (both.returncode, both.stderr) == (2, "vitalis-serve: --csv and --json: give one of the two\n")
