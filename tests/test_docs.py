"""docs/ against the code: tables, links, examples and figures. A document that has fallen behind fails here."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from vitalis_serve import errors, metrics
from vitalis_serve.cli import main
from vitalis_serve.cli.application import app
from vitalis_serve.fleet import ReplicaState
from vitalis_serve.gateway.body import REFUSED
from vitalis_serve.gateway.paths import APIS, MODEL_PREFIX, OWN
from vitalis_serve.settings import Settings
from vitalis_serve.settings.schema import Control, Deadlines, Gateway, Queue
from vitalis_serve.settings.variables import OTHER_VARIABLES, VARIABLES, setting_paths
from vitalis_serve.supervise.lifecycle import TRANSITIONS

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
README = REPOSITORY / "README.md"
EVERYTHING = PAGES | ({"../README.md": README.read_text()} if README.exists() else {})
# What stands for a value in an example, and a value for it.
BLANKS = {"ID": "abcdefghijkl", "N": "1", "NAME": "a", "KEY": "vts_a_b", "...": "x"}


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command of the program, as the words that call it."""
    inner = getattr(command, "commands", None)
    if not inner:
        yield words
        return
    for name, child in inner.items():
        yield from commands(child, (*words, name))


COMMANDS = tuple(commands(typer.main.get_command(app)))


def test_every_page_is_in_the_index() -> None:
    for name in PAGES.keys() - {"README.md"}:
        assert f"({name})" in PAGES["README.md"], name


# Tables


def expected_settings() -> list[str]:
    defaults = Settings().model_dump(mode="json")
    names = {path: variable for variable, path in VARIABLES.items()}
    rows = []
    for path in setting_paths():
        value: Any = defaults
        for key in path:
            value = value[key]
        variable = f"`{names[path]}`" if path in names else ""
        rows.append(f"| `{'.'.join(path)}` | {variable} | `{json.dumps(value)}` |")
    return rows


def expected_metrics() -> list[str]:
    workers = [(metric, ("worker",)) for metric in metrics.WORKER_METRICS]
    return [
        f"| `{m.name}` | {m.kind} | {', '.join((*m.labels, *more)) or '-'} | {m.help} |"
        for m, more in [*workers, *((metric, ()) for metric in metrics.CONTROL_METRICS)]
    ]


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("configuration.md", expected_settings()),
        ("configuration.md", [f"| `{name}` | {meaning} |" for name, meaning in OTHER_VARIABLES.items()]),
        ("metrics.md", expected_metrics()),
    ],
    ids=["settings", "variables", "metrics"],
)
def test_tables_are_the_code_s(page: str, rows: list[str]) -> None:
    """To mend one, copy what this test prints."""
    missing = [row for row in rows if row not in PAGES[page].splitlines()]
    assert not missing, "\n".join(["lacking:", *missing])


def test_no_setting_variable_or_metric_is_left_in_a_table_that_is_gone_from_the_code() -> None:
    text = PAGES["configuration.md"] + PAGES["metrics.md"]
    known = {*VARIABLES, *OTHER_VARIABLES, *(m.name for m in metrics.WORKER_METRICS + metrics.CONTROL_METRICS)}
    assert set(re.findall(r"\bVITALIS_\w+|\bvitalis_\w+", text)) <= known | {"vitalis_serve"}


def test_every_error_stands_under_its_status() -> None:
    """In a row `| status | codes | when |`, or among control's own."""
    said: dict[str, int] = {}
    section = PAGES["behaviour.md"].split("\n## Errors")[1].split("\n## ")[0]
    for line in section.splitlines():
        if match := re.match(r"\| (\d{3}) \| (.+?) \|", line):
            said |= dict.fromkeys(re.findall(r"`(\w+)`", match[2]), int(match[1]))
    control = section[section.index("Only from control") :].split("\n\n")[0]
    for part in re.split(r"(?=\b[45]\d\d\b)", control)[1:]:
        said |= dict.fromkeys(re.findall(r"`(\w+)`", part), int(part[:3]))
    assert said == {code: status for code, (status, _) in errors.CODES.items()}


def test_the_codes_said_to_be_reserved_are_those_that_nothing_raises() -> None:
    source = "".join(path.read_text() for path in (REPOSITORY / "server").rglob("*.py") if path.name != "errors.py")
    raised = {code for code in errors.CODES if f'"{code}"' in source}
    rows = [line for line in PAGES["behaviour.md"].splitlines() if "not answered yet" in line]
    reserved = {code for row in rows for code in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert reserved == errors.CODES.keys() - raised


# openapi.yaml; tests/property/test_api_schema.py holds it against a running gateway

OPENAPI = yaml.safe_load((DOCS / "openapi.yaml").read_text())


def test_the_api_s_paths_are_those_that_are_answered() -> None:
    said = {(path, method) for path, methods in OPENAPI["paths"].items() for method in methods}
    posts = {(path.decode(), "post") for path in APIS}
    gets = {(path.decode(), "get") for path in (*OWN, MODEL_PREFIX + b"{id}")}
    assert said == posts | gets
    without_key = {path for path, methods in OPENAPI["paths"].items() if methods.get("get", {}).get("security") == []}
    assert without_key == {path.decode() for path, keyed in OWN.items() if not keyed}


def test_the_api_s_codes_are_those_of_the_data_plane() -> None:
    section = PAGES["behaviour.md"].split("\n## Errors")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if re.match(r"\| \d{3} \|", line)]
    codes = {code: row[1].strip() for row in rows for code in re.findall(r"`(\w+)`", row[2])}
    assert set(OPENAPI["components"]["schemas"]["Code"]["anyOf"][0]["enum"]) == codes.keys()
    for status, answer in OPENAPI["paths"]["/v1/chat/completions"]["post"]["responses"].items():
        if status != "200":
            described = OPENAPI["components"]["responses"][answer["$ref"].rpartition("/")[2]]["description"]
            wanted = {code for code in codes if codes[code] == status}
            assert wanted <= set(re.findall(r"`(\w+)`", described)), status


