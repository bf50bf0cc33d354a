"""The systemd unit."""

import re
from pathlib import Path

import pytest

from tests.deploy.support import UNIT, command_exists, longest_stop_seconds, machine_tool, passes


def option(name: str) -> str:
    """The last value of an option; fails where it is not there."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)[-1]


def test_systemd_waits_as_long_as_a_stop_takes() -> None:
    assert int(option("TimeoutStopSec")) >= longest_stop_seconds()


def test_only_the_supervisor_is_told_to_stop() -> None:
    assert option("KillMode") == "mixed"


def test_crashes_are_restarted_but_not_what_restarting_cannot_mend() -> None:
    assert option("Restart") == "on-failure"
    assert option("RestartPreventExitStatus").split() == ["2", "3"]


def test_an_engine_killed_for_memory_does_not_stop_the_rest() -> None:
    assert option("OOMPolicy") == "continue"


def test_descriptors_suffice_for_every_allowed_connection() -> None:
    from vitalis_serve.settings import Settings

    assert int(option("LimitNOFILE")) >= 2 * Settings().gateway.max_connections + 1000


def test_the_graphics_cards_stay_reachable() -> None:
    """Each of these closes /dev/nvidia* to the engines."""
    text = UNIT.read_text()
    for closed in ("PrivateDevices", "ProtectClock", "DevicePolicy", "MemoryDenyWriteExecute"):
        assert not re.search(rf"^{closed}=", text, re.MULTILINE), closed


def test_the_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = option("ExecStart").split()
    assert Path(program).name == "vitalis-serve"
    command_exists(words, capsys)


def test_systemd_analyze_accepts_it(tmp_path: Path) -> None:
    """With the path of a program that is there in place of the one of an installation."""
    analyze = machine_tool("systemd-analyze", "Debian's systemd")
    program = option("ExecStart").split()[0]
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program, "/bin/true"))
    passes(analyze, "verify", "--man=no", str(copy))
    passes(analyze, "security", "--offline=yes", "--threshold=40", str(copy))
