"""Candidates as files that vitalis-serve loads."""

import os
from pathlib import Path

import pytest
import yaml
from vitalis_load import profiles, tuning
from vitalis_load.errors import LoadFailure
from vitalis_load.program import InForce
from vitalis_serve.settings import load

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_every_value_of_the_spaces_is_a_setting_that_the_server_takes(tmp_path, name):
    """Each candidate one by one, in a profile beside the shipped configuration."""
    shelf = profiles.Shelf(tmp_path, _in_force("h200" if name == "cuda" else "cpu-tiny"))
    space = profiles.space(name)
    assert len(space.dimensions) >= 3
    for dimension in space.dimensions:
        for value in dimension.values:
            candidate = dimension.settings(value)
            shelf.add("candidate", candidate)
            settings = load(shelf.config, {"VITALIS_PROFILE": "candidate"}).model_dump()
            for path, wanted in candidate.items():
                found = settings
                for step in path.split(".", 2):
                    found = found[step]
                assert found == wanted, path


def test_a_profile_keeps_what_its_base_says_and_its_head_is_comment(tmp_path):
    shelf = profiles.Shelf(tmp_path, _in_force("h200"))
    path = shelf.add("tuned", {"engines.slots": 700}, "best of all\n\nand why: it was measured")
    text = path.read_text()
    assert text.startswith("# best of all\n#\n# and why: it was measured\n")
    base = yaml.safe_load((ROOT / "config/profiles/h200.yaml").read_text())
    assert yaml.safe_load(text) == {"engines": base["engines"] | {"slots": 700}}


def test_another_model_takes_the_place_of_the_bases(tmp_path):
    shelf = profiles.Shelf(tmp_path, _in_force("cpu-demo"))
    path = shelf.add("dummy", {"model.folder": "/models/none", "model.name": "gpt-oss-20b"})
    assert yaml.safe_load(path.read_text())["model"] == {"name": "gpt-oss-20b", "folder": "/models/none"}


def test_what_is_in_force_is_known_for_all_that_is_varied():
    in_force = InForce("x", [], {"engines": {"slots": 48, "replicas": 2, "engine_args": {"stream-interval": 4}}})
    found = profiles.current(profiles.space("cuda"), in_force)
    assert found["engines.slots"] == 48
    assert found["engines.engine_args.max-num-seqs"] == 48, "it follows the slots"
    assert found["engines.engine_args.stream-interval"] == 4
    assert "engines.engine_args.max-num-batched-tokens" not in found


def test_what_is_to_be_varied_can_be_given_in_words():
    [both, other] = profiles.space(
        "", ["engines.slots+engines.engine_args.max-num-seqs=8,16", "engines.replicas=1,2"]
    ).dimensions
    assert both.settings(16) == {"engines.slots": 16, "engines.engine_args.max-num-seqs": 16}
    assert other.ordered
    assert tuning.name(both.settings(8)) == "max-num-seqs=8,slots=8"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dimensions: [{name: a, values: [1]}]", "a: nothing is no setting"),
        ("dimensions: [{name: a, set: [slots], values: [1]}]", "a: slots is no setting"),
        ("dimensions: [{name: a, set: [engines.slots], values: [{engines.slots: 1}]}]", "either `set` with plain"),
        ("dimensions: [{name: a, sets: [engines.slots], values: [1]}]", "unknown field `sets`"),
        ("dimensions: [", "no YAML"),
    ],
)
def test_a_space_with_a_mistake_is_one_sentence(tmp_path, text, words):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(LoadFailure, match=words):
        profiles.space(str(tmp_path / "space.yaml"))


def test_a_space_that_is_not_there_says_which_there_are():
    with pytest.raises(LoadFailure, match="give cuda, cpu or a file's path"):
        profiles.space("rocm")


def test_a_try_without_values_says_how():
    with pytest.raises(LoadFailure, match="--try engines.slots: needs SETTING=VALUE,VALUE"):
        profiles.space("", ["engines.slots"])


def test_a_profile_is_flat_up_to_the_options_of_engines():
    document = yaml.safe_load((ROOT / "config/profiles/h200.yaml").read_text())
    found = profiles.flat(document)
    assert found["engines.engine_args.max-num-batched-tokens"] == 8192
    assert tuning.profile({}, found) == document


def _in_force(profile: str) -> InForce:
    config = ROOT / "config"
    settings = load(config / "gpt-oss.yaml", {**os.environ, "VITALIS_PROFILE": profile}).model_dump(mode="json")
    return InForce(profile, [str(config / "gpt-oss.yaml"), str(config / "profiles" / f"{profile}.yaml")], settings)
