#!/usr/bin/env python3
"""Resolves deploy/locks/*.txt again, with hashes, for Python 3.11 and newer. Standard library only; uv is fetched by
pip into a throwaway environment.

    python3 deploy/lock.py [ROLE]... [--upgrade]

No lock names where a package comes from: pip is configured by whoever installs. The one exception, torch's CPU build,
is in deploy/environments.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = REPOSITORY / "deploy" / "locks"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SOURCES = {
    "gateway": ["pyproject.toml"],
    "dev": ["pyproject.toml", "--group", "dev"],
    "load": ["deploy/locks/load.in"],
    "engine-cpu": ["deploy/locks/engine-cpu.in", "--override", "deploy/locks/engine-cpu.overrides"],
    "engine-cuda": ["deploy/locks/engine-cuda.in"],
}
# torch 2.13.0+cpu for Linux on x86-64 as PyTorch publishes it, for Python 3.11, 3.12 and 3.13. A machine whose pip has
# one of them from elsewhere would lock only that one.
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_HASHES = (
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
)


def pip_sources(role: str) -> list[str]:
    """Where pip finds torch's CPU build, for uv, which does not read pip's configuration. No other role may see it: a
    local `+cpu` version would win over the CUDA build."""
    if role != "engine-cpu":
        return []
    found = os.environ.get("PIP_FIND_LINKS", "")
    if not found:
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.find-links"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = asked.stdout.strip() if asked.returncode == 0 else ""
    options = [option for place in found.split() for option in ("--find-links", place)]
    if not any(Path(p).is_dir() and [*Path(p).glob("torch-*+cpu-*")] for p in found.split()):
        options += ["--extra-index-url", TORCH_CPU_INDEX, "--index-strategy", "unsafe-best-match"]
    return options


def with_torch_hashes(lock: str) -> str:
    """The lock with every known hash of torch's CPU build in its entry."""
    head, entry, tail = lock.partition(f"{TORCH_CPU} \\\n")
    if not entry:
        return lock
    lines = tail.splitlines(keepends=True)
    hashes = {line.split("sha256:")[1].split()[0] for line in lines[: _hash_lines(lines)]} | set(TORCH_CPU_HASHES)
    written = " \\\n".join(f"    --hash=sha256:{h}" for h in sorted(hashes)) + "\n"
    return head + entry + written + "".join(lines[_hash_lines(lines) :])


def _hash_lines(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if "--hash=" not in line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolves deploy/locks/*.txt again.")
    parser.add_argument("roles", nargs="*", metavar="ROLE", help=f"of {', '.join(SOURCES)}; all without any")
    parser.add_argument(
        "--upgrade", action="store_true", help="take the newest versions instead of keeping the locked ones"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.roles) - set(SOURCES):
        parser.error(f"no such role: {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    scratch = Path(tempfile.mkdtemp())
    try:
        subprocess.run([sys.executable, "-m", "venv", str(scratch / "uv")], check=True)
        subprocess.run([str(scratch / "uv/bin/python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
        for role in arguments.roles or SOURCES:
            target = LOCKS / f"{role}.txt"
            subprocess.run(
                [
                    str(scratch / "uv/bin/uv"), "pip", "compile", "--quiet", "--system-certs", "--universal",
                    "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-config",
                    *(["--upgrade"] if arguments.upgrade else []),
                    *pip_sources(role), *SOURCES[role], "--output-file", str(target),
                ],
                cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            target.write_text(with_torch_hashes(target.read_text()))
            print(f"{target.relative_to(REPOSITORY)}: {target.read_text().count('==')} packages")
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with exit code {error.returncode}: {' '.join(error.cmd[:4])} ...")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
