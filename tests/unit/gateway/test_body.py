"""What is refused, dropped, added and left alone in a request's body."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.body import REFUSED, STATEFUL, STRIPPED, Body
from vitalis_serve.gateway.paths import APIS, Api

MODEL = "gpt-oss-20b"


def read(raw: bytes | dict[str, Any], dialect: str = "chat", *, streams: bool = True) -> Body:
    return Body(raw if isinstance(raw, bytes) else json.dumps(raw).encode(), dialect, streams=streams)


def sent(raw: bytes | dict[str, Any], dialect: str = "chat", model: str = MODEL) -> dict[str, Any]:
    return dict(json.loads(read(raw, dialect).encode(model)))


def refusal(raw: bytes | dict[str, Any], dialect: str = "chat") -> ServeError:
    with pytest.raises(ServeError) as caught:
        read(raw, dialect)
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"hello",
        b'{"model": }',
        b'{"model": "a",}',
        b"{'model': 'a'}",
        b'{"model":"a"}{"model":"b"}',
        b'{"model":"a"} x',
        b'\xef\xbb\xbf{"model":"a"}',
        b'{"model":"a"\x00}',
        b'\x00{"model":"a"}',
        b'{"model":"\x00a"}',
        b"[]",
        b'"text"',
        b"17",
        b"null",
        b'[{"model":"a"}]',
        b'{"model":"a","text":"\xff"}',
        b'{"model":"a","text":"\xed\xa0\x80"}',
        b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda raw: repr(raw[:24]),
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused_in_one_sentence(raw: bytes) -> None:
    error = refusal(raw)
    assert error.code in ("invalid_json", "invalid_request")
    assert error.status == 400
    assert "\n" not in error.message
    assert "Traceback" not in error.message


def test_invalid_utf8_is_found_below_the_top_level_and_named_by_its_place() -> None:
    assert "byte 27" in refusal(b'{"model":"a","messages":[{"\xc3":1}]}').message


def test_two_hundred_levels_of_nesting_pass_untouched() -> None:
    raw = b'{"model":"gpt-oss-20b","messages":' + b"[" * 200 + b"]" * 200 + b"}"
    assert read(raw).encode(MODEL) == raw  # it had no spaces at the top level


def test_a_missing_model_is_named() -> None:
    assert (refusal({"messages": []}).code, refusal({"messages": []}).param) == ("invalid_request", "model")


@pytest.mark.parametrize("model", [1, None, ["a"], {"a": 1}, True])
def test_a_model_must_be_a_string(model: object) -> None:
    assert refusal({"model": model}).param == "model"


@pytest.mark.parametrize("value", ["yes", "true", 1, 0, [], {}])
def test_stream_must_be_a_boolean(value: object) -> None:
    error = refusal({"model": MODEL, "stream": value})
    assert (error.code, error.param) == ("invalid_request", "stream")


@pytest.mark.parametrize(("value", "stream"), [(True, True), (False, False), (None, False)])
def test_stream_is_read(value: object, stream: bool) -> None:
    assert read({"model": MODEL, "stream": value}).stream is stream


def test_stream_is_not_looked_at_where_an_api_does_not_stream() -> None:
    assert read({"model": MODEL, "stream": "yes"}, "plain", streams=False).stream is False


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a", "model":"b"}',
        b'{"model":"a","x":1,"x":1}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"mod\\u0065l":"a","\\u006dodel":"b"}',
        b'{ "model" : "a" ,\n "stream" : true , "stream" : false }',
        b'{"model":"a","":1,"":2}',
        b'{"model":"a","a\\/b":1,"a/b":2}',
        b'{"model":"a","\\ud83d\\ude00":1,"\xf0\x9f\x98\x80":2}',
        b'{"model":"a","x":{"model":"c"},"model":"b"}',
    ],
)
def test_a_field_that_is_there_twice_is_refused(raw: bytes) -> None:
    error = refusal(raw)
    assert error.code == "invalid_request"
    assert "twice" in error.message


_keys = st.text(max_size=6)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(
    pairs=st.lists(st.tuples(_keys, _values), max_size=6), indent=st.sampled_from([None, 1]), ascii_only=st.booleans()
)
def test_exactly_the_bodies_with_a_field_twice_are_refused(
    pairs: list[tuple[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    known = {"model", "stream", "stream_options", *REFUSED, *STRIPPED}
    pairs = [("model", "a"), *((key, value) for key, value in pairs if key not in known)]
    members = [
        f"{json.dumps(key, ensure_ascii=ascii_only)}{':' if indent is None else ' : '}"
        f"{json.dumps(value, indent=indent, ensure_ascii=ascii_only)}"
        for key, value in pairs
    ]
    raw = ("{" + ("," if indent is None else " ,\n").join(members) + "}").encode("utf-8", "surrogatepass")
    twice = len({key for key, _ in pairs}) != len(pairs)
    try:
        body = read(raw)
    except ServeError as error:
        if "twice" in error.message:
            assert twice
        else:  # the only other reason these bodies give: half of a surrogate pair, which is no text
            assert any("\ud800" <= c <= "\udfff" for c in raw.decode("utf-8", "surrogatepass")) or b"\\ud" in raw
        return
    assert not twice
    assert json.loads(body.encode("a")) == json.loads(raw)


PRETTY = (
    b'{\n  "model" : "gpt-oss-20b",\n  "messages" : [ {"role": "user", "content": "a \\"model\\""} ],\n "x" : 1.50 }'
)


def test_values_go_on_byte_for_byte_and_spaces_around_them_are_left_out() -> None:
    assert read(PRETTY).encode(MODEL) == (
        b'{"model":"gpt-oss-20b","messages":[ {"role": "user", "content": "a \\"model\\""} ],"x":1.50}'
    )


def test_values_stay_as_they_were_written_where_something_else_changes() -> None:
    raw = (
        b'{"model":"fast","messages":[ {"role" : "user","content":"\\u00e9 \xc3\xa9"}],'
        b'"x":1.500e+01,"big":123456789012345678901234567890}'
    )
    assert read(raw).encode(MODEL) == (
        b'{"model":"gpt-oss-20b","messages":[ {"role" : "user","content":"\\u00e9 \xc3\xa9"}],'
        b'"x":1.500e+01,"big":123456789012345678901234567890}'
    )


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("value", [None, {}, "x"])
def test_refused_fields(name: str, value: object) -> None:
    error = refusal({"model": MODEL, name: value})
    assert (error.code, error.status, error.param) == ("unsupported_field", 400, name)
    assert name in error.message


@pytest.mark.parametrize("name", STRIPPED)
def test_stripped_fields(name: str) -> None:
    assert sent({"model": MODEL, "messages": [], name: "x", "kept": 1}) == {"model": MODEL, "messages": [], "kept": 1}


def test_a_refused_field_is_found_though_its_name_is_escaped() -> None:
    assert refusal(b'{"model":"a","chat\\u005ftemplate":"x"}').param == "chat_template"


def test_unknown_fields_pass() -> None:
    assert sent({"model": MODEL, "tomorrow": {"a": 1}})["tomorrow"] == {"a": 1}


@pytest.mark.parametrize("dialect", ["chat", "completions"])
@pytest.mark.parametrize(
    ("options", "expected", "hidden"),
    [
        ("absent", {"include_usage": True}, True),
        (None, {"include_usage": True}, True),
        ({}, {"include_usage": True}, True),
        ({"include_usage": False}, {"include_usage": True}, True),
        ({"include_usage": None}, {"include_usage": True}, True),
        ({"include_usage": True}, {"include_usage": True}, False),
        ({"include_usage": True, "continuous_usage_stats": True},
         {"include_usage": True, "continuous_usage_stats": True}, False),
        ({"continuous_usage_stats": True, "x": 1}, {"include_usage": True, "x": 1}, True),
    ],
)  # fmt: skip
def test_usage_is_asked_for_and_hidden_from_who_did_not_ask(
    dialect: str, options: Any, expected: dict[str, Any], hidden: bool
) -> None:
    document = {"model": MODEL, "stream": True} | ({} if options == "absent" else {"stream_options": options})
    body = read(document, dialect)
    assert body.hide_usage is hidden
    assert json.loads(body.encode(MODEL))["stream_options"] == expected


@pytest.mark.parametrize("options", ["yes", 1, [], {"include_usage": "yes"}, {"include_usage": 1}])
def test_stream_options_must_be_what_they_are(options: object) -> None:
    error = refusal({"model": MODEL, "stream": True, "stream_options": options})
    assert (error.code, error.param) == ("invalid_request", "stream_options")


@pytest.mark.parametrize("dialect", ["responses", "messages"])
def test_apis_that_report_usage_by_themselves_are_not_asked(dialect: str) -> None:
    assert "stream_options" not in sent({"model": MODEL, "stream": True}, dialect)


def test_usage_is_not_asked_for_where_nothing_is_streamed() -> None:
    assert "stream_options" not in sent({"model": MODEL, "stream": False})


@pytest.mark.parametrize("given_store", ["absent", True, False, None])
def test_store_is_always_false_on_responses(given_store: object) -> None:
    document = {"model": MODEL, "input": "x"} | ({} if given_store == "absent" else {"store": given_store})
    assert sent(document, "responses")["store"] is False


@pytest.mark.parametrize("name", STATEFUL)
def test_state_kept_in_an_engine_is_refused_with_the_remedy(name: str) -> None:
    error = refusal({"model": MODEL, name: "resp_1"}, "responses")
    assert (error.code, error.param) == ("unsupported_field", name)
    assert "`input`" in error.message
    assert sent({"model": MODEL, name: None}, "responses")[name] is None


def test_background_is_refused() -> None:
    assert refusal({"model": MODEL, "background": True}, "responses").code == "unsupported_field"
    assert sent({"model": MODEL, "background": False}, "responses")["background"] is False


def test_store_and_background_mean_nothing_to_other_apis() -> None:
    assert sent({"model": MODEL, "background": True, "store": True})["store"] is True


@pytest.mark.parametrize("name", ['a"b', "ä", "x" * 500])
def test_the_engines_own_name_for_the_model_is_sent(name: str) -> None:
    assert sent({"model": "public", "a": 1}, model=name) == {"model": name, "a": 1}


SALT = msgspec.Raw(b'"5a17"')


@pytest.mark.parametrize("api", [api for api in APIS.values() if api.streams], ids=lambda api: api.path.decode())
@pytest.mark.parametrize("salt", ["absent", None, "", "mine"])
def test_every_api_that_generates_gets_the_tenants_salt_for_the_callers(api: Api, salt: str | None) -> None:
    document = {"model": MODEL} | ({} if salt == "absent" else {"cache_salt": salt})
    body = read(document, api.dialect, streams=api.streams)
    assert json.loads(body.encode(MODEL, SALT))["cache_salt"] == "5a17"


@pytest.mark.parametrize("api", [api for api in APIS.values() if not api.streams], ids=lambda api: api.path.decode())
def test_what_only_counts_tokens_gets_no_salt(api: Api) -> None:
    body = read({"model": MODEL, "cache_salt": "mine"}, api.dialect, streams=api.streams)
    assert json.loads(body.encode(MODEL, SALT)) == {"model": MODEL}


def test_a_body_can_be_encoded_again_for_another_model() -> None:
    body = read({"model": "public", "a": 1})
    for model in ("first", "first", "public", "second"):
        assert json.loads(body.encode(model, SALT)) == {"model": model, "a": 1, "cache_salt": "5a17"}
