#!/usr/bin/env python3
"""Makes or finds the virtual environment of one role and prints its Python's path.

    python3 deploy/environments.py ROLE [--commands .venv]

ROLE: gateway, dev, load, engine-cpu, engine-cuda, or engine (one of the last two, by the hardware). With --commands it
also writes .venv/bin/vitalis-serve, python and the like, for this checkout.

Environments live in the cache folder ($VITALIS_CACHE, else $XDG_CACHE_HOME/vitalis-serve, else ~/.cache/vitalis-serve)
under `env/<role>-<hash of lock file, Python and this layout>`, shared by all checkouts; the package itself is not in
them, so a checkout is put in by the small wrappers of `--commands`. The name appears, as a symbolic link, only when the
environment is whole: a build that was killed is never used. Standard library only: this runs before anything is there.
"""

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - people run this with whatever python3 they have
    sys.exit(
        f"deploy/environments.py needs Python 3.11 or newer, and {sys.executable} is "
        f"{sys.version_info[0]}.{sys.version_info[1]}: run it with a newer one (make PYTHON=python3.11 ...)"
    )

import fcntl  # after the check: an older Python must get the sentence, whatever it lacks

LAYOUT = "1"  # part of the hash: raise it when what this script makes changes
REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = REPOSITORY / "deploy" / "locks"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROGRESS_SECONDS = 10
LOCK_WAIT_SECONDS = 2

# role -> (modules that must import afterwards, GiB that the environment and its build take)
ROLES = {
    "gateway": (("uvicorn", "httptools", "msgspec", "fastapi", "sqlalchemy"), 0.5),
    "dev": (("uvicorn", "pytest", "openai", "anthropic"), 1.0),
    "load": (("gevent", "locust", "hdrh", "httptools", "msgspec"), 0.3),
    "engine-cpu": (("torch", "transformers", "vllm"), 5.0),
    "engine-cuda": (("torch", "transformers", "vllm"), 20.0),
}
# role -> shared libraries that its packages load and no wheel brings, with the Debian package of each
LIBRARIES = {"engine-cpu": {"libnuma.so.1": "libnuma1"}}
ENGINE_PYTHONS = ("3.11", "3.12", "3.13")
COMMANDS = {"pytest": "pytest", "ruff": "ruff", "mypy": "mypy", "pre-commit": "pre_commit", "locust": "locust"}


class EnvironmentFailure(Exception):
    """One sentence for the person at the terminal."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    if given := os.environ.get("VITALIS_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vitalis-serve"


def has_nvidia_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def runs(python: str) -> bool:
    """Whether this command is a Python that can make environments (a pyenv shim, say, may be there and not run)."""
    try:
        ran = subprocess.run([python, "-c", "import venv"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0


def base_python(role: str) -> str:
    """The interpreter that the environment is made with."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not role.startswith("engine"):
        return sys.executable
    wanted = sorted(ENGINE_PYTHONS, key=lambda version: (version != "3.11", version != own))
    if role == "engine-cuda" and own in ENGINE_PYTHONS:
        return sys.executable
    for version in wanted:
        candidate = sys.executable if version == own else shutil.which(f"python{version}")
        if candidate and runs(candidate):
            if role == "engine-cpu" and version != "3.11":
                say(f"{role}: no Python 3.11 found; using {version}, which the lock is for but our tests do not run")
            return candidate
    raise EnvironmentFailure(
        f"{role}: vLLM and PyTorch are locked for Python {', '.join(ENGINE_PYTHONS)}, and none of them is on PATH "
        f"(this is {own}): install one, for example python3.11 and its venv module"
    )


