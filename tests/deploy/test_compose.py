"""The compose files, as text and as Docker's own tool reads them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from vitalis_serve.settings.variables import OTHER_VARIABLES, VARIABLES

from tests.deploy.support import (
    COMPOSE_FILES,
    REPOSITORY,
    command_exists,
    instructions,
    longest_stop_seconds,
    passes,
    seconds,
    tool,
)

each = pytest.mark.parametrize("file", COMPOSE_FILES, ids=lambda path: path.name)


def services(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["services"]
    return found


def test_all_three_files_are_there() -> None:
    assert [path.name for path in COMPOSE_FILES] == ["compose.apart.yaml", "compose.cpu.yaml", "compose.gpu.yaml"]


@each
def test_docker_is_given_the_time_that_a_stop_takes(file: Path) -> None:
    for name, service in services(file).items():
        assert seconds(service["stop_grace_period"]) >= longest_stop_seconds(), name


@each
def test_images_are_built_here_and_have_a_version(file: Path) -> None:
    for name, service in services(file).items():
        assert re.search(r":\d+\.\d+\.\d+$", service["image"]), name
        context = (file.parent / service["build"]["context"]).resolve()
        assert context == REPOSITORY
        dockerfile = context / service["build"]["dockerfile"]
        arguments = {rest.split("=")[0] for word, rest in instructions(dockerfile) if word == "ARG"}
        assert set(service["build"].get("args", {})) <= arguments


@each
def test_the_commands_exist(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for service in services(file).values():
        command_exists(service["command"], capsys)
        if "healthcheck" in service:
            _, program, *words = service["healthcheck"]["test"]
            assert program == "vitalis-serve"
            command_exists(words, capsys)


@each
def test_mounted_folders_exist_and_every_volume_is_declared(file: Path) -> None:
    declared = set(yaml.safe_load(file.read_text())["volumes"])
    for service in services(file).values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (file.parent / source).is_dir(), mount
            else:
                assert source in declared, mount


@each
def test_no_more_rights_than_needed(file: Path) -> None:
    for name, service in services(file).items():
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service, name


@each
def test_engines_have_no_port_and_the_gateway_only_this_host_s(file: Path) -> None:
    for name, service in services(file).items():
        if name == "engine":
            assert "ports" not in service
        else:
            assert service["ports"] == ["${PUBLISH:-127.0.0.1}:8080:8080"]


@each
def test_variables_are_known(file: Path) -> None:
    known = {*VARIABLES, *OTHER_VARIABLES, "HF_TOKEN"}
    for service in services(file).values():
        assert set(service.get("environment", {})) <= known


def test_the_gateway_looks_for_the_engine_where_it_listens() -> None:
    """The engine's data folder is the image's; its socket lies in run/ below it, in the volume both mount."""
    apart = services(REPOSITORY / "deploy" / "compose" / "compose.apart.yaml")
    volume = next(m for m in apart["engine"]["volumes"] if m.endswith(":/var/lib/vitalis-serve")).split(":")[0]
    mounted = next(m for m in apart["gateway"]["volumes"] if m.startswith(f"{volume}:")).split(":")[1]
    assert f"unix:{mounted}/run/engine-0.sock" in apart["gateway"]["command"]


@each
def test_docker_compose_accepts_it(file: Path) -> None:
    compose = tool("docker-compose")
    passes(compose, "--file", str(file), "config", "--quiet", VITALIS_PROFILE="h100")


def test_the_profile_must_be_named_where_no_gpu_can_be_asked() -> None:
    compose = tool("docker-compose")
    file = str(REPOSITORY / "deploy" / "compose" / "compose.apart.yaml")
    with pytest.raises(AssertionError, match="name the profile"):
        passes(compose, "--file", file, "config", "--quiet")


@each
def test_yamllint_finds_nothing(file: Path) -> None:
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    passes(tool("yamllint"), "--strict", "-d", rules, str(file))
