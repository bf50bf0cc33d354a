"""docs/load-testing.md names every field that a scenario may have, with its default, and shows one that works."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from vitalis_load.arrivals import Constant, Poisson, Trace, Users
from vitalis_load.metrics import Slo
from vitalis_load.prompts import File, Shared, Text
from vitalis_load.scenario import Credential, Scenario, load, names
from vitalis_load.shapes import Ramp, Soak, Spike, Steady, Step
from vitalis_load.tasks import Output, Task

PAGE = (Path(__file__).parents[3] / "docs" / "load-testing.md").read_text()
SECTION = PAGE.split("\n## Scenarios\n")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", SECTION, re.MULTILINE))


def fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.default for name, field in model.model_fields.items()}


@pytest.mark.parametrize("model", [Scenario, Task])
def test_every_field_has_its_row_and_a_plain_default(model: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\| ", SECTION, re.MULTILINE)
    for name, default in fields(model).items():
        said = [text.strip() for row, text in rows if row == name]
        assert said, name
        if isinstance(default, (int, float, bool)):
            assert f"{default:g}" in said or str(default).lower() in said, name


@pytest.mark.parametrize(
    "model", [Users, Constant, Poisson, Trace, Steady, Ramp, Spike, Step, Soak, Text, Shared, File]
)
def test_every_kind_has_its_row_with_its_fields(model: type[BaseModel]) -> None:
    row = ROWS[get_args(model.model_fields["kind"].annotation)[0]]
    for name, default in fields(model).items():
        if name not in ("kind", "seconds"):
            assert f"`{name}`" in row, name
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                shown = str(default) if type(default) not in (int, float) else f"{default:g}"
                assert f"`{name}` ({shown})" in row, name


def test_limits_outputs_and_credentials_are_explained() -> None:
    for name in (*Slo.__struct_fields__, *fields(Output), *fields(Credential)):
        if name != "about":
            assert re.search(rf"`{name}`|[`{{]{name}:|\b{name}: ", SECTION), name


def test_every_scenario_that_comes_with_it_is_listed() -> None:
    assert all(f"| `{name}` | " in SECTION for name in names())


def test_the_example_can_be_loaded(tmp_path: Path) -> None:
    start = SECTION.index("    name: desk")
    lines = SECTION[start : SECTION.index("\n\n", start)].splitlines()
    (tmp_path / "desk.yaml").write_text("\n".join(line[4:] for line in lines))
    (tmp_path / "tickets.jsonl").write_text('{"prompt": "My printer is on fire."}\n')
    assert load(tmp_path / "desk.yaml", scale="small").tasks[1].klass == "batch"
