"""What is made of a run's folder, however it ended."""

import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path

import msgspec
import pytest
from vitalis_load import reading, result
from vitalis_load.distributions import SHARES, Distribution
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.estimates import Estimate, estimate, t_quantile, t_share
from vitalis_load.figures import FIGURES
from vitalis_load.honesty import Honesty
from vitalis_load.metrics import Verdict
from vitalis_load.records import EngineSample, Record, RepeatEnd, Sample
from vitalis_load.report import numbers, page
from vitalis_load.timelines import EngineTimeline, GpuTimeline, Timeline, timeline

from tests.support import measured
from tests.support.measured import Load, Server

SMALL = Load(rate=8, seconds=12, warmup=2, cooldown=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured.write(tmp_path_factory.mktemp("run") / "a", Server(failing=0.1, engines=2), SMALL)


def test_figures_are_medians_over_repeats_of_what_was_due_in_the_window(run: Path) -> None:
    made = result.build(run)
    read = reading.read(run)
    counts, tails = [], []
    for repeat in read.repeats:
        inside = [record for record in repeat.records if 2 <= record.scheduled < 14]
        waits = sorted(r.first_token - r.sent for r in inside if r.first_token is not None and not r.error)
        counts.append(len(inside))
        tails.append(waits[math.ceil(0.99 * len(waits)) - 1])
    assert made.figures["requests"].values == counts
    assert made.figures["ttft_p99"].median == pytest.approx(statistics.median(tails))
    assert made.figures["ttft_p99"].min == pytest.approx(min(tails))
    assert made.honesty.requests == sum(counts)
    assert not made.partial
    assert sum(failure.count for failure in made.failures) == sum(
        1 for repeat in read.repeats for r in repeat.records if r.error and 2 <= r.scheduled < 14
    )
    refused = next(failure for failure in made.failures if failure.error == "http_429")
    assert (refused.retry_after, refused.detail[:3]) == (2, "Too")
    assert refused.share == pytest.approx(refused.count / sum(counts))


def test_what_is_stored_is_what_is_loaded_and_what_the_schema_says(run: Path, tmp_path: Path) -> None:
    made = result.build(run)
    result.store(made, tmp_path / "result.json")
    assert result.load(tmp_path / "result.json") == made
    document = json.loads((tmp_path / "result.json").read_bytes())
    described = json.loads(result.schema())
    told = described["$defs"][described["$ref"].rpartition("/")[2]]
    assert set(told["properties"]) == set(document)
    assert set(document["figures"]) <= set(FIGURES)


def test_a_killed_run_is_partial_and_keeps_what_was_measured(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "killed", Server(), SMALL)
    last = folder / "repeat-3"
    lines = (last / "requests.jsonl").read_bytes().splitlines(keepends=True)
    (last / "requests.jsonl").write_bytes(b"".join(lines[:40]) + lines[40][:30])
    (last / "end.json").unlink()
    (folder / "repeat-2" / "end.json").write_bytes(
        msgspec.json.encode(RepeatEnd(began_at=1.0, seconds=9.0, complete=False, reason="a worker was lost"))
    )
    made = result.build(folder)
    assert made.partial
    assert made.partial_reasons == ["repeat 2: a worker was lost", "repeat 3 was killed before its end"]
    assert made.repeats[2].summary.requests <= 40
    assert any("Torn lines" in note for note in made.honesty.notes)
    assert b"This run is partial" in page.run(made)


def test_a_run_that_stopped_while_it_warmed_up_is_still_shown(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "early", Server(), SMALL, repeats=1, changes={"repeats": 3})
    lines = (folder / "repeat-1" / "requests.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["ended"] < 1.9]
    (folder / "repeat-1" / "requests.jsonl").write_bytes(b"".join(kept))
    for name in ("client", "samples", "gaps"):
        (folder / "repeat-1" / f"{name}.jsonl").unlink()
    end = RepeatEnd(began_at=1.0, seconds=1.9, complete=False, reason="interrupted")
    (folder / "repeat-1" / "end.json").write_bytes(msgspec.json.encode(end))
    made = result.build(folder)
    assert made.repeats[0].window.end == pytest.approx(1.9)
    assert made.figures["requests"].values == [len(kept)]
    assert made.partial_reasons == ["repeat 1: interrupted", "2 of 3 repeats were not begun"]
    assert b"<h1>" in page.run(made)


def test_one_request_that_failed_is_a_page_too(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "one", Server(), SMALL, repeats=1)
    for name in ("client", "samples", "gaps"):
        (folder / "repeat-1" / f"{name}.jsonl").unlink()
    only = Record(task="t", api="chat", scheduled=3, sent=3, ended=3, error="connect", detail="refused <b>")
    measured.lines(folder / "repeat-1" / "requests.jsonl", [only])
    made = result.build(folder)
    assert made.figures["failed_share"].median == 1
    assert "output_tokens_per_second" in made.figures
    shown = page.run(made)
    assert b"refused &lt;b&gt;" in shown
    assert b"NaN" not in shown


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "run.json").unlink(), "has no run.json"),
        (lambda folder: (folder / "run.json").write_text("{"), "is not what a run writes there"),
        (lambda folder: (folder / "run.json").write_text('{"id": 3}'), "is not what a run writes there"),
        (lambda folder: [file.write_text("") for file in folder.glob("*/requests.jsonl")], "holds no finished request"),
    ],
)
def test_what_is_no_run_is_said_in_a_sentence(tmp_path: Path, spoil: object, words: str) -> None:
    folder = measured.write(tmp_path / "spoilt", Server(), Load(rate=2, seconds=2, warmup=0, cooldown=0), repeats=1)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(LoadFailure, match=words) as raised:
        result.build(folder)
    assert raised.value.code == Exit.BAD_INPUT
    assert str(folder) in raised.value.message


