"""Every metric by hand: on requests small enough to be worked out on paper."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_load import metrics
from vitalis_load.histograms import Histogram
from vitalis_load.metrics import Slo, Window
from vitalis_load.records import Record


def answer(scheduled: float = 0.0, **more: Any) -> Record:
    """Sent 0.1 s late, first token after 0.4 s, 11 tokens until 2.5 s after it was due: TTFT 0.4, E2E 2.4, TPOT 0.2."""
    told: dict[str, Any] = {
        "task": "t", "api": "chat", "scheduled": scheduled, "sent": scheduled + 0.1, "head": scheduled + 0.2,
        "first_token": scheduled + 0.5, "first_output": scheduled + 1.0, "last_token": scheduled + 2.0,
        "ended": scheduled + 2.5, "status": 200, "prompt_tokens": 100, "completion_tokens": 11, "chunks": 6,
        "finish": "stop",
    }  # fmt: skip
    return Record(**{**told, **more})


def refusal(scheduled: float = 0.0, **more: Any) -> Record:
    told = {"status": 503, "error": "http_503", "ended": scheduled + 0.15}
    nothing = {"first_token": None, "first_output": None, "last_token": None, "prompt_tokens": None,
               "completion_tokens": None, "chunks": 0, "finish": ""}  # fmt: skip
    return answer(scheduled, **{**told, **nothing, **more})


def close(value: float) -> Any:
    return pytest.approx(value, abs=1e-9)


def test_of_one_request() -> None:
    record = answer(10)
    assert metrics.ttft(record) == close(0.4)
    assert metrics.ttfo(record) == close(0.9)
    assert metrics.e2e(record) == close(2.4)
    assert metrics.tpot(record) == close((2.4 - 0.4) / 10)
    assert metrics.ttft_queued(record) == close(0.5)
    assert metrics.e2e_queued(record) == close(2.5)
    assert metrics.schedule_delay(record) == close(0.1)
    assert metrics.schedule_delay(answer(sent=0.0)) == 0
    assert metrics.schedule_delay(answer(sent=-0.1)) == 0, "sent early, by a clock's rounding"


def test_what_has_no_tpot() -> None:
    assert metrics.tpot(answer(completion_tokens=1)) is None
    assert metrics.tpot(answer(completion_tokens=None)) is None
    assert metrics.tpot(answer(first_token=None)) is None
    assert metrics.tpot(answer(unfinished=True)) is None
    assert metrics.tpot(answer(error="reset")) is None
    assert metrics.tpot(answer(completion_tokens=2)) == close(2.0)


@pytest.mark.parametrize(
    ("record", "slo", "good"),
    [
        (answer(), None, True),
        (answer(), Slo(), True),
        (answer(), Slo(ttft_ms=400.1, tpot_ms=200.1, e2e_ms=2400.1), True),
        (answer(), Slo(ttft_ms=399), False),
        (answer(), Slo(tpot_ms=199), False),
        (answer(), Slo(e2e_ms=2399), False),
        (answer(), Slo(ttft_p99_ms=399), False),
        (answer(), Slo(ttft_p99_ms=399, ttft_ms=500), True),
        (answer(), Slo(failed_share=0, min_goodput=1e9), True),
        (refusal(), None, False),
        (refusal(), Slo(ttft_ms=1e9), False),
        (answer(unfinished=True), None, False),
        (answer(completion_tokens=None), Slo(tpot_ms=1e9), False),
        (answer(completion_tokens=None), Slo(ttft_ms=1e9), True),
        (answer(completion_tokens=1), Slo(tpot_ms=1), True),
        (answer(first_token=None, last_token=None), Slo(ttft_ms=2399), False),
        (answer(first_token=None, last_token=None), Slo(ttft_ms=2401), True),
        (answer(stream=False, first_token=None, last_token=None), Slo(ttft_ms=1, tpot_ms=1), True),
        (answer(stream=False, first_token=None, last_token=None), Slo(e2e_ms=2399), False),
    ],
)
def test_good(record: Record, slo: Slo | None, good: bool) -> None:
    assert metrics.good(record, slo) is good


def test_tokens_in_a_window() -> None:
    """11 tokens from 0.5 to 2.0, 100 of the prompt from 0.1 to 0.5."""
    records = [answer()]
    assert metrics.tokens_between(records, Window(0, 10)) == (close(100), close(11))
    assert metrics.tokens_between(records, Window(1.0, 1.5)) == (0, close(11 / 3))
    assert metrics.tokens_between(records, Window(0.3, 0.5)) == (close(50), 0)
    assert metrics.tokens_between(records, Window(2.0, 9)) == (0, 0)
    at_once = answer(last_token=0.5)
    assert metrics.tokens_between([at_once], Window(0.5, 0.6))[1] == 11
    assert metrics.tokens_between([at_once], Window(0.4, 0.5))[1] == 0
    plain = answer(stream=False, first_token=None, first_output=None, last_token=None)
    assert metrics.tokens_between([plain], Window(0.1, 1.3)) == (close(50), close(5.5))
    for lost in (refusal(), answer(unfinished=True), answer(error="reset"), answer(completion_tokens=None)):
        assert metrics.tokens_between([lost], Window(0, 10)) == (0, 0)


def test_a_timeline_of_tokens() -> None:
    assert metrics.output_timeline([answer(), answer(1)], 4) == [
        close(11 / 3), close(11 * 2 / 3 + 11 / 3), close(11 * 2 / 3), 0,
    ]  # fmt: skip
    assert metrics.output_timeline([answer()], 1) == [close(11 / 3)]
    assert metrics.output_timeline([answer()], 2.5, step=0.5) == [0, *[close(11 / 1.5)] * 3, 0]
    assert metrics.output_timeline([answer(last_token=0.5)], 1) == [11]
    assert metrics.output_timeline([], 2) == [0, 0]
    assert metrics.output_timeline([answer()], 0) == []


@given(
    spans=st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20), st.integers(1, 500)), max_size=8),
    cuts=st.lists(st.floats(0, 80), max_size=4),
)
def test_no_token_is_lost_or_doubled_between_windows(spans: list[tuple[float, float, int]], cuts: list[float]) -> None:
    records = [
        answer(first_token=at, last_token=at + length, ended=at + length, sent=at - 0.1, completion_tokens=tokens)
        for at, length, tokens in spans
    ]
    edges = [-1.0, *sorted(cuts), 100.0]
    windows = [Window(start, end) for start, end in zip(edges, edges[1:], strict=False)]
    total = sum(tokens for _, _, tokens in spans)
    assert sum(metrics.tokens_between(records, window)[1] for window in windows) == pytest.approx(total)
    assert sum(metrics.tokens_between(records, window)[0] for window in windows) == pytest.approx(100 * len(spans))
    assert sum(metrics.output_timeline(records, 100)) == pytest.approx(total)


def test_a_spread() -> None:
    assert metrics.spread([None]) is None
    found = metrics.spread([None, *(float(value) for value in range(1000, 0, -1))])
    assert found == metrics.Spread(1000, 500.5, 1, 500, 900, 950, 990, 999, 1000)
    assert metrics.spread([7.0]) == metrics.Spread(1, 7, 7, 7, 7, 7, 7, 7, 7)
    assert metrics.spread_of(None) is None
    assert metrics.spread_of(Histogram()) is None


def summary(records: list[Record], slo: Slo | None = None, window: Window | None = None) -> metrics.Summary:
    gaps = Histogram()
    gaps.add(0.02, 99)
    gaps.add(0.3)
    return metrics.summarise(records, gaps, window or Window(0, 10), slo)


def test_a_repeat() -> None:
    records = [
        answer(0, tenant="a", klass="high", wanted_tokens=10, cached_tokens=50, reasoning_tokens=5),
        answer(1, tenant="a", wanted_tokens=12, cached_tokens=None, task="u"),
        answer(2, tenant="b", sent=2.0, completion_tokens=None),
        refusal(3, tenant="b"),
        refusal(4, tenant="b", error="reset", status=0),
        answer(9.9, tenant="b", unfinished=True, first_token=12.0, completion_tokens=None),
        answer(-5, completion_tokens=1000),  # warming up
        answer(11, tenant="c"),  # cooling down
    ]
    found = summary(records, Slo(ttft_ms=450))
    assert (found.requests, found.succeeded, found.failed, found.unfinished, found.uncounted) == (6, 3, 2, 1, 1)
    assert found.failures == {"http_503": 1, "reset": 1}
    assert (found.good, found.goodput, found.good_share) == (2, close(0.2), close(2 / 6))
    assert found.failed_share == close(2 / 6)
    assert (found.offered_per_second, found.requests_per_second) == (close(0.6), close(0.3))
    # two answers of 11 tokens and 100 of the prompt, all of it within the window
    assert found.output_tokens_per_second == close(2.2)
    assert found.total_tokens_per_second == close(22.2)
    # from -4.9 to 13.5; the third said nothing of its answer, but was counted by nobody else either
    assert found.whole_seconds == close(18.4)
    assert found.output_tokens_per_second_whole == close((11 + 11 + 1000 + 11) / 18.4)
    assert found.requests_per_second_whole == close(5 / 18.4)
    assert found.ttft is not None
    assert (found.ttft.count, found.ttft.max) == (4, close(2.0)), "the unfinished one's too"
    assert found.tpot is not None
    assert (found.tpot.count, found.tpot.p50) == (2, close(0.2))
    assert found.tokens_per_second_per_user == close(5)
    assert found.e2e is not None
    assert found.e2e.count == 3
    assert found.schedule_delay is not None
    assert (found.schedule_delay.count, found.schedule_delay.min) == (6, 0)
    assert found.gaps is not None
    assert (found.gaps.count, found.gaps.p99) == (100, pytest.approx(0.02, rel=1e-3))
    assert found.gaps.max == pytest.approx(0.3, rel=1e-3)
    assert found.output_tokens == metrics.Lengths(2, 11, 11, 11)
    assert found.output_drift == close(0)
    assert found.cached_share == close(50 / 300), "of an API that says it where there is something to say"
    assert found.reasoning_share == close(5 / 11)
    assert found.tokens_per_chunk == close(22 / 12)
    assert found.finishes == {"stop": 3}
    assert {name: part.requests for name, part in found.by_tenant.items()} == {"a": 2, "b": 4}
    assert {name: part.requests for name, part in found.by_task.items()} == {"t": 5, "u": 1}
    assert {name: part.requests for name, part in found.by_klass.items()} == {"": 5, "high": 1}
    assert found.by_tenant["b"].failed == 2
    assert found.by_tenant["a"].output_tokens_per_second == close(2.2)
    assert msgspec.json.decode(msgspec.json.encode(found), type=metrics.Summary) == found


def test_tokens_of_those_before_count_where_they_fall() -> None:
    """Sent before the window and still answering within it: their tokens are this window's, they are not."""
    found = summary([answer(-1, last_token=1.0, ended=1.1)])
    assert found.requests == 0
    assert found.output_tokens_per_second == close(11 * (1 / 1.5) / 10)
    assert found.requests_per_second == close(0.1)
    assert (found.ttft, found.good_share, found.failed_share) == (None, None, None)


