"""`check-config`, `plan`, `doctor` and `model` as a person runs them: a process, its output, its exit code."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INVENTORIES = ROOT / "tests" / "unit" / "engines" / "inventories"


@pytest.fixture
def run(tmp_path):
    def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("VITALIS_", "HF_"))}
        env |= {"PYTHONPATH": str(ROOT / "server"), "VITALIS_CACHE": str(tmp_path / "cache")}
        env |= {"VITALIS_DATA_FOLDER": str(tmp_path / "var"), **environ}
        return subprocess.run(
            [sys.executable, "-m", "vitalis_serve", *words],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def python(tmp_path):
    """A program in the place of an engine environment's python."""
    path = tmp_path / "env" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_check_config_shows_what_is_in_force_and_each_engine(run, python):
    done = run(
        "check-config", "--json", "--inventory", str(INVENTORIES / "8xh100.json"),
        VITALIS_ENGINE_PYTHON=python, VITALIS_ENGINES_REPLICAS="2",
        VITALIS_ENGINES_ENGINE_ENV='{"MY_API_KEY": "s3cr3t"}',
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert shown["profile"] == {"name": "h100", "from": "auto: 8 x NVIDIA H100 80GB HBM3"}
    assert shown["origins"]["engines.replicas"] == "VITALIS_ENGINES_REPLICAS"
    assert shown["origins"]["engines.slots"].endswith("profiles/h100.yaml:3")
    assert [engine["name"] for engine in shown["engines"]] == ["engine-0", "engine-1"]
    assert [engine["env"]["CUDA_VISIBLE_DEVICES"] for engine in shown["engines"]] == ["0", "1"]
    assert shown["engines"][0]["argv"][0] == python
    assert shown["engines"][0]["env"]["MY_API_KEY"] == "[redacted]"
    assert shown["settings"]["engines"]["engine_env"]["MY_API_KEY"] == "[redacted]"
    assert "s3cr3t" not in done.stdout


def test_check_config_is_readable(run, python):
    done = run("check-config", VITALIS_ENGINE_PYTHON=python, VITALIS_PROFILE="cpu-tiny")
    assert done.returncode == 0
    assert "engines.slots: 32  # " in done.stdout
    assert "vllm.entrypoints.openai.api_server --model " in done.stdout
    assert "    VLLM_CPU_KVCACHE_SPACE=1\n" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_check_config_works_without_an_engine_environment(run):
    done = run("check-config", VITALIS_PROFILE="cpu-demo")
    assert done.returncode == 0
    assert "note: engines.engine_python is auto, but there is no engine environment in" in done.stdout


def test_check_config_asks_about_options_it_does_not_know(run, python):
    done = run(
        "check-config",
        VITALIS_ENGINE_PYTHON=python,
        VITALIS_PROFILE="cpu-demo",
        VITALIS_ENGINES_ENGINE_ARGS='{"seed": 1}',
    )
    assert done.returncode == 0
    assert "note: options of the engines are not checked: vLLM did not list its options" in done.stdout


def test_routes_to_other_models_are_noted(run, python):
    done = run(
        "check-config", VITALIS_ENGINE_PYTHON=python, VITALIS_PROFILE="cpu-demo",
        VITALIS_ROUTES='[{"name": "chat", "model": "smollm"}]',
    )  # fmt: skip
    assert "note: route chat maps to smollm, which these engines do not serve (they serve smollm2-135m)" in done.stdout
    parts = '{"model": "smollm2-135m", "weight": 9}, {"model": "smolm2", "weight": 1}'
    done = run(
        "check-config", VITALIS_ENGINE_PYTHON=python, VITALIS_PROFILE="cpu-demo",
        VITALIS_ROUTES=f'[{{"name": "chat", "weights": [{parts}], "fallbacks": ["smollm3"]}}]',
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.startswith("note: route")] == [
        "note: route chat gives a part to smolm2, which these engines do not serve (they serve smollm2-135m)",
        "note: route chat falls back to smollm3, which these engines do not serve (they serve smollm2-135m)",
    ]


def test_a_file_elsewhere_is_checked_with_what_is_shipped(run, tmp_path):
    (tmp_path / "my.yaml").write_text("engines:\n  slots: 7\n")
    words = ("--config", str(tmp_path / "my.yaml"), "--inventory", str(INVENTORIES / "1xh200.json"))
    done = run("check-config", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"note: engines.slots: 7 at {tmp_path}/my.yaml:2 is overridden by profile h200: 512 at " in done.stdout
    done = run("plan", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "slots 512\nfits\n" in done.stdout


@pytest.mark.parametrize("command", ["check-config", "plan", "doctor"])
def test_a_mistyped_key_is_one_sentence_and_exit_2(run, tmp_path, command):
    (tmp_path / "bad.yaml").write_text("gateway:\n  prot: 1\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "x.yaml").write_text("")
    done = run(command, "--config", str(tmp_path / "bad.yaml"), VITALIS_PROFILE="x")
    assert done.returncode == 2
    assert "bad.yaml:2: gateway.prot is not a known key; did you mean gateway.port?" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_placement_that_does_not_fit_is_exit_2_for_check_and_1_for_plan(run, python):
    words = ("--inventory", str(INVENTORIES / "8xh100.json"))
    environ = {"VITALIS_ENGINES_TENSOR_PARALLEL": "3", "VITALIS_ENGINE_PYTHON": python}
    done = run("check-config", *words, **environ)
    assert done.returncode == 2
    assert "engines.tensor_parallel is 3 but 8 GPUs cannot be cut into groups of 3" in done.stderr
    done = run("plan", *words, **environ)
    assert done.returncode == 1
    assert "does not fit: engines.tensor_parallel is 3" in done.stdout


def test_plan_of_another_machine(run):
    done = run("plan", "--json", "--inventory", str(INVENTORIES / "1xh200.json"))
    assert done.returncode == 0
    shown = json.loads(done.stdout)
    assert (shown["fits"], shown["profile"]) == (True, "h200")
    assert shown["replicas"][0]["memory"]["token_bytes"] == 24_576
    assert shown["inventory"]["gpus"][0]["name"] == "NVIDIA H200"


def test_a_plan_can_be_planned_again(run, tmp_path):
    first = run("plan", "--json", "--inventory", str(INVENTORIES / "2xrtx.json")).stdout
    (tmp_path / "saved.json").write_text(first)
    assert run("plan", "--json", "--inventory", str(tmp_path / "saved.json")).stdout == first


@pytest.mark.parametrize("profile", ["h200", "h100", "a100", "l40s", "rtx-24gb", "rtx-16gb"])
def test_a_gpu_s_profile_without_a_gpu_does_not_fit(run, tmp_path, profile):
    (tmp_path / "none.json").write_text('{"cores": [[0], [1]], "memory_bytes": 25000000000, "gpus": [], "links": []}')
    done = run("plan", "--inventory", str(tmp_path / "none.json"), VITALIS_PROFILE=profile)
    assert done.returncode == 1
    assert "does not fit: engines.device is cuda but no GPU was found; " in done.stdout
    assert "CPU" not in done.stdout
    assert "\nfits" not in done.stdout


def test_plan_says_what_does_not_fit(run):
    done = run(
        "plan", "--inventory", str(INVENTORIES / "2xrtx.json"), VITALIS_PROFILE="h200",
        VITALIS_ENGINES_ENGINE_ARGS='{"max-model-len": "1M"}',
    )  # fmt: skip
    assert done.returncode == 1
    assert "does not fit: " in done.stdout


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[]", "not an inventory")])
def test_a_bad_inventory_file(run, tmp_path, text, words):
    (tmp_path / "i.json").write_text(text)
    done = run("plan", "--inventory", str(tmp_path / "i.json"))
    assert done.returncode == 2
    assert words in done.stderr


def test_doctor_finds_what_would_stop_a_start(run, python, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(
            "doctor", "--json", VITALIS_PROFILE="cpu-demo", VITALIS_GATEWAY_HOST="127.0.0.1",
            VITALIS_GATEWAY_PORT=port, VITALIS_CONTROL_PORT="0",
        )  # fmt: skip
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert found["gateway port"]["state"] == "failed"
    assert f"127.0.0.1:{port} cannot be used" in found["gateway port"]["detail"]
    assert found["engine environment"]["state"] == "failed"
    assert found["control port"]["state"] == "ok"
    assert found["data folder"]["state"] == "ok"
    assert "20000 carry about 9000 open streams" in found["descriptors"]["detail"]
    assert not (tmp_path / "var").exists()
    (tmp_path / "file").write_text("")
    done = run("doctor", VITALIS_PROFILE="cpu-demo", VITALIS_DATA_FOLDER=str(tmp_path / "file" / "var"))
    assert "failed   data folder" in done.stdout


def test_doctor_is_content_with_a_good_machine(run, python):
    done = run(
        "doctor",
        VITALIS_PROFILE="cpu-demo",
        VITALIS_GATEWAY_PORT="0",
        VITALIS_CONTROL_PORT="0",
        VITALIS_ENGINE_PYTHON=python,
    )
    assert done.returncode == 0, done.stdout


def test_model_commands_on_an_empty_cache(run):
    assert json.loads(run("model", "list", "--json").stdout) == []
    done = run("model", "verify", VITALIS_PROFILE="cpu-demo")
    assert done.returncode == 1
    assert "there is no such folder" in done.stdout
    done = run("model", "fetch", VITALIS_PROFILE="cpu-demo")
    assert done.returncode == 2
    assert "make one with `python3 deploy/environments.py engine`" in done.stderr
    done = run("model", "fetch", VITALIS_MODEL_FOLDER="/none", VITALIS_PROFILE="h200")
    assert done.returncode == 2
    assert "model.folder: /none: there is no such folder" in done.stderr


def test_a_model_folder_that_is_none_is_said_as_up_says_it(run, python, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, reason in ((tmp_path / "none", "there is no such folder"), (tmp_path / "empty", "config.json is mis")):
        environ = {"VITALIS_MODEL_FOLDER": str(folder), "VITALIS_PROFILE": "h200", "VITALIS_ENGINE_PYTHON": python}
        words = ("--inventory", str(INVENTORIES / "1xh200.json"))
        done = run("check-config", *words, **environ)
        assert done.returncode == 2
        assert done.stderr.splitlines()[0].endswith("it must hold a model in safetensors format"), done.stderr
        assert f"model.folder: {folder}: {reason}" in done.stderr
        done = run("plan", *words, **environ)
        assert done.returncode == 1
        assert f"does not fit: model.folder: {folder}: {reason}" in done.stdout
        assert "model fetch" not in done.stdout


def test_heads_that_cannot_be_cut_are_exit_2_for_check_too(run, python):
    """smollm2 has 9 attention heads and 3 key-value heads."""
    done = run(
        "check-config", VITALIS_ENGINE_PYTHON=python, VITALIS_PROFILE="cpu-demo", VITALIS_ENGINES_TENSOR_PARALLEL="2"
    )
    assert done.returncode == 2
    assert "engines.tensor_parallel is 2 but smollm2-135m has 9 attention heads" in done.stderr
    assert len(done.stderr.splitlines()) == 1
