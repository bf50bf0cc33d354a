"""The files in config/: complete, equal to the program's defaults, and loadable with every profile."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from vitalis_serve.settings import Settings, resolve
from vitalis_serve.settings.overrides import overridden
from vitalis_serve.settings.schema import Issuer, Route
from vitalis_serve.settings.sources import read_yaml
from vitalis_serve.settings.variables import OTHER_VARIABLES, PREFIX, VARIABLES, setting_paths

CONFIG = Path(__file__).parents[3] / "config"
PROFILES = sorted(path.stem for path in (CONFIG / "profiles").glob("*.yaml"))
EXPECTED = ["a100", "cpu-demo", "cpu-tiny", "h100", "h200", "l40s", "rtx-16gb", "rtx-24gb"]


def lookup(values, path):
    for key in path:
        values = values[key]
    return values


def test_the_file_states_every_setting_with_its_default():
    layer = read_yaml(CONFIG / "gpt-oss.yaml")
    defaults = Settings().model_dump(mode="json")
    for path in setting_paths():
        assert path in layer.lines, f"{'.'.join(path)} is not in config/gpt-oss.yaml"
        assert lookup(layer.values, path) == lookup(defaults, path), path


def test_every_key_of_the_file_is_documented():
    lines = (CONFIG / "gpt-oss.yaml").read_text().splitlines()
    documented = False
    for line in lines:
        if line.strip().startswith("#"):
            documented = True
        elif not line.strip():
            documented = False
        else:
            assert documented, f"no comment above {line!r}"


def test_environment_file_and_code_agree():
    text = (CONFIG / "environment.env").read_text()
    stated = dict(re.findall(rf"^#? ?({PREFIX}[A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert set(stated) == set(VARIABLES) | set(OTHER_VARIABLES)
    stated_settings = {name: value for name, value in stated.items() if name in VARIABLES}
    environ = stated_settings | {"VITALIS_PROFILE": "cpu-demo"}
    in_force = resolve(CONFIG / "gpt-oss.yaml", environ).settings.model_dump(mode="json")
    defaults = Settings().model_dump(mode="json")
    special = {
        "VITALIS_PROFILE",
        "VITALIS_ROUTES",
        "VITALIS_CACHE_GROUPS",
        "VITALIS_TENANT_WEIGHTS",
        "VITALIS_ENGINES_ENGINE_ARGS",
        "VITALIS_ENGINES_ENGINE_ENV",
    }
    for name in sorted(set(VARIABLES) - special):
        if stated[name]:
            assert lookup(in_force, VARIABLES[name]) == lookup(defaults, VARIABLES[name]), name


def test_uncommented_lines_of_the_environment_file_set_nothing():
    lines = (CONFIG / "environment.env").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


@pytest.mark.parametrize("profile", EXPECTED)
def test_profiles_load(profile):
    settings = resolve(CONFIG / "gpt-oss.yaml", {"VITALIS_PROFILE": profile}).settings
    assert settings.profile == profile
    # Its own defaults are no wish that the profile goes against.
    assert overridden(resolve(CONFIG / "gpt-oss.yaml", {"VITALIS_PROFILE": profile})) == []
    assert settings.routes[0].name == settings.model.name
    if profile.startswith("cpu"):
        assert settings.engines.device == "cpu"
        assert settings.engines.engine_args["enforce-eager"] is True
        assert settings.engines.engine_env["VLLM_CPU_KVCACHE_SPACE"] == "1"


def route_keys(section=Route, above=""):
    """Every key of a route, `limits.n` and the like."""
    for name, field in section.model_fields.items():
        key = above + (field.alias or name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from route_keys(inner, f"{key}.")
        else:
            yield key


def test_every_key_of_a_route_is_in_the_documents():
    assert documented_keys("Routes") == list(route_keys())


def test_every_key_of_an_issuer_is_in_the_documents():
    assert documented_keys("OIDC") == [field.alias or name for name, field in Issuer.model_fields.items()]


def documented_keys(section):
    text = (CONFIG.parent / "docs" / "configuration.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE)


def example(tmp_path, key):
    """The settings that the example of a key makes."""
    text = (CONFIG / "gpt-oss.yaml").read_text()
    found = re.search(rf"^# {key}:\n(?:# .*\n)+", text, re.MULTILINE)[0]
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "plain.yaml").write_text("")
    (tmp_path / "c.yaml").write_text(re.sub(r"^# ", "", found, flags=re.MULTILINE))
    return resolve(tmp_path / "c.yaml", {"VITALIS_PROFILE": "plain"}).settings


def test_the_example_of_routes_is_one_that_works(tmp_path):
    routes = example(tmp_path, "routes").routes
    assert [route.name for route in routes] == ["vitalis-chat", "vitalis-reason", "vitalis-emergency"]


def test_the_example_of_issuers_is_one_that_works(tmp_path):
    (issuer,) = example(tmp_path, "oidc").oidc
    assert issuer.roles == {"vitalis-ops": "operator", "vitalis-admin": "admin"}


def test_profiles_are_those_that_are_documented():
    assert PROFILES == EXPECTED
    text = (CONFIG / "gpt-oss.yaml").read_text()
    assert all(profile in text for profile in EXPECTED)


def test_every_source_of_a_model_has_its_architecture():
    params = json.loads((CONFIG / "model-params.json").read_text())
    assert {"gpt-oss-20b", "gpt-oss-tiny", "smollm2-135m"} <= set(params)
