"""deploy/environments.py with small stand-ins for the packages, so that nothing is downloaded: made whole or not at
all, found again, one build at a time, and a sentence for everything that goes wrong."""

import ast
import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("uvicorn", "httptools", "msgspec", "fastapi", "sqlalchemy")
# Debian's Python has ensurepip in a package of its own; without it half an environment is made.
DEBIAN = """#!/bin/sh
if [ "$1 $2" = "-m venv" ] && [ "$3" != "--without-pip" ]; then
    'PYTHON' -m venv --without-pip "$3"; echo "ensurepip is not available"; exit 1
fi
exec 'PYTHON' "$@"
"""
RUN_BY = "import runpy, sys; sys.executable = sys.argv[1]; del sys.argv[:2]; "
RUN_BY += "runpy.run_path(sys.argv[0], run_name='__main__')"


class Checkout:
    """A copy of deploy/environments.py with a lock of its own and the only packages that pip can find."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.cache = folder / "cache"
        self.wheels.mkdir()
        (folder / "deploy/locks").mkdir(parents=True)
        shutil.copy(ROOT / "deploy/environments.py", folder / "deploy")
        self.debian = folder / "python-without-ensurepip"
        self.debian.write_text(DEBIAN.replace("PYTHON", sys.executable))
        self.debian.chmod(0o755)
        self.lock("gateway", *MODULES)

    def lock(self, role: str, *names: str) -> None:
        lines = [f"{name}==1.0 \\\n    --hash=sha256:{self.wheel(name)}\n" for name in names]
        (self.folder / f"deploy/locks/{role}.txt").write_text("".join(lines))

    def wheel(self, name: str) -> str:
        path = self.wheels / f"{name}-1.0-py3-none-any.whl"
        files = {
            f"{name}.py": "",
            f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
            f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = [f"{file},sha256={digest(text)},{len(text)}\n" for file, text in files.items()]
        with zipfile.ZipFile(path, "w") as archive:
            for file, text in files.items():
                archive.writestr(file, text)
            archive.writestr(f"{name}-1.0.dist-info/RECORD", "".join(record) + f"{name}-1.0.dist-info/RECORD,,\n")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def start(self, *arguments: str, ensurepip: bool = False, **variables: str) -> subprocess.Popen[str]:
        """By a Python that can put pip into an environment, or by one that cannot: that is seconds faster."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "VITALIS_"))}
        environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        environ |= {"VITALIS_CACHE": str(self.cache)} | variables
        by = [sys.executable] if ensurepip else [sys.executable, "-c", RUN_BY, str(self.debian)]
        return subprocess.Popen(
            [*by, str(self.folder / "deploy/environments.py"), *arguments],
            env=environ, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def make(self, *arguments: str, ensurepip: bool = False, **variables: str) -> tuple[int, str, str]:
        with self.start(*arguments, ensurepip=ensurepip, **variables) as child:
            out, err = child.communicate(timeout=100)
        return child.returncode, out, err

    def made(self) -> list[Path]:
        return [path for path in (self.cache / "env").glob("[a-z]*") if path.suffix != ".lock"]


def digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_is_made_once_and_found_again(checkout: Checkout) -> None:
    code, out, err = checkout.make("gateway", "--commands", str(checkout.folder / ".venv"), ensurepip=True)
    assert code == 0, err
    python = Path(out.removesuffix("\n"))
    assert python.parent.parent in checkout.made()
    assert (python.parent / "pip").exists()
    subprocess.run([str(python), "-c", "import uvicorn, msgspec"], check=True)
    for given, behind in ((None, ""), ("/a b:/c", ":/a b:/c")):
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        shown = subprocess.run(
            [str(checkout.folder / ".venv/bin/python"), "-c", "import os; print(os.environ['PYTHONPATH'])"],
            env=environ | ({} if given is None else {"PYTHONPATH": given}), capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        ours = f"{checkout.folder / 'server'}:{checkout.folder / 'loadtests'}"
        assert shown.strip() == ours + behind, "this checkout's packages come first"

    stamp = python.parent.stat().st_ctime_ns
    assert checkout.make("gateway") == (0, out, ""), "the second run is silent"
    assert python.parent.stat().st_ctime_ns == stamp

    checkout.lock("gateway", *MODULES, "another")
    code, other, err = checkout.make("gateway")
    assert code == 0, err
    assert other != out, "another lock is another environment"
    assert not (Path(other.strip()).parent / "pip").exists(), "made with the pip of the Python that made it"
    subprocess.run([other.strip(), "-c", "import uvicorn, another"], check=True)


def test_a_build_that_was_killed_is_never_used(checkout: Checkout) -> None:
    child = checkout.start("gateway", ensurepip=True)
    while not list((checkout.cache / "env").glob(".gateway-*/bin")):
        assert child.poll() is None
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert checkout.made() == []
    code, out, err = checkout.make("gateway")
    assert code == 0, err
    subprocess.run([out.strip(), "-c", "import uvicorn"], check=True)


def test_two_at_once_make_one(checkout: Checkout) -> None:
    with checkout.start("gateway") as first, checkout.start("gateway") as second:
        (one, said), (two, heard) = first.communicate(timeout=100), second.communicate(timeout=100)
    assert (first.returncode, second.returncode) == (0, 0)
    assert one == two
    assert sorted(["waiting for it" in said, "waiting for it" in heard]) == [False, True]


def test_pip_that_fails_is_told_with_its_last_lines(checkout: Checkout) -> None:
    (checkout.folder / "deploy/locks/gateway.txt").write_text(f"nowhere==1.0 --hash=sha256:{'0' * 64}\n")
    code, out, err = checkout.make("gateway")
    assert (code, out) == (1, "")
    assert "gateway: pip failed with exit code 1. Its last lines:" in err
    assert "No matching distribution found for nowhere==1.0" in err
    assert "Traceback" not in err
    assert checkout.made() == []


def test_a_package_that_is_not_what_was_locked_is_refused(checkout: Checkout) -> None:
    with (checkout.wheels / "msgspec-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"\0")
    code, _, err = checkout.make("gateway")
    assert code == 1
    assert "HASHES" in err
    assert checkout.made() == []


def test_packages_that_do_not_load_are_told(checkout: Checkout) -> None:
    checkout.lock("gateway", *MODULES[1:])
    code, _, err = checkout.make("gateway")
    assert code == 1
    assert "do not load on this machine: ModuleNotFoundError: No module named 'uvicorn'" in err
    assert checkout.made() == []


def test_torch_is_looked_for_at_its_own_index_last(checkout: Checkout) -> None:
    lock = f"torch==2.13.0+cpu \\\n    --hash=sha256:{'0' * 64}\n"
    (checkout.folder / "deploy/locks/engine-cpu.txt").write_text(lock)
    code, _, err = checkout.make("engine-cpu")
    assert code == 1
    assert "pip as configured does not know torch's CPU build; trying https://download.pytorch.org/whl/cpu" in err


def test_a_library_that_is_missing_is_told_before_anything_is_fetched(checkout: Checkout) -> None:
    script = checkout.folder / "deploy/environments.py"
    script.write_text(script.read_text().replace("libnuma.so.1", "libnowhere.so.1"))
    checkout.lock("engine-cpu", "torch")
    code, out, err = checkout.make("engine-cpu")
    assert (code, out) == (1, "")
    assert "needs the library libnowhere.so.1" in err
    assert "apt-get install libnuma1" in err
    assert len(err.splitlines()) == 1
    assert not checkout.cache.exists()


def test_cache_that_cannot_be_written(checkout: Checkout) -> None:
    code, _, err = checkout.make("gateway", VITALIS_CACHE="/proc/nowhere")
    assert code == 1
    assert "cannot write the cache folder /proc/nowhere/env" in err
    assert "set VITALIS_CACHE" in err
    assert len(err.splitlines()) == 1


def test_unknown_role_is_bad_usage(checkout: Checkout) -> None:
    code, _, err = checkout.make("gatway")
    assert code == 2
    assert "gateway" in err


def test_commands_do_not_overwrite_an_environment_of_ones_own(checkout: Checkout) -> None:
    own = checkout.folder / ".venv"
    own.mkdir()
    (own / "pyvenv.cfg").touch()
    code, _, err = checkout.make("gateway", "--commands", str(own))
    assert code == 1
    assert "is a virtual environment of your own" in err


def test_an_older_python_gets_the_sentence_not_a_syntax_error() -> None:
    """3.8 is the oldest that the script must be readable for; the check of the version comes before anything new."""
    source = (ROOT / "deploy/environments.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    before: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.If):
            break
        before += [ast.unparse(node)] if isinstance(node, ast.Import | ast.ImportFrom) else []
    assert "needs Python 3.11 or newer" in ast.unparse(node)
    assert not any("tomllib" in line or "StrEnum" in line for line in before)