def environment_name(role: str, python: str) -> str:
    lock = lock_file(role)
    facts = subprocess.run(
        [python, "-c", "import sys,platform; print(sys.implementation.cache_tag, platform.machine())"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.strip()  # fmt: skip
    digest = hashlib.sha256(lock.read_bytes() + b"\0" + f"{facts} {LAYOUT}".encode()).hexdigest()
    return f"{role}-{digest[:16]}"


def lock_file(role: str) -> Path:
    path = LOCKS / f"{role}.txt"
    if not path.is_file():
        raise EnvironmentFailure(f"{role}: the lock file {path} is missing: is this checkout whole?")
    return path


def find_or_make(role: str) -> Path:
    """The Python of the role's environment. Raises EnvironmentFailure."""
    if role.startswith("engine") and (given := os.environ.get("VITALIS_ENGINE_PYTHON")):
        return Path(given)
    if role == "engine":
        role = "engine-cuda" if has_nvidia_gpu() else "engine-cpu"
    check_libraries(role)
    base = base_python(role)
    folder = cache_folder() / "env"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = environment_name(role, base)
        path = folder / name
        if usable(path):
            return path / "bin" / "python"
        with (folder / f"{name}.lock").open("w") as lock:
            wait_for(lock, role)
            if not usable(path):
                make(role, base, path)
    except OSError as error:
        raise EnvironmentFailure(
            f"{role}: cannot write the cache folder {folder} ({error.strerror}): "
            "set VITALIS_CACHE to a folder that can be written and has room"
        ) from None
    return path / "bin" / "python"


def check_libraries(role: str) -> None:
    """Before gigabytes are fetched: vLLM imports without them and fails when an engine starts."""
    for library, package in LIBRARIES.get(role, {}).items():
        try:
            ctypes.CDLL(library)
        except OSError:
            raise EnvironmentFailure(
                f"{role}: vLLM needs the library {library}, which this machine lacks: install it (on Debian and "
                f"Ubuntu: apt-get install {package})"
            ) from None


def usable(path: Path) -> bool:
    """Made whole, and the interpreter it was made with is still there."""
    return path.is_symlink() and runs(str(path / "bin" / "python"))


def wait_for(lock, role: str) -> None:
    told = 0.0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - told > PROGRESS_SECONDS:
                say(f"{role}: another process is making this environment; waiting for it")
                told = time.monotonic()
            time.sleep(LOCK_WAIT_SECONDS)


def make(role: str, base: str, path: Path) -> None:
    modules, gib = ROLES[role]
    free = shutil.disk_usage(path.parent).free / 2**30
    if free < gib:
        raise EnvironmentFailure(
            f"{role}: the disk of {path.parent} is full: {free:.1f} GiB free, about {gib:g} needed; "
            "make room, or set VITALIS_CACHE to a folder on a larger disk"
        )
    began = time.monotonic()
    say(f"{role}: making its environment in {path} (once; about {gib:g} GiB)")
    built = path.parent / f".{path.name}"
    shutil.rmtree(built, ignore_errors=True)
    install = make_empty(role, base, built)
    # torch first: it is the one package whose CPU build an ordinary index does not have.
    torch, rest = split_lock(lock_file(role).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for part, text in (("torch", torch), ("rest", rest)):
            if not text:
                continue
            requirements = Path(scratch) / f"{part}.txt"
            requirements.write_text(text)
            install_part(role, [*install, "-r", str(requirements)], with_torch_index=part == "torch" and "+cpu" in text)
    check_imports(role, built / "bin" / "python", modules)
    link = path.parent / f".{path.name}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(built.name)
    link.replace(path)
    say(f"{role}: ready after {time.monotonic() - began:.0f} s")


def make_empty(role: str, base: str, built: Path) -> list[str]:
    """An environment with nothing in it, and the command that installs into it."""
    options = [
        "install",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
        "--no-input",
        "--only-binary=:all:",
    ]
    made = subprocess.run([base, "-m", "venv", str(built)], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return [str(built / "bin" / "python"), "-m", "pip", *options]
    # Debian keeps ensurepip in a package of its own; pip may be there all the same.
    shutil.rmtree(built, ignore_errors=True)
    bare = subprocess.run(
        [base, "-m", "venv", "--without-pip", str(built)], capture_output=True, text=True, check=False
    )
    has_pip = subprocess.run([base, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    if bare.returncode == 0 and has_pip:
        return [base, "-m", "pip", "--python", str(built / "bin" / "python"), *options]
    shutil.rmtree(built, ignore_errors=True)
    said = (made.stdout + made.stderr).strip()
    if "No space left" in said:
        raise EnvironmentFailure(f"{role}: the disk of {built.parent} is full; make room, or set VITALIS_CACHE")
    raise EnvironmentFailure(
        f"{role}: {base} cannot make virtual environments: install its venv module (on Debian and Ubuntu: "
        f"apt-get install python3-venv). It said: {said.splitlines()[-1] if said else 'nothing'}"
    )


def split_lock(text: str) -> tuple[str, str]:
    """torch's own entry, and everything else. An entry runs up to the next line that starts at column 0."""
    torch, rest, current = [], [], None
    for line in text.splitlines(keepends=True):
        if not line.startswith((" ", "\t", "#")):
            current = torch if line.startswith("torch==") else rest
        (rest if current is None else current).append(line)
    return "".join(torch), "".join(rest)


def install_part(role: str, command: list[str], *, with_torch_index: bool) -> None:
    """pip as it is configured; where that does not know torch's CPU build, PyTorch's public index as well."""
    code, said = run_shown(role, command, quiet=with_torch_index)
    if code and with_torch_index and any("No matching distribution" in line for line in said):
        say(f"{role}: pip as configured does not know torch's CPU build; trying {TORCH_CPU_INDEX}")
        code, said = run_shown(role, [*command, "--extra-index-url", TORCH_CPU_INDEX], quiet=False)
    if code == 0:
        return
    if any("No space left" in line for line in said):
        raise EnvironmentFailure(f"{role}: the disk filled up during the installation; make room, or set VITALIS_CACHE")
    last = "\n".join(f"    {line}" for line in list(said)[-8:]) or "    (its message is above)"
    raise EnvironmentFailure(f"{role}: pip failed with exit code {code}. Its last lines:\n{last}")


def run_shown(role: str, command: list[str], *, quiet: bool) -> tuple[int, deque[str]]:
    """Runs pip with progress on stderr: its own bar on a terminal, else a line every PROGRESS_SECONDS."""
    said: deque[str] = deque(maxlen=40)
    if sys.stderr.isatty() and not quiet:
        return subprocess.run(command, stdout=sys.stderr, check=False).returncode, said
    began = time.monotonic()
    child = subprocess.Popen(
        [*command, "--progress-bar", "off"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert child.stdout is not None
    lines = (line.strip() for line in child.stdout)
    reader = threading.Thread(
        target=lambda: said.extend(line for line in lines if not line.startswith("WARNING")), daemon=True
    )
    reader.start()
    try:
        while True:
            try:
                code = child.wait(PROGRESS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                say(f"{role}: {time.monotonic() - began:.0f} s, {(said[-1] if said else 'pip is starting')[:100]}")
    except BaseException:
        child.terminate()
        child.wait()
        raise
    reader.join(5)
    return code, said


def check_imports(role: str, python: Path, modules: tuple[str, ...]) -> None:
    """A package can install and not load (an older C library, say): better told here than at the first start."""
    ran = subprocess.run(
        [str(python), "-c", "import " + ", ".join(modules)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentFailure(f"{role}: installed, but its packages do not load on this machine: {last}")


def write_commands(folder: Path, python: Path) -> None:
    """`bin/` for this checkout: the shared environment's tools, with this checkout's package in front.

    PYTHONPATH is how the package reaches child processes too, and the caller's own stays behind ours; `-P` keeps the
    working folder out of the path.
    """
    if (folder / "pyvenv.cfg").exists():
        raise EnvironmentFailure(f"{folder} is a virtual environment of your own: move it away, or name another folder")
    commands = {
        "python": '"$@"',
        "vitalis-serve": '-P -m vitalis_serve "$@"',
    }
    for name, module in COMMANDS.items():
        if (python.parent / name).exists():
            commands[name] = f'-m {module} "$@"'
    if "locust" in commands:
        del commands["vitalis-serve"]  # its packages are not in this environment
        commands["vitalis-load"] = '-P -m vitalis_load "$@"'
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    ours = f"{REPOSITORY}/server:{REPOSITORY}/loadtests"
    for name, arguments in commands.items():
        target = folder / "bin" / name
        fresh = target.with_name(f".{name}.{os.getpid()}")
        fresh.write_text(
            "#!/bin/sh\n# Written by deploy/environments.py.\n"
            f"PYTHONPATH='{ours}'\"${{PYTHONPATH:+:$PYTHONPATH}}\" exec '{python}' {arguments}\n"
        )
        fresh.chmod(0o755)
        fresh.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="environments.py", description="Makes or finds the virtual environment of a role."
    )
    parser.add_argument("role", choices=[*ROLES, "engine"])
    parser.add_argument(
        "--commands", type=Path, metavar="FOLDER", help="write wrappers for this checkout into FOLDER/bin"
    )
    arguments = parser.parse_args()
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}:
        say(f"the locks are made and tested for Linux on x86-64; this is {sys.platform} on {platform.machine()}")
    try:
        python = find_or_make(arguments.role)
        if arguments.commands:
            write_commands(arguments.commands.absolute(), python)
    except EnvironmentFailure as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit(130)
    print(python)


if __name__ == "__main__":
    main()
