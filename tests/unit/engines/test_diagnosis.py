"""Causes and remedies told from lines that vLLM and its libraries print."""

import pytest
from vitalis_serve.engines.diagnosis import remedy

LINES = [
    ("api_server.py: error: unrecognized arguments: --max-num-seq 5 --other", "--max-num-seq: correct or remove"),
    ("api_server.py: error: argument --dtype: invalid choice: 'bf17'", "refuses the value of --dtype (invalid choice"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "the GPU ran out of memory"),
    (
        "ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) is less than desired GPU memory utilization",
        "another process holds memory",
    ),
    (
        "ValueError: To serve one request (3.0 GiB KV cache is needed, which is larger than the available",
        "no room for one sequence",
    ),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "driver is too old"),
    ("RuntimeError: No CUDA GPUs are available", "sees no GPU"),
    ("OSError: [Errno 28] No space left on device: '/data/log'", "a disk is full"),
    ("openai_harmony.HarmonyError: error downloading or loading vocab file: failed", "Harmony's vocabulary is missing"),
    ("OSError: [Errno 98] Address already in use", "socket is in use"),
    ("OSError: AF_UNIX path too long", "shorter path"),
    ("PermissionError: [Errno 13] Permission denied: '/data/run/engine-0.sock'", "no permission for /data/run"),
    ("ModuleNotFoundError: No module named 'vllm'", "lacks the Python module vllm"),
    ("/env/bin/python: No module named vllm.entrypoints", "lacks the Python module vllm.entrypoints"),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/m/model-00001.safetensors'", "(/m/model-00001"),
    ("RuntimeError: Cannot find any model weights with `/m`", "a file of the model is missing: run"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", "damaged"),
    ("torch.distributed.DistBackendError: NCCL error in: x.cpp:1", "NCCL"),
    ("OSError: [Errno 12] Cannot allocate memory", "main memory ran out"),
    ("OSError: [Errno 24] Too many open files", "ulimit -n"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), LINES)
def test_known_causes(line, words):
    found = remedy(["INFO starting", line, "INFO stopping", ""])
    assert found is not None
    assert words in found
    assert "\n" not in found


def test_unknown_lines_have_no_remedy():
    assert remedy([]) is None
    assert remedy(["INFO 11-22 all is well", "Traceback (most recent call last):", "KeyError: 'x'"]) is None
