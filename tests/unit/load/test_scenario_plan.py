"""What a plan asks: documents, lengths, prompts that no cache knows, conversations."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from simulator.options import Options
from simulator.requests import APIS, Work, read_work
from vitalis_load import prompts
from vitalis_load.asking import Ask, Plan
from vitalis_load.errors import LoadFailure
from vitalis_load.prompts import Tokenisation
from vitalis_load.scenario import Scenario, load, names

TASK: dict[str, Any] = {"name": "chat", "prompt": {"tokens": 200}, "output": 20}
PATHS = {api: path for path, api in APIS.items()}


def scenario(*tasks: dict[str, Any], **fields: Any) -> Scenario:
    start: dict[str, Any] = {"name": "t", "arrivals": {"kind": "constant", "rate": 10}, "shape": {"seconds": 100}}
    return Scenario.of(start | fields | {"tasks": [TASK | task for task in tasks or ({},)]})


def asks(plan: Plan, count: int = 20) -> list[Ask]:
    return [plan.request(arrival) for arrival, _ in zip(plan.arrivals(), range(count), strict=False)]


def as_engine(ask: Ask) -> Work:
    """What an engine that checks as vLLM does makes of it."""
    return read_work(PATHS[ask.api], json.dumps(ask.document).encode(), Options(models=("m",)))


def common(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", list(PATHS))
def test_every_api_gets_a_document_that_an_engine_takes(api: str, stream: bool) -> None:
    ask = asks(scenario({"api": api, "stream": stream, "temperature": 0.5}).plan(1, model="m"), 1)[0]
    work = as_engine(ask)
    assert (work.api, work.stream, ask.document["temperature"]) == (api, stream, 0.5)
    assert ask.wanted_tokens == 20
    assert work.include_usage is (stream and api in ("chat", "completions"))
    if api in ("chat", "completions"):  # the others have no field for the fewest
        assert work.tokens == 20


def test_what_body_says_is_sent_and_may_change_what_is_no_content() -> None:
    extra = {"reasoning_effort": "low", "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    document = asks(scenario({"body": extra}).plan(1), 1)[0].document
    assert document["reasoning_effort"] == "low"
    assert document["stream_options"] == extra["stream_options"]


def test_an_answer_that_ends_when_the_model_likes_has_no_wanted_length() -> None:
    ask = asks(scenario({"output": {"max_tokens": 300}}).plan(1, model="m"), 1)[0]
    assert ask.wanted_tokens is None
    assert "min_tokens" not in ask.document
    assert ask.document["max_completion_tokens"] == 300
    assert "min_tokens" not in asks(scenario({"output": {"tokens": 30, "exact": False}}).plan(1), 1)[0].document


def test_lengths_have_the_median_and_the_p95_that_were_asked_for() -> None:
    plan = scenario(
        {"prompt": {"tokens": {"median": 400, "p95": 2000}}, "output": {"median": 150, "p95": 500}}
    ).plan(7)  # fmt: skip
    found = asks(plan, 1000)
    for lengths, median, p95 in (
        (sorted(ask.wanted_tokens or 0 for ask in found), 150, 500),
        (sorted(ask.prompt_tokens for ask in found), 400, 2000),
    ):
        assert lengths[500] == pytest.approx(median, rel=0.15)
        assert lengths[950] == pytest.approx(p95, rel=0.2)


def test_prompts_are_as_long_as_the_tokenisation_says() -> None:
    plan = scenario({"prompt": {"tokens": 1000}}).plan(1, tokenisation=Tokenisation(per_word=1.25, overhead=70))
    words = asks(plan, 1)[0].document["messages"][0]["content"].split()
    assert len(words) == pytest.approx((1000 - 70) / 1.25, abs=2)


def test_no_two_prompts_begin_alike_nor_does_another_run_s() -> None:
    one = scenario()
    texts = [
        ask.document["messages"][0]["content"]
        for salt in ("run-1", "run-2")
        for ask in asks(one.plan(1, salt=salt), 300)
    ]
    texts.sort()
    assert max(common(a, b) for a, b in zip(texts, texts[1:], strict=False)) < 40  # two blocks of 16 tokens have 128


def test_salt_changes_texts_and_nothing_else() -> None:
    one = scenario({"prompt": {"tokens": {"median": 100, "p95": 300}}, "output": {"median": 10, "p95": 30}})
    a, b = (asks(one.plan(1, salt=salt)) for salt in "ab")
    assert [ask.wanted_tokens for ask in a] == [ask.wanted_tokens for ask in b]
    assert [ask.words for ask in a] == [ask.words for ask in b]
    assert all(x.document["messages"] != y.document["messages"] for x, y in zip(a, b, strict=True))


def test_a_plan_is_the_same_in_every_process() -> None:
    resolved = json.loads(json.dumps(load("mixed-classes").resolved()))
    here, there = load("mixed-classes").plan(5, salt="s"), Scenario.of(resolved).plan(5, salt="s")
    assert [ask.document for ask in asks(here, 40)] == [ask.document for ask in asks(there, 40)]


def test_a_group_shares_its_prefix_and_questions_are_their_own() -> None:
    prompt = {"kind": "shared", "prefix_tokens": 500, "groups": 3, "tokens": 50}
    found = asks(scenario({"prompt": prompt}).plan(1), 60)
    prefixes = {ask.document["messages"][0]["content"] for ask in found}
    assert {ask.document["messages"][0]["role"] for ask in found} == {"system"}
    assert len(prefixes) == 3
    assert max(common(a, b) for a in prefixes for b in prefixes if a != b) < 40
    assert len({ask.document["messages"][1]["content"] for ask in found}) == 60
    hashes = [as_engine(ask).block_hashes(16) for ask in asks(scenario({"prompt": prompt}).plan(1, model="m"), 60)]
    shared = {chain[:20] for chain in hashes}
    assert len(shared) == 3


@pytest.mark.parametrize(("api", "field"), [("messages", "system"), ("responses", "input"), ("completions", "prompt")])
def test_a_shared_prefix_goes_where_the_api_has_it(api: str, field: str) -> None:
    prompt = {"kind": "shared", "prefix_tokens": 500, "tokens": 50}
    a, b = asks(scenario({"prompt": prompt, "api": api}).plan(1, model="m"), 2)
    assert common(json.dumps(a.document[field]), json.dumps(b.document[field])) > 2000
    assert as_engine(a).prompt_tokens > 500


# conversations


def test_a_turn_sends_what_was_said_before_with_the_answers_that_were_heard() -> None:
    plan = scenario({"turns": 3, "follow_up_tokens": 30}).plan(1)
    arrival = next(plan.arrivals())
    first, second, third = (plan.request(arrival, turn, ("A1", "A2")[:turn]) for turn in range(3))
    told = third.document["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "user", "assistant", "user"]
    assert [told[1]["content"], told[3]["content"]] == ["A1", "A2"]
    assert told[:1] == first.document["messages"]
    assert told[:3] == second.document["messages"]
    assert [first.turn, second.turn, third.turn] == [0, 1, 2]
    assert len(told[4]["content"].split()) == pytest.approx(30 / 1.09, abs=2)


def test_answers_that_were_not_kept_are_made_up_and_stay_the_same() -> None:
    plan = scenario({"turns": 3}).plan(1)
    arrival = next(plan.arrivals())
    second, third = plan.request(arrival, 1), plan.request(arrival, 2, ("", ""))
    assert third.document["messages"][:3] == second.document["messages"]
    assert len(second.document["messages"][1]["content"].split()) == pytest.approx(20 / 1.09, abs=2)


def test_users_go_from_conversation_to_conversation() -> None:
    one = scenario(
        {"turns": 2}, {"name": "long", "turns": 3},
        arrivals={"kind": "users", "users": 4, "think_seconds": {"min": 1, "max": 2}},
    )  # fmt: skip
    plan = one.plan(1)
    found = [plan.next_request(2, number) for number in range(60)]
    starts = [number for number, ask in enumerate(found) if ask.turn == 0]
    for begin, end in zip(starts, starts[1:], strict=False):
        talk = found[begin:end]
        assert [ask.turn for ask in talk] == list(range(talk[0].task.turns))
        assert len({ask.task.name for ask in talk}) == 1
        assert all(ask.document["messages"][0] == talk[0].document["messages"][0] for ask in talk)
    assert {ask.task.name for ask in found} == {"chat", "long"}
    assert len({found[begin].document["messages"][0]["content"] for begin in starts}) == len(starts)
    assert all(1 <= ask.pause <= 2 for ask in found)
    again = one.plan(1)
    assert [again.next_request(2, number).document for number in (41, 7, 40)] == [
        found[n].document for n in (41, 7, 40)
    ]
    assert again.next_request(3, 0).document != found[0].document


def test_a_user_s_answers_of_earlier_conversations_are_left_out() -> None:
    plan = scenario({"turns": 2}, arrivals={"kind": "users", "users": 1}).plan(1)
    heard = ["a0", "a1", "a2"]
    assert plan.next_request(0, 2, heard[:2]).document["messages"][1:] == []
    assert plan.next_request(0, 3, heard).document["messages"][1]["content"] == "a2"


# the user's own prompts


def prompt_file(path: Path, *lines: dict[str, Any]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"prompt": {"kind": "file", "path": str(path)}}


def test_own_prompts_come_in_their_order_with_their_lengths(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    file = prompt_file(tmp_path / "p.jsonl", {"prompt": "one", "output_tokens": 7}, {"messages": talk})
    found = asks(scenario(file).plan(1, model="m"), 3)
    assert [ask.document["messages"] for ask in found] == [
        [{"role": "user", "content": "one"}], talk, [{"role": "user", "content": "one"}],
    ]  # fmt: skip
    assert [ask.wanted_tokens for ask in found] == [7, 20, 7]
    assert [as_engine(ask).tokens for ask in found] == [7, 20, 7]


def test_own_prompts_that_are_wrong_are_named(tmp_path: Path) -> None:
    file = prompt_file(tmp_path / "p.jsonl", {"prompt": "one"}, {"promt": "two"}, {"prompt": "x", "output_tokens": 0})
    with pytest.raises(LoadFailure) as failure:
        asks(scenario(file).plan(1), 1)
    assert 'line 2: needs "prompt" (text) or "messages" (a list)' in failure.value.message
    assert 'line 3: "output_tokens" must be above 0' in failure.value.message


# tokens


def test_fit_finds_what_a_model_makes_of_words() -> None:
    plan = scenario().plan(1, model="m")
    seen = [(probe.words, as_engine(probe).prompt_tokens) for probe in plan.probes()]
    measured = prompts.fit(seen)
    calibrated = scenario({"prompt": {"tokens": 800}}).plan(1, model="m", tokenisation=measured)
    for ask in asks(calibrated, 5):
        assert as_engine(ask).prompt_tokens == pytest.approx(800, rel=0.04)
        assert ask.prompt_tokens == pytest.approx(800, rel=0.01)


def test_each_api_has_a_frame_of_its_own() -> None:
    """A chat's template costs 60 tokens here, completions' none, and both ask for 128."""
    frames = {"chat": 60, "completions": 0}
    tasks = [{"name": api, "api": api, "prompt": {"tokens": 128}} for api in frames]
    plan = scenario(*tasks).plan(1, model="m")
    probes = plan.probes()
    assert [probe.api for probe in probes] == ["chat", "chat", "chat", "completions"]
    seen: dict[str, list[tuple[int, int]]] = {}
    for probe in probes:
        seen.setdefault(probe.api, []).append((probe.words, frames[probe.api] + round(1.2 * probe.words)))
    measured = prompts.fit_each(seen)
    for ask in asks(scenario(*tasks).plan(1, model="m", tokenisation=measured), 40):
        assert frames[ask.api] + 1.2 * ask.words == pytest.approx(128, abs=3), ask.api


@pytest.mark.parametrize("seen", [[], [(50, 60)], [(50, 60), (50, 61)], [(50, 60), (100, 60)]])
def test_fit_keeps_to_the_estimate_where_nothing_can_be_told(seen: list[tuple[int, int]]) -> None:
    assert prompts.fit(seen) == Tokenisation()


def test_a_hundred_thousand_tokens_are_made_at_once() -> None:
    plan = scenario({"prompt": {"tokens": 100_000}}).plan(1, model="m")
    arrivals = [arrival for arrival, _ in zip(plan.arrivals(), range(6), strict=False)]
    plan.request(arrivals[0])  # the text that all are cut from is made once
    began = time.thread_time()
    found = [plan.request(arrival) for arrival in arrivals[1:]]
    assert (time.thread_time() - began) / 5 < 0.2
    assert all(len(ask.document["messages"][0]["content"].split()) > 90_000 for ask in found)


@pytest.mark.parametrize("name", names())
def test_every_request_of_a_scenario_is_one_that_an_engine_takes(name: str) -> None:
    for scale, context in (("small", 2048), ("full", 131_072)):
        found = load(name, scale=scale)
        plan = found.plan(1, model="m")
        some = asks(plan) if found.open else [plan.next_request(user, turn) for user in range(3) for turn in range(6)]
        for ask in some:
            body = json.dumps(ask.document).encode()
            work = read_work(PATHS[ask.api], body, Options(models=("m",), max_model_len=context))
            assert work.tokens > 0
        assert {ask.key for ask in some} <= set(found.labels)