def test_results_that_cannot_be_used(tmp_path: Path) -> None:
    for content, words in (
        ("{", "is not of the schema"),
        ('{"schema": "other/2"}', "is of the schema other/2"),
        ("[]", "Expected `object`"),
    ):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(LoadFailure, match=words):
            result.load(tmp_path)
    with pytest.raises(LoadFailure, match="cannot be written") as raised:
        result.whole(Path("/proc/nowhere/result.json"), b"x")
    assert raised.value.code == Exit.CANNOT_WRITE


def test_a_limit_holds_where_it_does_in_most_repeats(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "slo", Server(), SMALL)
    tails = result.build(folder).figures["ttft_p99"].values
    for limit, kept in ((sorted(tails)[1] * 1001, True), (sorted(tails)[1] * 999, False)):
        information = json.loads((folder / "run.json").read_bytes())
        information["scenario"]["slo"] = {"ttft_p99_ms": limit}
        (folder / "run.json").write_text(json.dumps(information))
        made = result.build(folder)
        assert made.met is kept
        assert made.verdicts[0].value == pytest.approx(sorted(tails)[1] * 1000)


def test_a_server_that_fails_often_keeps_no_limit_by_those_it_answered(tmp_path: Path) -> None:
    for failing, kept in ((0.0, True), (0.3, False)):
        made = result.build(measured.write(tmp_path / str(failing), Server(failing=failing), SMALL))
        assert [(verdict.name, verdict.ok) for verdict in made.verdicts] == [
            ("ttft_p99_ms", kept),
            ("tpot_p99_ms", kept),
        ]
        assert ["more than a p99 leaves out" in verdict.why for verdict in made.verdicts] == [not kept] * 2


