"""Options that the installed vLLM does not know, asked of a program that prints a help text as vLLM does."""

import stat

import pytest
from vitalis_serve.engines.flags import COMMON, KnownFlags, check, known_flags, refuse_unknown
from vitalis_serve.errors import ConfigurationError

HELP = """usage: api_server.py [-h] [--model MODEL] [--max-num-seqs N]
  --model MODEL
  --max-num-seqs MAX_NUM_SEQS   most sequences
  --tensor-parallel-size N, -tp N
  --enforce-eager, --no-enforce-eager
  --compilation-config JSON, -cc JSON
"""
KNOWN = KnownFlags(
    frozenset(
        {"model", "max-num-seqs", "enforce-eager", "no-enforce-eager", "compilation-config", "tensor-parallel-size"}
    )
)


@pytest.fixture
def engine(tmp_path):
    """A "python" in a virtual environment's place that counts its calls and answers as vLLM would."""

    def engine(script: str):
        path = tmp_path / "env" / "bin" / "python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return engine


def calls(tmp_path):
    return len((tmp_path / "calls").read_text().splitlines())


def test_asked_once_then_kept_until_the_environment_changes(tmp_path, engine):
    python = engine(f"cat <<'END'\n{HELP}END")
    packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    for _ in range(2):
        known = known_flags(python, tmp_path / "cache")
        assert {"max-num-seqs", "no-enforce-eager", "compilation-config"} <= known.names
        assert not known.problem
    assert calls(tmp_path) == 1
    (packages / "new-package").mkdir()
    known_flags(python, tmp_path / "cache")
    assert calls(tmp_path) == 2


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo No module named vllm >&2; exit 1", "No module named vllm"),
        ("exit 0", "no output"),
        ("echo --something-else", "did not list"),
    ],
)
def test_what_cannot_be_asked_is_said_and_not_kept(tmp_path, engine, script, problem):
    python = engine(script)
    for _ in range(2):
        known = known_flags(python, tmp_path / "cache")
        assert not known.names
        assert problem in known.problem
    assert calls(tmp_path) == 2
    refuse_unknown({"anything": 1}, known)


def test_no_program_is_a_problem_not_a_failure(tmp_path):
    assert "could not be asked" in known_flags(tmp_path / "none", tmp_path).problem


def test_a_damaged_cache_is_asked_again(tmp_path, engine):
    python = engine(f"cat <<'END'\n{HELP}END")
    known_flags(python, tmp_path / "cache")
    for file in (tmp_path / "cache" / "flags").iterdir():
        file.write_text('["x"')
    assert "max-num-seqs" in known_flags(python, tmp_path / "cache").names


def test_known_options_pass():
    refuse_unknown(
        {"max-num-seqs": 1, "enforce-eager": False, "compilation-config.mode": 3, "O": 2, "gone": None}, KNOWN
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max-num-seq": 1}, "engines.engine_args.max-num-seq is not an option of the installed vLLM; did you mean"),
        ({"enforce-eagr": False}, "did you mean enforce-eager?"),
        ({"zzzzzz": 1}, "zzzzzz is not an option of the installed vLLM"),
    ],
)
def test_unknown_options_are_refused(args, words):
    with pytest.raises(ConfigurationError) as caught:
        refuse_unknown(args, KNOWN)
    assert words in str(caught.value)


@pytest.mark.parametrize("profile", ["h200", "h100", "a100", "l40s", "rtx-24gb", "rtx-16gb", "cpu-demo", "cpu-tiny"])
def test_shipped_profiles_need_not_be_asked_about(configured, tmp_path, profile):
    args = configured(profile).engines.engine_args
    assert set(args) <= COMMON
    assert check(args, tmp_path / "none", tmp_path) == ""


def test_others_are_asked_about(tmp_path):
    assert "could not be asked" in check({"seed": 1}, tmp_path / "none", tmp_path)