def test_the_api_s_refused_fields_are_those_that_are_refused() -> None:
    assert set(OPENAPI["components"]["schemas"]["NoEngineFields"]["propertyNames"]["not"]["enum"]) == REFUSED


def test_every_state_is_explained() -> None:
    for state in ReplicaState:
        assert f"| {state} |" in PAGES["behaviour.md"], state


@pytest.mark.parametrize(
    ("section", "prefix"),
    [(Gateway, "gateway."), (Queue, "gateway.queue."), (Deadlines, "gateway.deadlines."), (Control, "control.")],
)
def test_defaults_in_prose_are_the_schema_s(section: type[Any], prefix: str) -> None:
    """`| `gateway.queue.max_seconds` | 30 | ...` in behaviour.md."""
    defaults = section().model_dump()
    for key, said in re.findall(rf"^\| `{re.escape(prefix)}(\w+)` \| ([\d,]+) \|", PAGES["behaviour.md"], re.MULTILINE):
        assert float(said.replace(",", "")) == defaults[key], key


# Links and examples


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", EVERYTHING)
def test_links_lead_somewhere(page: str) -> None:
    base = (DOCS / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", EVERYTHING[page]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, fragment = target.partition("#")
        path = (base / file).resolve() if file else (DOCS / page).resolve()
        assert path.exists(), target
        if fragment:
            anchors = {anchor(line.lstrip("#")) for line in path.read_text().splitlines() if line.startswith("#")}
            assert fragment in anchors, target


def examples(text: str) -> Iterator[list[str]]:
    """Calls of vitalis-serve, in blocks and between backticks; comments and what stands before the program dropped."""
    blocks = re.findall(r"```(?:sh|shell|bash)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]*vitalis-serve [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        words = shlex.split(line, comments=True)
        calls = [i for i, word in enumerate(words) if word.rpartition("/")[2] == "vitalis-serve"]
        # In `docker compose exec vitalis-serve vitalis-serve smoke` the first is the service's name.
        if calls and len(words) > calls[-1] + 1 and words[calls[-1] - 1] != "exec":
            yield words[calls[-1] + 1 :]


def test_every_command_is_in_the_documents() -> None:
    said = [" ".join(words) for text in EVERYTHING.values() for words in examples(text)]
    for words in COMMANDS:
        call = " ".join(words)
        assert any(f"{line} ".startswith(f"{call} ") for line in said), f"vitalis-serve {call}"


@pytest.mark.parametrize("page", EVERYTHING)
def test_examples_are_commands_of_the_program(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed by the program's own parser, which stops at --help before it acts."""
    for words in examples(EVERYTHING[page]):
        known = any(words[: len(command)] == list(command) for command in COMMANDS)
        group = len(words) == 1 and any(command[0] == words[0] for command in COMMANDS)
        assert known or group or words[0].startswith("-"), f"vitalis-serve {shlex.join(words)}"
        called = [BLANKS.get(word, word) for word in words]
        assert main([*called, "--help"]) == 0, f"vitalis-serve {shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", EVERYTHING)
def test_files_that_are_named_exist(page: str) -> None:
    for name in re.findall(r"`((?:deploy|config|tests|docs|server)/[\w./-]+)`", EVERYTHING[page]):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("page", EVERYTHING)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    blocks = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", EVERYTHING[page], re.DOTALL))
    said = re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)", blocks, re.MULTILINE)
    said += re.findall(r"`(?:\w+=\S+ )*make ([a-z-]+)`", EVERYTHING[page])
    assert set(said) <= targets


# Figures


def test_figures_are_what_their_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "figures" / "draw.py"))["FIGURES"]
    assert {path.name for path in (DOCS / "figures").glob("*.svg")} == set(drawn)
    for name, draw in drawn.items():
        assert (DOCS / "figures" / name).read_text() == str(draw()), f"run docs/figures/draw.py: {name} is old"


def test_the_figure_of_states_shows_every_transition_and_no_other() -> None:
    """An arrow between groups stands for one from each member to each."""
    text = (DOCS / "figures" / "replica-states.svg").read_text()
    shown = {
        (a, b)
        for sources, targets in re.findall(r'data-from="([^"]+)" data-to="([^"]+)"', text)
        for a in sources.split()
        for b in targets.split()
        if a != b
    }
    assert shown == {(str(a), str(b)) for a, targets in TRANSITIONS.items() for b in targets}
