"""docs/openapi.yaml against a running gateway: requests made from the document, proper ones and others, get the
statuses, headers and bodies that it promises, and no 5xx while the engine is well."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support import gateway, simulator
from tests.support.examples import examples
from tests.support.simulator import Simulator
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker, snapshot

SCHEMA = schemathesis.openapi.from_path(Path(__file__).parents[2] / "docs" / "openapi.yaml")
SCHEMA.config.generation.update(with_security_parameters=False)  # with other keys than ours all answers are 401
CHECKS = [
    checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


# Whatever is asked for, the simulated engine does little work for it.
LIMITS = {"max_tokens": 40, "min_tokens": 40, "n": 4, "logprobs": 4, "prompt_logprobs": 4}


@dataclass
class Stage:
    worker: WorkerProcess
    engine: Simulator


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    document = json.loads(snapshot())
    document["routes"] = [{"name": MODEL, "model": MODEL, "limits": LIMITS}]
    with (
        simulator.started() as engine,
        running_worker(tmp_path_factory.mktemp("schema"), document=json.dumps(document).encode()) as worker,
    ):
        worker.serve(engine.address)
        yield Stage(worker, engine)
        gateway.settled(worker)


@SCHEMA.parametrize()
@settings(max_examples=min(examples(20), 200), deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_documented_is_what_happens(case: schemathesis.Case, stage: Stage) -> None:
    if isinstance(case.body, dict) and isinstance(name := case.body.get("model"), str) and len(name) % 3:
        case.body["model"] = MODEL  # else the engine would hardly ever be asked
        if len(name) % 3 == 1:
            case.body["stream"] = True
    case.call_and_validate(
        base_url=stage.worker.url, headers={"authorization": f"Bearer {KEY}"}, checks=CHECKS, timeout=5
    )
