"""What a route makes of the bodies it gets, over all APIs; and docs/behaviour.md against what is really done."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.body import REFUSED, STATEFUL, STRIPPED, Body
from vitalis_serve.gateway.keys import KeyTable, Limits, Route
from vitalis_serve.gateway.paths import APIS, GUIDANCE
from vitalis_serve.gateway.route_policy import BOUNDED, DEFAULTS, LENGTHS, STRUCTURED, RoutePolicy
from vitalis_serve.main import _route_options
from vitalis_serve.settings import Settings
from vitalis_serve.settings.schema import Route as RouteSettings

GENERATING = tuple(DEFAULTS)


def policy(**route: Any) -> RoutePolicy:
    found = RoutePolicy.of(msgspec.convert({"name": "r", "model": "m", **route}, Route))
    assert found is not None
    return found


def sent(rules: RoutePolicy, dialect: str, generates: bool = True, **fields: Any) -> dict[str, Any]:
    body = Body(json.dumps({"model": "r", **fields}).encode(), dialect, streams=generates)
    rules.apply(body.fields, dialect, generates=generates)
    document: dict[str, Any] = json.loads(body.encode("r"))
    del document["model"]
    document.pop("store", None)
    return document


def refusal(rules: RoutePolicy, dialect: str, **fields: Any) -> ServeError:
    with pytest.raises(ServeError) as caught:
        sent(rules, dialect, **fields)
    assert caught.value.status == 400
    return caught.value


def test_a_route_that_says_nothing_has_no_policy() -> None:
    assert RoutePolicy.of(Route("r", "m", class_="emergency", fallbacks=("b",))) is None
    keys = KeyTable.decode(b'{"version":1,"routes":[{"name":"a","model":"m"},{"name":"b","model":"m","preamble":"x"}]}')
    assert list(keys.policies) == ["b"]


def test_a_route_reaches_the_workers_as_it_was_configured() -> None:
    document = {
        "name": "r",
        "model": "m",
        "class": "emergency",
        "defaults": {"temperature": 0.7, "reasoning_effort": "low"},
        "limits": {"max_tokens": 100, "logprobs": 0},
        "preamble": "Be brief.",
        "fallbacks": ["b"],
    }
    options = _route_options(RouteSettings.model_validate(document), Settings())
    assert {"name": options.name, "model": options.model, **options.policy} == document
    assert msgspec.convert(document, Route).limits == Limits(max_tokens=100, logprobs=0)


# Defaults


@pytest.mark.parametrize("dialect", GENERATING)
@pytest.mark.parametrize("word", ["temperature", "top_p"])
def test_sampling_defaults_are_set_where_nothing_is_said(dialect: str, word: str) -> None:
    rules = policy(defaults={word: 0.7})
    assert sent(rules, dialect)[word] == 0.7
    assert sent(rules, dialect, **{word: None})[word] == 0.7
    assert sent(rules, dialect, **{word: 0})[word] == 0


@pytest.mark.parametrize(
    ("dialect", "given", "expected"),
    [
        ("chat", {}, {"reasoning_effort": "low"}),
        ("chat", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ("responses", {}, {"reasoning": {"effort": "low"}}),
        ("responses", {"reasoning": None}, {"reasoning": {"effort": "low"}}),
        ("responses", {"reasoning": {"summary": "auto"}}, {"reasoning": {"summary": "auto", "effort": "low"}}),
        ("responses", {"reasoning": {"effort": None}}, {"reasoning": {"effort": "low"}}),
        ("responses", {"reasoning": {"effort": "high"}}, {"reasoning": {"effort": "high"}}),
        ("messages", {}, {"output_config": {"effort": "low"}}),
        ("messages", {"output_config": {"effort": "high"}}, {"output_config": {"effort": "high"}}),
        ("completions", {}, {}),
    ],
)
def test_the_reasoning_effort_has_its_place_in_each_api(
    dialect: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert sent(policy(defaults={"reasoning_effort": "low"}), dialect, **given) == expected


def test_an_effort_cannot_be_set_in_what_is_no_object() -> None:
    error = refusal(policy(defaults={"reasoning_effort": "low"}), "responses", reasoning="low")
    assert (error.code, error.param) == ("invalid_request", "reasoning")


@pytest.mark.parametrize(
    ("dialect", "given", "expected"),
    [
        ("chat", {}, {"max_completion_tokens": 50}),
        ("chat", {"max_completion_tokens": 9}, {"max_completion_tokens": 9}),
        ("chat", {"max_tokens": 9}, {"max_tokens": 9}),
        ("completions", {}, {"max_tokens": 50}),
        ("responses", {}, {"max_output_tokens": 50}),
        ("messages", {}, {"max_tokens": 50}),
        ("messages", {"max_tokens": 9}, {"max_tokens": 9}),
    ],
)
def test_the_length_has_its_own_name_in_each_api(dialect: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sent(policy(defaults={"max_tokens": 50}), dialect, **given) == expected


def test_defaults_and_limits_are_not_for_what_only_counts() -> None:
    rules = policy(defaults={"temperature": 0.7, "max_tokens": 5, "reasoning_effort": "low"}, limits={"max_tokens": 9})
    assert sent(rules, "messages", generates=False, max_tokens=99) == {"max_tokens": 99}
    assert sent(rules, "plain", generates=False) == {}


# Limits


@pytest.mark.parametrize("dialect", GENERATING)
def test_a_length_above_the_limit_is_lowered_without_a_word(dialect: str) -> None:
    rules = policy(limits={"max_tokens": 100})
    for name in LENGTHS[dialect]:
        for value, expected in ((10**30, 100), (101, 100), (100, 100), (1, 1), (-1, -1)):
            assert sent(rules, dialect, **{name: value}) == {name: expected}
        error = refusal(rules, dialect, **{name: "1000"})  # vLLM would take it for a number
        assert (error.code, error.param) == ("invalid_request", name)


def test_both_names_of_the_length_are_lowered() -> None:
    assert sent(policy(limits={"max_tokens": 5}), "chat", max_tokens=9, max_completion_tokens=8) == {
        "max_tokens": 5,
        "max_completion_tokens": 5,
    }


@pytest.mark.parametrize(
    ("dialect", "given", "limit", "expected"),
    [
        ("chat", {}, 100, {"max_completion_tokens": 100}),
        ("chat", {"max_tokens": None}, 100, {"max_tokens": None, "max_completion_tokens": 100}),
        ("responses", {}, 100, {"max_output_tokens": 100}),
        ("messages", {}, 100, {}),  # the engine asks for it
        ("completions", {}, 100, {}),  # vLLM's 16
        ("completions", {}, 10, {"max_tokens": 10}),
        ("completions", {"max_tokens": None}, 100, {"max_tokens": 100}),  # without an end
    ],
)
def test_who_names_no_length_gets_the_limit(
    dialect: str, given: dict[str, Any], limit: int, expected: dict[str, Any]
) -> None:
    assert sent(policy(limits={"max_tokens": limit}), dialect, **given) == expected


def test_the_default_length_stands_below_the_limit() -> None:
    rules = policy(defaults={"max_tokens": 50}, limits={"max_tokens": 100})
    assert sent(rules, "chat") == {"max_completion_tokens": 50}
    assert sent(rules, "chat", max_tokens=500) == {"max_tokens": 100}


@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_the_least_length_is_never_above_the_greatest(dialect: str) -> None:
    assert sent(policy(limits={"min_tokens": 10}), dialect, min_tokens=11) == {"min_tokens": 10}
    rules = policy(limits={"min_tokens": 10, "max_tokens": 5})
    assert sent(rules, dialect, min_tokens=11, max_tokens=50) == {"min_tokens": 5, "max_tokens": 5}
    assert sent(rules, dialect, min_tokens=1, max_tokens=2) == {"min_tokens": 1, "max_tokens": 2}


@pytest.mark.parametrize(
    ("dialect", "field", "word"), [(d, f, w) for d, fields in BOUNDED.items() for f, w in fields.items()]
)
def test_what_costs_more_than_its_length_is_refused_above_its_limit(dialect: str, field: str, word: str) -> None:
    rules = policy(limits={word: 3})
    for value in (0, 3, None):
        assert sent(rules, dialect, **{field: value}) == {field: value}
    for value in (4, 10**30, -1):
        error = refusal(rules, dialect, **{field: value})
        assert (error.code, error.param) == ("invalid_request", field)
        assert f"`{field}` is {value}" in error.message
        assert "0 to 3" in error.message
    for wrong in ("4", 4.0, True, [4]):
        assert "whole number" in refusal(rules, dialect, **{field: wrong}).message


@pytest.mark.parametrize(
    ("prompt", "n", "answers"),
    [
        ("x" * 50, 4, 4),
        (["x"] * 4, 1, 4),
        (["x"] * 2, 2, 4),
        ([[1, 2], [3]], None, 2),
        ([1] * 50, 1, 1),  # one prompt, as tokens
        ([], 1, 0),
        (["x"] * 5, None, 5),
        (["x"] * 3, 2, 6),
        ([[1]] * 5, 1, 5),
    ],
)
def test_the_answers_of_a_completion_are_those_to_all_its_prompts(prompt: Any, n: int | None, answers: int) -> None:
    rules = policy(limits={"n": 4})
    if answers <= 4:
        assert sent(rules, "completions", prompt=prompt, n=n) == {"prompt": prompt, "n": n}
    else:
        error = refusal(rules, "completions", prompt=prompt, n=n)
        assert (error.code, error.param) == ("invalid_request", "prompt")
        assert f"{answers} answers" in error.message


@pytest.mark.parametrize(("dialect", "field"), [(d, f) for d, fields in STRUCTURED.items() for f in fields])
def test_large_schemas_are_refused(dialect: str, field: str) -> None:
    rules = policy(limits={"structured_output_bytes": 40})
    small, large = {"type": "json_object"}, {"type": "x" * 40}
    assert sent(rules, dialect, **{field: small}) == {field: small}
    error = refusal(rules, dialect, **{field: large})
    assert (error.code, error.param) == ("invalid_request", field)
    assert "at most 40" in error.message


# The preamble

TEXT = 'Be "brief".\nÄ'


@pytest.mark.parametrize(
    ("dialect", "given", "expected"),
    [
        ("chat", {"messages": []}, {"messages": [{"role": "system", "content": TEXT}]}),
        ("chat", {"messages": [{"role": "system", "content": "x"}]},
         {"messages": [{"role": "system", "content": TEXT}, {"role": "system", "content": "x"}]}),
        ("chat", {}, {}),
        ("responses", {}, {"instructions": TEXT}),
        ("responses", {"instructions": None}, {"instructions": TEXT}),
        ("responses", {"instructions": ""}, {"instructions": TEXT + "\n\n"}),
        ("responses", {"instructions": 'a "b"\n'}, {"instructions": TEXT + '\n\na "b"\n'}),
        ("responses", {"truncation": "disabled"}, {"truncation": "disabled", "instructions": TEXT}),
        ("responses", {"truncation": None}, {"instructions": TEXT}),
        ("messages", {}, {"system": TEXT}),
        ("messages", {"system": "x"}, {"system": TEXT + "\n\nx"}),
        ("messages", {"system": []}, {"system": [{"type": "text", "text": TEXT + "\n\n"}]}),
        ("messages", {"system": [{"type": "text", "text": "x"}]},
         {"system": [{"type": "text", "text": TEXT + "\n\n"}, {"type": "text", "text": "x"}]}),
    ],
)  # fmt: skip
def test_the_preamble_stands_before_all_that_the_caller_says(
    dialect: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert sent(policy(preamble=TEXT), dialect, **given) == expected


def test_an_empty_list_may_hold_spaces() -> None:
    body = Body(b'{"model":"r","messages":[' + b" \n\t" * 100 + b"]}", "chat", streams=True)
    policy(preamble="x").apply(body.fields, "chat", generates=True)
    assert json.loads(body.encode("r"))["messages"] == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize(
    ("dialect", "given", "code", "param"),
    [
        ("completions", {"prompt": "x"}, "invalid_request", "model"),
        ("chat", {"messages": "x"}, "invalid_request", "messages"),
        ("chat", {"messages": None}, "invalid_request", "messages"),
        ("responses", {"instructions": ["x"]}, "invalid_request", "instructions"),
        ("messages", {"system": 1}, "invalid_request", "system"),
        # what shortens a prompt takes away its beginning
        ("chat", {"messages": [], "truncate_prompt_tokens": 5}, "unsupported_field", "truncate_prompt_tokens"),
        ("responses", {"truncation": "auto"}, "unsupported_field", "truncation"),
    ],
)
def test_ways_around_the_preamble_are_refused(dialect: str, given: dict[str, Any], code: str, param: str) -> None:
    error = refusal(policy(preamble="x"), dialect, **given)
    assert (error.code, error.param) == (code, param)


def test_the_preamble_is_counted_but_not_tokenized() -> None:
    rules = policy(preamble="x")
    assert sent(rules, "messages", generates=False) == {"system": "x"}
    assert sent(rules, "plain", generates=False, prompt="y") == {"prompt": "y"}


# Weights


def shares(weights: dict[str, float]) -> dict[int, str]:
    rules = policy(weights=[{"model": model, "weight": weight} for model, weight in weights.items()])
    return {i: str(rules.model("t", b"%d" % i)) for i in range(4000)}


def test_conversations_are_shared_out_by_weight() -> None:
    counts = Counter(shares({"a": 90, "b": 10, "c": 0}).values())
    assert counts.keys() == {"a", "b"}
    assert 320 < counts["b"] < 480  # five standard deviations


def test_a_conversation_stays_with_its_model() -> None:
    assert shares({"a": 1, "b": 1}) == shares({"b": 1, "a": 1})
    assert shares({"a": 1, "b": 1}) == shares({"a": 5, "b": 5})


def test_a_change_of_weights_moves_only_what_it_must() -> None:
    before, after = shares({"a": 95, "b": 5}), shares({"a": 90, "b": 10})
    moved = {(before[i], after[i]) for i in before if before[i] != after[i]}
    assert moved == {("a", "b")}


def test_tenants_and_routes_are_shared_out_apart() -> None:
    weights = [{"model": "a", "weight": 1}, {"model": "b", "weight": 1}]
    one, other = policy(weights=weights), policy(name="other", weights=weights)
    seen = [(one.model("t", b"%d" % i), one.model("u", b"%d" % i), other.model("t", b"%d" % i)) for i in range(100)]
    assert len(set(seen)) == 8


def test_a_route_of_one_model_has_no_choice() -> None:
    assert policy(preamble="x").model("t", b"1") is None


# docs/behaviour.md

APIS_SHOWN = (
    ("chat", True),
    ("completions", True),
    ("responses", True),
    ("messages", True),
    ("messages", False),
    ("plain", False),
)
HIGH, LOW = 1000, 5
FULL = {
    "defaults": {"temperature": 0.5, "top_p": 0.5, "reasoning_effort": "low", "max_tokens": 10},
    "limits": {
        "max_tokens": 100, "min_tokens": 10, "n": 10, "logprobs": 10, "prompt_logprobs": 10,
        "structured_output_bytes": 100,
    },
}  # fmt: skip
# For each row of the table: its fields, and a value that would be beyond a limit or worth refusing.
ROWS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("model",), "r"),
    (("stream_options",), {"include_usage": False}),
    (("cache_salt",), "mine"),
    (("priority", "request_id"), 1),
    (tuple(sorted(REFUSED)), {}),
    ((*STATEFUL, "background"), True),
    (("store",), True),
    (("temperature", "top_p"), 1),
    (("reasoning_effort",), "high"),
    (("reasoning",), {"effort": "high"}),
    (("max_tokens",), HIGH),
    (("max_completion_tokens",), HIGH),
    (("max_output_tokens",), HIGH),
    (("min_tokens",), HIGH),
    (("n",), HIGH),
    (("prompt",), ["x"] * HIGH),
    (("logprobs",), HIGH),
    (("top_logprobs",), HIGH),
    (("prompt_logprobs",), HIGH),
    (("response_format",), {"x": "y" * 200}),
    (("structured_outputs",), {"x": "y" * 200}),
    (("text",), {"x": "y" * 200}),
    (("output_config",), {"effort": "x" * 200}),
    (("messages",), []),
    (("instructions",), "theirs"),
    (("system",), "theirs"),
    (("truncate_prompt_tokens",), 5),
    (("truncation",), "auto"),
)
PREAMBLE_ROWS = {"messages", "instructions", "system", "truncate_prompt_tokens", "truncation"}


def done(dialect: str, generates: bool, field: str, value: Any) -> str:
    """In the table's words: what becomes of a field, with every policy in force that could concern it."""
    salt = msgspec.Raw(b'"ours"')
    needed = {"model": "r"} | ({"stream": True} if generates else {})

    def run(extra: dict[str, Any]) -> Any:
        body = Body(json.dumps(needed | extra).encode(), dialect, streams=generates)
        if field not in PREAMBLE_ROWS or dialect != "completions":
            rules = policy(**FULL, **({"preamble": "ours"} if field in PREAMBLE_ROWS else {}))
            rules.apply(body.fields, dialect, generates=generates)
        return json.loads(body.encode("engine", salt)).get(field)

    try:
        absent = run({})
    except ServeError:
        absent = None
    try:
        given = run({field: value})
    except ServeError as error:
        words = [
            f"refused for {error.param}"
            if error.param != field
            else "refused"
            if error.code == "unsupported_field"
            else "limited"
        ]
    else:
        if given is None:
            words = ["dropped"]
        elif given == value:
            words = []
        elif given == "engine" or given == "ours" or given is False:
            words = ["replaced"]
        elif isinstance(value, int):
            words = ["lowered"]
        else:
            words = ["added to"]
    if absent is not None and not {"replaced", "added to"} & set(words):
        words.insert(0, "default")
    return ", ".join(words) or "passes"


def rows() -> list[str]:
    table = []
    for fields, value in ROWS:
        cells = []
        for dialect, generates in APIS_SHOWN:
            found = {done(dialect, generates, field, value) for field in fields}
            assert len(found) == 1, (fields, dialect, found)
            cells.append(found.pop())
        table.append(f"| {', '.join(f'`{field}`' for field in fields)} | {' | '.join(cells)} |")
    return table


def test_the_table_of_fields_is_what_is_done() -> None:
    """To mend it, copy what this test prints."""
    page = (Path(__file__).parents[3] / "docs" / "behaviour.md").read_text()
    section = page.split("\n## Fields")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| `")]
    assert shown == rows(), "\n" + "\n".join(rows())


def test_the_table_has_every_field_and_every_api() -> None:
    named = {field for fields, _ in ROWS for field in fields}
    policies = {field.partition(".")[0] for fields in DEFAULTS.values() for field in fields.values()}
    policies |= {field for fields in (*LENGTHS.values(), *BOUNDED.values(), *STRUCTURED.values()) for field in fields}
    assert named >= policies | REFUSED | set(STRIPPED) | set(STATEFUL)
    assert {(api.dialect, api.streams) for api in APIS.values() if api.path != GUIDANCE} == set(APIS_SHOWN)
