"""Request ids, credentials, and what of a client's headers goes on."""

import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.headers import WANTED, credential, forwarded, sane_host, sane_request_id


@pytest.mark.parametrize("value", [b"a", b"req-1", b"0af7651916cd43dd8448eb211c80319c", b"a.b:c_d-e", b"x" * 128])
def test_sane_ids_are_kept(value: bytes) -> None:
    assert sane_request_id(value) == value


@pytest.mark.parametrize("value", [None, b"", b"x" * 129, b"a b", b"a\nb", b"a\n", b"a\r\nx: y", b"\xff", b"a/b", b'"'])
def test_other_ids_are_not(value: bytes | None) -> None:
    assert sane_request_id(value) is None


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer KEY"},
        {b"authorization": b"bearer KEY"},
        {b"authorization": b"BEARER   KEY "},
        {b"x-api-key": b"KEY"},
        {b"x-api-key": b" KEY "},
        {b"x-api-key": b"KEY", b"authorization": b"Bearer KEY"},
    ],
)
def test_a_key_is_read_from_either_header(headers: dict[bytes, bytes]) -> None:
    assert credential(headers) == b"KEY"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({b"x-api-key": b""}, "missing_key"),
        ({b"x-api-key": b"  "}, "missing_key"),
        ({b"authorization": b"Bearer  "}, "missing_key"),
        ({b"authorization": b""}, "invalid_key"),
        ({b"authorization": b"KEY"}, "invalid_key"),
        ({b"authorization": b"Basic a2V5"}, "invalid_key"),
        ({b"authorization": b"Basic a2V5", b"x-api-key": b"KEY"}, "invalid_key"),
        ({b"authorization": b"Bearer ONE", b"x-api-key": b"TWO"}, "invalid_key"),
        ({b"authorization": b"Bearer ", b"x-api-key": b"TWO"}, "invalid_key"),
    ],
)
def test_everything_else_is_refused(headers: dict[bytes, bytes], code: str) -> None:
    with pytest.raises(ServeError) as caught:
        credential(headers)
    assert (caught.value.code, caught.value.status) == (code, 401)
    assert "KEY" not in caught.value.message.replace("Bearer KEY", "").replace("x-api-key: KEY", "")


def test_only_a_few_headers_go_on() -> None:
    given = dict.fromkeys(WANTED, b"v")
    assert forwarded(given) == (b"anthropic-version: v\r\nanthropic-beta: v\r\ntraceparent: v\r\ntracestate: v\r\n")
    assert forwarded({}) == b""


@pytest.mark.parametrize("name", [b"x-vllm-priority", b"x-data-parallel-rank", b"connection", b"te", b"cookie"])
def test_the_engines_own_and_hop_by_hop_headers_are_not_even_kept(name: bytes) -> None:
    assert name not in WANTED


@pytest.mark.parametrize("value", [b"", b"x", b"a.b-c_d:80", b"x:", b"[::1]", b"[::1]:8080", b"192.0.2.1:1", b"a%20b"])
def test_hosts(value: bytes) -> None:
    assert sane_host(value)


@pytest.mark.parametrize(
    "value", [b"a b", b"x/y", b"u@x", b"x?y", b"x#y", b"::1", b"x:y", b"[::1", b"x\n", b"\xff", b'"x"', b"x:1:2"]
)
def test_no_hosts(value: bytes) -> None:
    assert not sane_host(value)
