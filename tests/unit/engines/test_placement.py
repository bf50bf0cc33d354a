"""Which GPUs and cores replicas get, on recorded machines."""

import contextlib
from dataclasses import replace

import pytest
from vitalis_serve.engines.gpus import Inventory, _cores, _visible
from vitalis_serve.engines.placement import check_heads, device_of, place
from vitalis_serve.errors import ConfigurationError


def indices(placements):
    return [tuple(gpu.index for gpu in placement.gpus) for placement in placements]


def test_inventories_survive_json(machine):
    for name in ("1xh200", "8xh100", "2xrtx"):
        assert Inventory.from_json(machine(name).to_json()) == machine(name)


@pytest.mark.parametrize("document", [{}, {"gpus": 1}, {"gpus": [{}], "links": [], "cores": [], "memory_bytes": 1}, []])
def test_a_bad_inventory_is_refused(document):
    with pytest.raises(ConfigurationError, match="not an inventory"):
        Inventory.from_json(document)


def test_one_gpu_one_replica(configured, machine):
    (placement,) = place(configured("h200"), machine("1xh200"))
    assert (placement.device, placement.threads) == ("cuda", "")
    assert indices([placement]) == [(0,)]


def test_replicas_take_gpus_in_order(configured, machine):
    settings = configured("h100", ENGINES_REPLICAS="3", ENGINES_TENSOR_PARALLEL="2")
    assert indices(place(settings, machine("8xh100"))) == [(0, 1), (2, 3), (4, 5)]


def test_best_links_come_first(configured, machine):
    settings = configured("a100", ENGINES_REPLICAS="2", ENGINES_TENSOR_PARALLEL="2")
    assert indices(place(settings, machine("4xa100-pairs"))) == [(0, 2), (1, 3)]


def test_named_gpus_only(configured, machine):
    settings = configured("h100", ENGINES_REPLICAS="2", ENGINES_GPUS="7,3")
    assert indices(place(settings, machine("8xh100"))) == [(7,), (3,)]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"TENSOR_PARALLEL": "3"}, "tensor_parallel is 3 but 8 GPUs cannot be cut into groups of 3; use 1, 2, 4, 8"),
        ({"TENSOR_PARALLEL": "16"}, "tensor_parallel is 16 but 8 GPUs cannot be cut into groups of 16"),
        ({"REPLICAS": "9"}, "engines.replicas is 9 but 8 GPUs make only 8 groups of 1"),
        ({"REPLICAS": "3", "TENSOR_PARALLEL": "4"}, "engines.replicas is 3 but 8 GPUs make only 2 groups of 4"),
        ({"GPUS": "0,9"}, "engines.gpus names GPU 9, but there are only 0, 1, 2"),
        ({"GPUS": "1,1"}, "engines.gpus names GPU 1 more than once"),
        ({"GPUS": "[]"}, "engines.gpus.0 is '[]'"),
    ],
)
def test_what_does_not_fit_is_said(configured, machine, environ, words):
    with pytest.raises(ConfigurationError) as caught:
        place(configured("h100", **{f"ENGINES_{k}": v for k, v in environ.items()}), machine("8xh100"))
    assert words in str(caught.value)


def test_heads_must_divide(configured, machine, shapes):
    gpus = "0,1,2,3,4,5"
    settings = configured("h100", ENGINES_TENSOR_PARALLEL="3", ENGINES_GPUS=gpus)
    with pytest.raises(ConfigurationError, match="gpt-oss-20b has 64 attention heads and 8 key-value heads"):
        place(settings, machine("8xh100"), shapes["gpt-oss-20b"])
    assert len(place(settings, machine("8xh100"), shapes["smollm2-135m"])) == 1


@pytest.mark.parametrize(("model", "right"), [("gpt-oss-20b", {1, 2, 4, 8, 16, 32, 64}), ("smollm2-135m", {1, 3, 9})])
def test_heads_are_cut_as_vllm_cuts_them(configured, shapes, model, right):
    """Attention heads evenly; key-value heads evenly, or each copied to several ranks."""
    allowed = set()
    for width in range(1, 65):
        with contextlib.suppress(ConfigurationError):
            check_heads(configured("h100", ENGINES_TENSOR_PARALLEL=str(width)), shapes[model])
            allowed.add(width)
    assert allowed == right


def test_the_model_is_named_as_configured(configured, shapes):
    """Not as its folder in the cache, which is where an architecture read from files has its name from."""
    cached = replace(shapes["smollm2-135m"], name="smollm2-135m-53fddd6a78cc3ef5")
    with pytest.raises(ConfigurationError, match="is 2 but smollm2-135m has 9 attention heads and 3 key-value heads"):
        check_heads(configured("cpu-demo", ENGINES_TENSOR_PARALLEL="2"), cached)
    with pytest.raises(ConfigurationError, match="is 2 but /weights/mine has 9 attention heads"):
        check_heads(configured("h100", ENGINES_TENSOR_PARALLEL="2", MODEL_FOLDER="/weights/mine"), cached)


def test_no_gpu_where_one_is_asked_for(configured, machine):
    with pytest.raises(ConfigurationError, match="no GPU was found"):
        place(configured("h100", ENGINES_DEVICE="cuda"), Inventory())
    with pytest.raises(ConfigurationError, match="no GPU was found"):
        place(configured("h100"), Inventory())
    assert device_of(configured("h100", ENGINES_DEVICE="auto"), Inventory()) == "cpu"
    assert device_of(configured("h100", ENGINES_DEVICE="auto"), machine("1xh200")) == "cuda"


@pytest.mark.parametrize(
    ("cores", "replicas", "width", "threads"),
    [
        (2, 1, 1, [""]),
        (2, 1, 2, ["0|1"]),
        (2, 2, 1, ["0", "1"]),
        (2, 2, 2, ["0|1", "0|1"]),
        (8, 2, 1, ["0-2", "4-6"]),
        (6, 2, 1, ["0-2", "3-5"]),
        (16, 1, 2, ["0-6|8-14"]),
        (1, 1, 2, ["0|0"]),
        (2, 0, 2, []),
    ],
)
def test_cpu_cores_are_cut_evenly(configured, cores, replicas, width, threads):
    inventory = Inventory(cores=tuple((i,) for i in range(cores)))
    settings = configured("cpu-tiny", ENGINES_REPLICAS=str(replicas), ENGINES_TENSOR_PARALLEL=str(width))
    assert [p.threads for p in place(settings, inventory)] == threads


def test_threads_of_one_core_are_used_only_when_cores_run_out(configured):
    settings = configured("cpu-tiny", ENGINES_TENSOR_PARALLEL="2")
    two_cores = Inventory(cores=((0, 2), (1, 3)))
    assert place(settings, two_cores)[0].threads == "0|1"
    assert place(settings, replace(two_cores, cores=((0, 1),)))[0].threads == "0|1"


def test_cores_are_read_from_the_system(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert _cores([0, 1, 2, 3], tmp_path) == ((0, 2), (1, 3))
    assert _cores([1, 2, 9], tmp_path) == ((1,), (2,), (9,))


def test_hidden_gpus_are_left_out(machine):
    gpus = machine("8xh100").gpus
    assert len(_visible(gpus, None)) == 8
    assert [gpu.index for gpu in _visible(gpus, "1, 3")] == [1, 3]
    assert [gpu.index for gpu in _visible(gpus, "GPU-00000002")] == [2]
    assert _visible(gpus, "") == ()