def test_all_of_them_failed() -> None:
    found = summary([refusal(second) for second in range(5)])
    assert (found.goodput, found.good_share, found.failed_share) == (0, 0, 1)
    assert (found.ttft, found.tpot, found.e2e, found.output_tokens, found.cached_share) == (None,) * 5


def test_nothing_at_all() -> None:
    found = metrics.summarise([], None, Window(0, 0), None)
    assert (found.requests, found.goodput, found.whole_seconds, found.gaps) == (0, 0, 0, None)


def test_output_that_is_shorter_than_wanted() -> None:
    assert summary([answer(wanted_tokens=22), answer(wanted_tokens=None)]).output_drift == close(-0.5)
    assert summary([answer()]).output_drift is None


def test_verdicts() -> None:
    found = summary([answer(second) for second in range(10)] + [refusal(5)])
    slo = Slo(
        ttft_p99_ms=400.1, tpot_p99_ms=199, e2e_p99_ms=2400.1, failed_share=0.1, min_goodput=1, min_good_share=0.95,
        min_tokens_per_second=5, ttft_ms=1000,
    )  # fmt: skip
    verdicts = {verdict.name: verdict for verdict in metrics.check(found, slo)}
    assert {name: verdict.ok for name, verdict in verdicts.items()} == {
        "ttft_p99_ms": True, "tpot_p99_ms": False, "e2e_p99_ms": True, "failed_share": True, "min_goodput": True,
        "min_good_share": False, "min_tokens_per_second": True,
    }  # fmt: skip
    assert verdicts["tpot_p99_ms"].value == close(200)
    assert verdicts["tpot_p99_ms"].limit == 199
    assert metrics.check(found, Slo()) == []


def test_where_nothing_was_measured_nothing_was_kept() -> None:
    found = summary([])
    slo = Slo(ttft_p99_ms=1e9, failed_share=1, min_goodput=0, min_good_share=0)
    assert [(verdict.value, verdict.ok) for verdict in metrics.check(found, slo)] == [(None, False)] * 4


def test_an_slo_with_a_typo_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="ttft_p9_ms"):
        msgspec.convert({"ttft_p9_ms": 1}, Slo)
