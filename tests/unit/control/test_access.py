"""Control's token and what a peer that guesses gets."""

import stat
from pathlib import Path

import pytest
from vitalis_serve.control.access import Access, Failures, control_token
from vitalis_serve.errors import ServeError, StartError


def code(access: Access, header: bytes | None, peer: str = "p", now: float = 0) -> str:
    try:
        access.check(header, peer, now, wall=0)
    except ServeError as error:
        return error.code
    return "open"


def test_token_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "control.token"
    token = control_token(path)
    assert token.startswith("vtc_")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert control_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "vtc_short", "secret" * 10])
def test_token_file_that_is_not_ours_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t").write_text(content)
    with pytest.raises(StartError, match="not one of ours"):
        control_token(tmp_path / "t")


def test_token_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="neither read nor made"):
        control_token(tmp_path / "gone" / "t")


@pytest.mark.parametrize(
    ("header", "outcome"),
    [
        (b"Bearer vtc_right", "open"),
        (b"bearer  vtc_right ", "open"),
        (b"Bearer vtc_wrong", "invalid_key"),
        (b"Bearer vtc_right2", "invalid_key"),
        (b"Basic vtc_right", "invalid_key"),
        (b"vtc_right", "missing_key"),
        (b"Bearer \xff\xfe", "invalid_key"),
        (b"Bearer", "missing_key"),
        (b"", "missing_key"),
        (None, "missing_key"),
    ],
)
def test_only_the_right_token_opens(header: bytes | None, outcome: str) -> None:
    assert code(Access("vtc_right", Failures()), header) == outcome


def test_failures_are_limited_and_come_back_with_time() -> None:
    access = Access("vtc_right", Failures(burst=3, per_second=1))
    assert [code(access, b"Bearer x") for _ in range(4)] == ["invalid_key"] * 3 + ["authentication_failures"]
    assert code(access, b"Bearer x", peer="other") == "invalid_key"
    assert code(access, b"Bearer vtc_right") == "open"
    assert code(access, b"Bearer x", now=1.1) == "invalid_key"
    assert code(access, b"Bearer x", now=1.2) == "authentication_failures"


def test_memory_of_failures_is_bounded() -> None:
    failures = Failures(peers=100)
    for n in range(5000):
        failures.count(f"peer-{n}", 0)
    assert len(failures) == 100
