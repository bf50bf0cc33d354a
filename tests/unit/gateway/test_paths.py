"""The allow-list is what it is said to be: a new path is a decision, not an accident."""

import pytest
from vitalis_serve.gateway.events import ENDINGS, ERRORS
from vitalis_serve.gateway.paths import APIS, GUIDANCE, OWN, path_of


def test_the_whole_list() -> None:
    assert {path: (api.dialect, api.streams) for path, api in APIS.items()} == {
        b"/v1/chat/completions": ("chat", True),
        b"/emergency-guidance": ("guidance", True),
        b"/v1/completions": ("completions", True),
        b"/v1/responses": ("responses", True),
        b"/v1/messages": ("messages", True),
        b"/v1/messages/count_tokens": ("messages", False),
        b"/tokenize": ("plain", False),
        b"/detokenize": ("plain", False),
    }
    assert OWN == {b"/v1/models": True, b"/health": True, b"/healthz": False, b"/readyz": False}


def test_every_dialect_that_streams_has_an_ending_and_an_error() -> None:
    dialects = {api.dialect for api in APIS.values() if api.streams and api.path != GUIDANCE}  # never streamed
    assert dialects == set(ENDINGS) == set(ERRORS)


def test_request_lines() -> None:
    for path, api in APIS.items():
        asked = b"/v1/chat/completions" if path == GUIDANCE else path
        assert api.request_line == b"POST " + asked + b" HTTP/1.1\r\nhost: engine\r\n"


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/a?b", b"/a"),
        (b"/a?b?/c", b"/a"),
        (b"//x/a", b"//x/a"),
        (b"http://x/a", b"/a"),
        (b"HTTPS://u:p@x:1/a/b?c", b"/a/b"),
        (b"http://x//a", b"//a"),
        (b"http://x", b"/"),
        (b"http://x?/a", b"/"),
    ],
)
def test_the_path_of_a_target(target: bytes, path: bytes) -> None:
    assert path_of(target) == path


@pytest.mark.parametrize("target", [b"", b"*", b"x:80", b"ftp://x/a", b"http:///a", b"http:/a", b"http://"])
def test_targets_without_a_path(target: bytes) -> None:
    assert not path_of(target).startswith(b"/")
