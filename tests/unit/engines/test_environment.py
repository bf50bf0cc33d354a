"""Which python engines run with."""

import os
import stat
from pathlib import Path

import pytest
from vitalis_serve.engines.environment import cache_folder, engine_python
from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings.schema import Engines


def environment(cache: Path, name: str, age: int) -> Path:
    python = cache / "env" / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    os.utime(python.parent.parent, (1_000_000 - age, 1_000_000 - age))
    return python


def test_cache_folder_follows_the_usual_places():
    assert cache_folder({"VITALIS_CACHE": "/c"}) == Path("/c")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/vitalis-serve")
    assert cache_folder({"HOME": "/h"}) == Path("/h/.cache/vitalis-serve")


def test_auto_is_the_newest_of_the_right_kind(tmp_path):
    environ = {"VITALIS_CACHE": str(tmp_path)}
    environment(tmp_path, "engine-cpu-1", 20)
    newest = environment(tmp_path, "engine-cpu-2", 10)
    environment(tmp_path, "gateway-3", 0)
    assert engine_python(Engines(device="cpu"), environ) == newest
    assert engine_python(Engines(), environ) == newest
    cuda = environment(tmp_path, "engine-cuda-1", 30)
    assert engine_python(Engines(), environ) == cuda
    assert engine_python(Engines(device="cpu"), environ) == newest


def test_what_is_named_wins_and_must_run(tmp_path):
    python = environment(tmp_path, "engine-cpu-1", 0)
    environ = {"VITALIS_CACHE": "/nowhere", "VITALIS_ENGINE_PYTHON": str(python)}
    assert engine_python(Engines(), environ) == python
    with pytest.raises(ConfigurationError, match=r"engines\.engine_python: /none is not a program"):
        engine_python(Engines(engine_python="/none"), environ)
    with pytest.raises(ConfigurationError, match="VITALIS_ENGINE_PYTHON: "):
        engine_python(Engines(), {"VITALIS_ENGINE_PYTHON": str(tmp_path)})


def test_none_at_all_names_the_command(tmp_path):
    with pytest.raises(ConfigurationError, match=r"make one with `python3 deploy/environments\.py engine`"):
        engine_python(Engines(), {"VITALIS_CACHE": str(tmp_path)})
