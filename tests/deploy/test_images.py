"""The Dockerfiles: what they copy is there, what they start exists, and who they run as."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest
from vitalis_serve.settings.variables import OTHER_VARIABLES, VARIABLES

from tests.deploy.support import DOCKERFILES, ENGINES, REPOSITORY, command_exists, instructions, passes, tool

each = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def test_both_images_are_there() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.engine", "Dockerfile.gateway"]


def sources(dockerfile: Path) -> list[str]:
    found: list[str] = []
    for name, rest in instructions(dockerfile):
        if name == "COPY":
            found += [rest.split()[0].replace("${ENGINE}", engine) for engine in ENGINES]
    return found


@each
def test_every_copied_file_is_in_the_repository_and_reaches_the_builder(dockerfile: Path) -> None:
    """.dockerignore forbids all and allows some: a source that it forgets would fail on a build host only."""
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore")
    allowed = [line[1:] for line in ignore.read_text().splitlines() if line.startswith("!")]
    assert sources(dockerfile)
    for source in sources(dockerfile):
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule) or source.startswith(f"{rule}/") for rule in allowed), source


@each
def test_everything_the_program_needs_is_copied(dockerfile: Path) -> None:
    assert {"server", "config", "deploy/environments.py", "deploy/locks/gateway.txt"} <= set(sources(dockerfile))


@each
def test_the_base_image_has_a_version(dockerfile: Path) -> None:
    arguments = dict(rest.split("=", 1) for name, rest in instructions(dockerfile) if name == "ARG")
    (base,) = (rest for name, rest in instructions(dockerfile) if name == "FROM")
    base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
    _, _, tag = base.partition(":")
    assert re.match(r"\d+\.\d+", tag), base


@each
def test_the_last_user_is_a_number_and_not_root(dockerfile: Path) -> None:
    """A number, so that an orchestrator can see that it is not root."""
    users = [rest for name, rest in instructions(dockerfile) if name == "USER"]
    uid, _, gid = users[-1].partition(":")
    assert int(uid) > 0
    assert int(gid) > 0


@each
def test_health_is_asked_of_the_worker_after_a_start_period(dockerfile: Path) -> None:
    (check,) = (rest for name, rest in instructions(dockerfile) if name == "HEALTHCHECK")
    assert "--start-period=" in check
    assert "http://127.0.0.1:8080/healthz" in check
    compile(json.loads(check[check.index("[") :])[2], "HEALTHCHECK", "exec")


@each
def test_the_entry_point_and_its_command_exist(dockerfile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found = dict(instructions(dockerfile))
    (entry,) = json.loads(found["ENTRYPOINT"])
    assert entry in project["scripts"]
    command_exists([word for word in json.loads(found["CMD"]) if word != "--help"], capsys)


@each
def test_its_variables_are_known(dockerfile: Path) -> None:
    """An unknown VITALIS_ name stops the start."""
    known = {*VARIABLES, *OTHER_VARIABLES}
    environment = next(rest for name, rest in instructions(dockerfile) if name == "ENV")
    assert set(re.findall(r"VITALIS_\w+", environment)) <= known


@each
def test_packages_come_from_the_locks_only(dockerfile: Path) -> None:
    """deploy/environments.py installs with --require-hashes; nothing beside it calls pip."""
    runs = [rest for name, rest in instructions(dockerfile) if name == "RUN"]
    assert any("deploy/environments.py" in run for run in runs)
    assert not any(re.search(r"\bpip3? install|-m pip", run) for run in runs)
    assert "--require-hashes" in (REPOSITORY / "deploy" / "environments.py").read_text()


@each
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    passes(tool("hadolint"), "--no-color", str(dockerfile))