def test_tasks_have_limits_of_their_own(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "tasks", Server(), SMALL)
    tail = result.build(folder).repeats[0].summary.by_task["chat"].ttft
    assert tail is not None
    information = json.loads((folder / "run.json").read_bytes())
    information["scenario"] |= {"slo": {}}
    information["scenario"]["tasks"][0]["slo"] = {"ttft_p99_ms": 1e6, "tpot_p99_ms": 1e-3}
    information["scenario"]["tasks"].append({"name": "never asked", "slo": {"failed_share": 0}})
    (folder / "run.json").write_text(json.dumps(information))
    made = result.build(folder)
    assert [(verdict.task, verdict.name, verdict.ok) for verdict in made.verdicts] == [
        ("chat", "ttft_p99_ms", True), ("chat", "tpot_p99_ms", False), ("never asked", "failed_share", False),
    ]  # fmt: skip
    assert not made.met
    page.write(made, folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "chat: TPOT p99 was" in text
    assert "never asked: failed of all was not measured" in text


def test_timelines_count_every_token_and_request_once() -> None:
    dice = random.Random(3)
    records = []
    for _ in range(300):
        sent = dice.uniform(0, 40)
        first = sent + dice.uniform(0.01, 3)
        last = first + dice.uniform(0, 9)
        records.append(
            Record(
                task="t",
                api="chat",
                scheduled=sent,
                sent=sent,
                first_token=first,
                last_token=last,
                ended=last,
                completion_tokens=dice.randrange(1, 200),
                chunks=1,
            )  # fmt: skip
        )
    records.sort(key=lambda record: record.ended)
    line = timeline(repeat_of(records))
    assert sum(filled(line.output_tokens_per_second)) == pytest.approx(
        sum(r.completion_tokens or 0 for r in records), rel=1e-3
    )
    assert sum(filled(line.in_flight)) == pytest.approx(sum(r.ended - r.sent for r in records), rel=1e-3)
    assert sum(filled(line.scheduled)) == len(records)
    assert sum(filled(line.ended)) == len(records)


def test_an_engine_that_starts_anew_counts_from_nothing() -> None:
    def sample(at: float, tokens: float) -> Sample:
        engine = EngineSample(
            name="e",
            running=1,
            waiting=0,
            kv_usage=0.5,
            generation_tokens=tokens,
            prompt_tokens=0,
            cache_queries=tokens,
        )
        return Sample(at=at, engines=[engine])

    repeat = repeat_of([])
    repeat.samples = [sample(0.5, 1000), sample(1.5, 1100), sample(2.5, 40), sample(3.5, 140)]
    engine = timeline(repeat).engines["e"]
    assert sum(filled(engine.tokens_per_second)) == pytest.approx(240)
    assert set(engine.cache_hits) == {0.0}


def test_a_soak_of_hours_has_few_wide_bins() -> None:
    records = [
        Record(task="t", api="chat", scheduled=float(at), sent=float(at), ended=at + 1.0, first_token=at + 0.5)
        for at in range(0, 14_400, 10)
    ]
    line = timeline(repeat_of(records))
    assert line.bins <= 400
    assert line.bins * line.bin_seconds >= 14_400
    assert sum(filled(line.in_flight)) * line.bin_seconds == pytest.approx(1440, rel=1e-3)


def test_students_t() -> None:
    for freedom, known in ((1, 12.706), (2, 4.3027), (4, 2.7764), (10, 2.2281), (1000, 1.9623)):
        assert t_quantile(0.975, freedom) == pytest.approx(known, rel=1e-4)
        assert t_quantile(0.025, freedom) == pytest.approx(-known, rel=1e-4)
        assert t_share(known, freedom) == pytest.approx(0.975, abs=1e-4)
    over = estimate([1.0, 2.0, 3.0, None])
    assert over is not None
    assert (over.low, over.high) == (pytest.approx(2 - 4.3027 / math.sqrt(3), rel=1e-3), pytest.approx(4.484, rel=1e-3))
    assert estimate([None, math.inf]) is None


def test_shares_go_up_to_the_whole() -> None:
    assert all(before < after for before, after in itertools.pairwise(SHARES))
    assert (SHARES[0], SHARES[-1]) == (0, 1)


def test_numbers_as_people_read_them() -> None:
    assert [numbers.seconds(value) for value in (0, 0.00012, 0.0421, 0.9999, 2.345, 59.99, 300)] == [
        "0 ms", "120 µs", "42.1 ms", "1.00 s", "2.35 s", "60.0 s", "5.00 min",
    ]  # fmt: skip
    assert [numbers.share(value) for value in (0, 0.00001, 0.031, 0.99999, 1)] == [
        "0 %", "<0.01 %", "3.10 %", ">99.99 %", "100 %",
    ]  # fmt: skip
    assert numbers.span([0.078, 0.0814], "s") == "78.0–81.4 ms"
    assert numbers.digits(1345.6) == "1,346"
    assert numbers.digits(123456.0) == "123,456"


def repeat_of(records: list[Record]) -> reading.RepeatData:
    return reading.RepeatData(number=1, records=records, gaps=[], client=[], samples=[])


def filled(series: list[float | None]) -> list[float]:
    return [value or 0.0 for value in series]


def test_every_field_of_a_result_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "load-testing.md").read_text()
    told = set(re.findall(r"`(\w+)`", text[text.index("### result.json") : text.index("## Comparing")]))
    for kind in (
        result.Result, result.RepeatResult, result.Failure, result.SweepPoint, Estimate, Honesty, Timeline,
        EngineTimeline, GpuTimeline, Distribution, Verdict,
    ):  # fmt: skip
        assert set(kind.__struct_fields__) <= told, (kind.__name__, set(kind.__struct_fields__) - told)
