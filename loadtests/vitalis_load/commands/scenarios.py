"""`vitalis-load scenarios`: which there are, and one of them as it would be run."""

from typing import Annotated

import typer
import yaml

from vitalis_load.arrivals import Users
from vitalis_load.errors import LoadFailure
from vitalis_load.scenario import FOLDER, Scenario, load, names


def scenarios(
    name: Annotated[str, typer.Argument(help="one of them, or a file: shown with all defaults")] = "",
    scale: Annotated[str, typer.Option(help="full or small")] = "full",
    change: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="as in `run`")] = None,
) -> None:
    """List the scenarios, or show one as it would be run."""
    if name:
        print(shown(load(name, scale=scale, overrides=assignments(change or []))))
        return
    for one in names():
        found = load(one, scale=scale)
        print(f"{one}: {offered(found)}, {duration(found.seconds)}\n    {found.about}")
    print(f"\nOne as it would be run: vitalis-load scenarios NAME [--scale small]. They lie in {FOLDER}")


def assignments(written: list[str]) -> dict[str, str]:
    """`--set` options by field. Raises LoadFailure for one without "="."""
    for one in written:
        if "=" not in one:
            raise LoadFailure(f"--set {one}: needs FIELD=VALUE, as in --set arrivals.rate=5")
    return dict(one.split("=", 1) for one in written)


def shown(scenario: Scenario) -> str:
    """Its YAML with defaults, after what it comes to."""
    start, end = scenario.window
    head = [f"# {offered(scenario)}, for {duration(scenario.seconds)}; measured from {start:g} to {end:g} s"]
    for label in filter(None, scenario.labels):
        key = scenario.credential(label)
        of_class = f" of class {key.klass}" if key.klass else ""
        head.append(f"# key {label!r}{of_class}: --keys {label}=VARIABLE, or in {key.env}")
    fields = {name: value for name, value in scenario.resolved().items() if name != "expected"}
    body = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    return "\n".join([*head, body.rstrip()])


def offered(scenario: Scenario) -> str:
    """The load in words."""
    if isinstance(scenario.arrivals, Users):
        users = round(scenario.arrivals.users * scenario.course().peak)
        return f"{users} users who wait for their answers"
    mean, peak = scenario.mean_rate, scenario.peak_rate
    return f"{mean:.3g} requests/s" + (f" (at most {peak:.3g})" if peak > mean * 1.02 else "")


def duration(seconds: float) -> str:
    """Such as "2 min 30 s"."""
    whole = round(seconds)
    parts = [(whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
