"""A missing tool of ours is a failure, never a test that looks as if it had passed; one of the machine's is a skip."""

import pytest

from tests.deploy.support import machine_tool, tool


def test_tool_of_the_development_environment_must_be_there() -> None:
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is missing .*make environments"):
        tool("no-such-tool")


def test_tool_of_the_machine_may_be_missing() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no-such-tool is not on this machine \(somewhere\)"):
        machine_tool("no-such-tool", "somewhere")
