"""Settings and recorded machines for the tests of engines."""

import json
from pathlib import Path

import pytest
from vitalis_serve.engines.gpus import Inventory
from vitalis_serve.engines.memory import architectures
from vitalis_serve.settings import Settings, resolve

CONFIG = Path(__file__).parents[3] / "config"


@pytest.fixture
def machine():
    def machine(name: str) -> Inventory:
        return Inventory.from_json(json.loads((Path(__file__).parent / "inventories" / f"{name}.json").read_text()))

    return machine


@pytest.fixture
def configured():
    def configured(profile: str, **environ: str) -> Settings:
        variables = {f"VITALIS_{key}": value for key, value in environ.items()}
        return resolve(CONFIG / "gpt-oss.yaml", {"VITALIS_PROFILE": profile, **variables}).settings

    return configured


@pytest.fixture
def shapes():
    return architectures(CONFIG / "model-params.json")
