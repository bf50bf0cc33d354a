"""An engine's command line and environment."""

from pathlib import Path

import pytest
from vitalis_serve.engines.command import engine_command, flags, stop_seconds
from vitalis_serve.engines.gpus import Inventory
from vitalis_serve.engines.placement import Placement, place

SOCKET = Path("/run/engine-0.sock")
CPU = Placement(0, "cpu")


def command(settings, placement=CPU, folder=Path("/weights"), environ=None, **over):
    environ = {"HOME": "/nowhere"} if environ is None else environ
    return engine_command(settings, 0, placement, folder, SOCKET, python="/env/bin/python", environ=environ, **over)


def value(argv, flag):
    return argv[argv.index(flag) + 1]


def test_it_runs_vllm_on_a_socket_under_the_models_name(configured):
    made = command(configured("cpu-demo"))
    assert made.argv[:3] == ("/env/bin/python", "-m", "vllm.entrypoints.openai.api_server")
    assert value(made.argv, "--model") == "/weights"
    assert value(made.argv, "--served-model-name") == "smollm2-135m"
    assert value(made.argv, "--uds") == str(SOCKET)
    assert made.address == f"unix:{SOCKET}"
    assert not {"--host", "--port"} & set(made.argv)


def test_defaults_that_the_gateway_relies_on(configured):
    argv = command(configured("h200")).argv
    assert value(argv, "--scheduling-policy") == "priority"
    assert value(argv, "--max-num-seqs") == "512"
    assert int(value(argv, "--max-num-queued-reqs")) > 512
    assert {"--enable-prompt-tokens-details", "--disable-uvicorn-access-log"} <= set(argv)
    assert value(argv, "--shutdown-timeout") == "40"


@pytest.mark.parametrize(("profile", "gpt_oss"), [("h200", True), ("cpu-tiny", True), ("cpu-demo", False)])
def test_gpt_oss_gets_its_parsers(configured, profile, gpt_oss):
    argv = command(configured(profile)).argv
    assert ("--reasoning-parser" in argv, "--enable-auto-tool-choice" in argv) == (gpt_oss, gpt_oss)
    if gpt_oss:
        assert (value(argv, "--reasoning-parser"), value(argv, "--tool-call-parser")) == ("openai_gptoss", "openai")


def test_a_folders_family_is_told_by_its_config(configured):
    settings = configured("h200", MODEL_FOLDER="/weights/mine")
    assert "--reasoning-parser" not in command(settings, folder=Path("/weights/mine")).argv
    assert "--reasoning-parser" in command(settings, folder=Path("/weights/mine"), family="gpt_oss").argv


def test_cpu_is_always_eager_even_where_the_profile_forgot(configured):
    assert "--enforce-eager" in command(configured("h200")).argv
    cuda = command(configured("h200"), Placement(0, "cuda"))
    assert "--enforce-eager" not in cuda.argv


def test_engine_args_override_and_null_removes(configured):
    settings = configured(
        "h200",
        ENGINES_ENGINE_ARGS='{"scheduling-policy": null, "max-num-seqs": 700, "enable-prompt-tokens-details": false}',
    )
    argv = command(settings).argv
    assert "--scheduling-policy" not in argv
    assert argv.count("--max-num-seqs") == 1
    assert value(argv, "--max-num-seqs") == "700"
    assert int(value(argv, "--max-num-queued-reqs")) > 700
    assert "--no-enable-prompt-tokens-details" in argv


def test_flags_follow_vllms_own_way_with_yaml():
    assert flags(
        {"a": True, "b": False, "c": None, "d": 1, "e": 0.5, "f": "x y", "g": ("a", 2), "h": {"k": [1]}, "i": -1}
    ) == ["--a", "--no-b", "--d", "1", "--e", "0.5", "--f", "x y", "--g", "a", "2", "--h", '{"k": [1]}', "--i=-1"]


