"""The memory plan against numbers that vLLM itself reported and against arithmetic from the model's own shape."""

import json

import pytest
from vitalis_serve.engines.memory import GIB, MIB, architecture_of, architectures, kv_capacity, plan_memory
from vitalis_serve.errors import ConfigurationError


def test_smollm2_matches_what_vllm_reports(shapes):
    shape = shapes["smollm2-135m"]
    assert shape.token_bytes() == 23_040
    for gib, length, tokens, sequences in ((2, 8192, 93_184, 11.375), (1, 2048, 46_592, 22.75)):
        found = kv_capacity(shape, gib * GIB, block=128, max_model_len=length, tokens_in_flight=2048)
        assert found == (tokens, sequences)


def test_the_hybrid_model_matches_what_vllm_reports(shapes):
    # 32,768 blocks of one layer each; 16 of the full layer and 17 of the sliding one make a sequence of 2,048.
    tokens, _ = kv_capacity(shapes["gpt-oss-tiny"], GIB, block=128, max_model_len=2048, tokens_in_flight=2048)
    assert tokens == 2_033_601


def test_gpt_oss_20b_weights_and_tokens(shapes):
    shape = shapes["gpt-oss-20b"]
    attention = 2880 * (4096 + 1024) + 5120 + 4096 * 2880 + 2880 + 64
    expert, biases = 2880 * 5760 + 2880 * 2880, 5760 + 2880
    rest = 24 * (attention + 92_192 + 5_760) + 2 * 201_088 * 2880 + 2880
    weights = 24 * 32 * (expert * 4.25 / 8 + 2 * biases) + 2 * rest
    assert shape.weight_bytes == weights
    assert shape.weight_bytes / GIB == pytest.approx(12.8848, rel=0.01)  # vLLM's own log on an RTX 3090
    assert shape.token_bytes() == 24 * 1024
    assert shape.token_bytes(kind="sliding") * shape.sliding_window == 3 * MIB
    assert shape.token_bytes(ranks=2) == 12 * 1024


@pytest.mark.parametrize(("tokens", "mib"), [(2048, 51), (9216, 219), (32_768, 771), (131_072, 3075)])
def test_gpt_oss_20b_sequences(shapes, tokens, mib):
    assert shapes["gpt-oss-20b"].sequence_bytes(tokens) == mib * MIB


def plan(settings, machine, shape, **over):
    gpu = machine.gpus[0]
    return plan_memory(
        shape,
        device="cuda",
        total_bytes=gpu.memory_bytes,
        device_name=gpu.name,
        ranks=settings.engines.tensor_parallel,
        slots=settings.engines.slots,
        engine_args={**settings.engines.engine_args, **over},
        engine_env=settings.engines.engine_env,
    )


@pytest.mark.parametrize(
    ("profile", "name", "least", "most"),
    [("h200", "1xh200", 100, 116), ("h100", "8xh100", 52, 60), ("rtx-24gb", "2xrtx", 5, 9)],
)
def test_profiles_fit_their_gpus(configured, machine, shapes, profile, name, least, most):
    found = plan(configured(profile), machine(name), shapes["gpt-oss-20b"])
    assert found.fits
    assert least < found.kv_bytes / GIB < most
    assert found.tokens > found.max_model_len
    assert found.weight_bytes + found.working_bytes + found.kv_bytes <= found.total_bytes


def test_the_16_gb_profile_fits_16_gb(configured, shapes):
    engines = configured("rtx-16gb").engines
    found = plan_memory(
        shapes["gpt-oss-20b"], device="cuda", total_bytes=17_171_480_576, device_name="NVIDIA GeForce RTX 4080",
        slots=engines.slots, engine_args=engines.engine_args, engine_env={},
    )  # fmt: skip
    assert found.fits


def test_tensor_parallel_halves_what_each_gpu_holds(configured, machine, shapes):
    one = plan(configured("h100"), machine("8xh100"), shapes["gpt-oss-20b"])
    two = plan(configured("h100", ENGINES_TENSOR_PARALLEL="2"), machine("8xh100"), shapes["gpt-oss-20b"])
    assert two.weight_bytes == one.weight_bytes // 2
    assert two.tokens > 2 * one.tokens


def test_what_does_not_fit_is_said(configured, machine, shapes):
    long = plan(configured("rtx-24gb"), machine("2xrtx"), shapes["gpt-oss-20b"], **{"max-model-len": "1M"})
    assert not long.fits
    assert "max-model-len 1048576 does not fit" in long.problem
    small = plan(configured("rtx-24gb"), machine("2xrtx"), shapes["gpt-oss-20b"], **{"gpu-memory-utilization": 0.3})
    assert "leave no room for KV cache" in small.problem


def test_cpu_memory_counts_all_replicas(configured, shapes):
    engines = configured("cpu-demo").engines
    given = {"engine_args": engines.engine_args, "engine_env": engines.engine_env, "device": "cpu"}
    one = plan_memory(shapes["smollm2-135m"], total_bytes=8 * GIB, **given)
    assert one.fits
    assert (one.tokens, one.kv_bytes) == (45_056 + 1_536, GIB)
    three = plan_memory(shapes["smollm2-135m"], total_bytes=8 * GIB, replicas=3, **given)
    assert "lower engines.replicas or VLLM_CPU_KVCACHE_SPACE" in three.problem


def test_a_folder_describes_its_model(tmp_path, shapes):
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 24, "sliding_window": 128, "hidden_size": 2880, "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64, "vocab_size": 201088,
        "num_key_value_heads": 8, "num_experts_per_tok": 4, "intermediate_size": 2880,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, known = architecture_of(tmp_path), shapes["gpt-oss-20b"]
    assert found.token_bytes() == known.token_bytes()
    assert found.sequence_bytes(9216) == known.sequence_bytes(9216)
    assert (found.family, found.weight_bytes) == ("gpt_oss", 0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_hidden_layers": "many"}', "\x00"])
def test_a_bad_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match="does not describe a model"):
        architecture_of(tmp_path)
    (tmp_path / "params.json").write_text(text or "[]")
    if text != "{}":
        with pytest.raises(ConfigurationError, match="not a table of architectures"):
            architectures(tmp_path / "params.json")