def test_environment_is_whole_and_hides_ours(configured):
    environ = {
        "PATH": "/bin", "HOME": "/nowhere", "LD_PRELOAD": "/x.so", "VITALIS_DATA_FD": "5", "VLLM_PORT": "tcp://1.2.3.4:5",
        "PYTHONPATH": "/server", "PYTHONHOME": "/usr", "HF_TOKEN": "hf_secret", "CUDA_VISIBLE_DEVICES": "7",
    }  # fmt: skip
    env = command(configured("cpu-tiny"), environ=environ).env
    assert env["PATH"] == "/bin"
    assert env["LD_PRELOAD"] == "/x.so"
    gone = {"VITALIS_DATA_FD", "VLLM_PORT", "PYTHONPATH", "PYTHONHOME", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"}
    assert not gone & set(env)
    assert (env["HF_HUB_OFFLINE"], env["VLLM_NO_USAGE_STATS"], env["PYTHONSAFEPATH"]) == ("1", "1", "1")
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert int(env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 75


def test_sockets_between_vllms_processes_are_beside_its_own(configured):
    settings = configured("cpu-tiny")
    made = command(settings)
    assert made.sockets == Path("/run/engine-0.ipc")
    assert made.env["VLLM_RPC_BASE_PATH"] == "/run/engine-0.ipc"
    # a path with a UUID behind it has to fit into 107 bytes
    for length, fits in ((56, True), (57, False)):
        folder = Path("/" + "x" * (length - 1))
        socket = folder / "engine-00.sock"
        long = engine_command(settings, 0, CPU, Path("/w"), socket, python="/p", environ={"HOME": "/"})
        assert ("VLLM_RPC_BASE_PATH" in long.env) is fits, length
        assert (long.sockets is not None) is fits
    own = configured("cpu-tiny", ENGINES_ENGINE_ENV='{"VLLM_RPC_BASE_PATH": "/elsewhere"}')
    assert command(own).sockets is None


def test_engine_env_overrides_and_null_removes(configured):
    settings = configured("h200", ENGINES_ENGINE_ENV='{"HF_HUB_OFFLINE": null, "NCCL_DEBUG": "INFO", "PATH": "/x"}')
    env = command(settings, environ={"PATH": "/bin", "HOME": "/"}).env
    assert "HF_HUB_OFFLINE" not in env
    assert (env["NCCL_DEBUG"], env["PATH"]) == ("INFO", "/x")


def test_gpus_of_each_replica(configured, machine):
    settings = configured("h100", ENGINES_REPLICAS="2", ENGINES_TENSOR_PARALLEL="2")
    placements = place(settings, machine("8xh100"))
    made = [command(settings, placement) for placement in placements]
    assert [m.env["CUDA_VISIBLE_DEVICES"] for m in made] == ["0,1", "2,3"]
    assert {m.env["CUDA_DEVICE_ORDER"] for m in made} == {"PCI_BUS_ID"}
    assert {value(m.argv, "--tensor-parallel-size") for m in made} == {"2"}


def test_cores_of_each_rank(configured):
    settings = configured("cpu-tiny", ENGINES_TENSOR_PARALLEL="2")
    (placement,) = place(settings, Inventory(cores=((0,), (1,))))
    assert command(settings, placement).env["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in command(settings).env


def test_harmonys_vocabulary_beside_the_model_or_in_the_cache(configured, tmp_path):
    settings = configured("cpu-tiny")
    environ = {"VITALIS_CACHE": str(tmp_path / "cache")}
    model = tmp_path / "model"
    for folder in (tmp_path / "cache" / "tiktoken", model / "tiktoken"):
        folder.mkdir(parents=True)
        assert "TIKTOKEN_ENCODINGS_BASE" not in command(settings, folder=tmp_path / "other").env
        (folder / "o200k_base.tiktoken").write_text("")
        env = command(settings, folder=model, environ=environ).env
        assert env["TIKTOKEN_ENCODINGS_BASE"] == str(folder)


def test_stop_seconds_is_never_zero(configured):
    assert stop_seconds(configured("h200", SHUTDOWN_DRAIN_SECONDS="0")) == 10
    assert stop_seconds(configured("h200", SHUTDOWN_DRAIN_SECONDS="2.5")) == 13
