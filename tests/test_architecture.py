"""Imports point one way (the layers of docs/architecture.md), and the data plane stays free of frameworks."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "server"
# Lower numbers may import higher ones only, and the parts of one layer only those named beside them.
LAYERS = {
    "__main__": 0,
    "cli": 1,
    "main": 2,
    "welcome": 2,
    "progress": 2,
    "preparation": 2,
    "control": 3,
    "gateway": 3,
    "engines": 3,
    "store": 4,
    "supervise": 5,
    "spool": 5,
    "metrics": 6,
    "tokens": 6,
    "fleet": 7,
    "settings": 8,
    "errors": 8,
    "logs": 8,
}
BESIDE = {
    ("main", "welcome"),
    ("main", "progress"),
    ("main", "preparation"),
    ("control", "store"),
    ("settings", "errors"),
    ("logs", "errors"),
}
SEES_NO_STORE = {"gateway", "engines"}
FRAMEWORKS = {"fastapi", "starlette", "pydantic", "sqlalchemy", "alembic", "httpx"}
ENGINE_LIBRARIES = {"vllm", "torch", "transformers"}
PURE = ("fleet", "metrics", "errors", "supervise.lifecycle", "engines.command", "engines.placement", "engines.memory",
        "gateway.headers", "gateway.events", "gateway.paths", "gateway.admission", "gateway.seats", "gateway.routing",
        "gateway.fairness", "gateway.pace", "gateway.prefix", "gateway.body", "gateway.route_policy",
        "gateway.guidance", "gateway.breaker", "gateway.retries", "gateway.killers", "gateway.estimates",
        "gateway.harmony", "gateway.intake", "gateway.usage", "gateway.limits", "gateway.tokens",
        "tokens", "spool.record", "store.tables")  # fmt: skip
IMPURE_LIBRARIES = {"asyncio", "socket", "time", "subprocess"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "vitalis_serve").rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Every module that the source names, within functions too; `from a import b` is a.b where that is a module."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def part(module: str) -> str | None:
    words = module.split(".")
    return words[1] if words[0] == "vitalis_serve" and len(words) > 1 else None


def reached(module: str) -> set[str]:
    """Everything that a module imports, directly or not; of foreign libraries the top-level name."""
    found: set[str] = set()
    ahead = [module]
    while ahead:
        for name in imports(ahead.pop()):
            own = name in MODULES
            if (name if own else name.split(".")[0]) not in found:
                found.add(name if own else name.split(".")[0])
                # A submodule brings its packages along.
                parents = {".".join(name.split(".")[:n]) for n in range(2, name.count(".") + 2)} & MODULES.keys()
                ahead += sorted(parents)
                found |= parents
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_lower_layers(module: str) -> None:
    here = part(module)
    for name in imports(module):
        there = part(name)
        if here is None or there is None or here == there or (here, there) in BESIDE:
            continue
        assert there in LAYERS, f"{name} belongs to no layer"
        assert LAYERS[here] < LAYERS[there], f"{module} imports {name}"
        assert not (here in SEES_NO_STORE and there == "store"), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "gateway"])
def test_gateway_reaches_no_framework(module: str) -> None:
    found = reached(module)
    assert not found & FRAMEWORKS
    assert not {name for name in found if part(name) in ("supervise", "settings", "control", "store")}


@pytest.mark.parametrize("module", MODULES)
def test_engines_libraries_are_never_imported(module: str) -> None:
    """Scripts in engines/builders/ run in the engine's environment, not in ours."""
    if not module.startswith("vitalis_serve.engines.builders."):
        assert not {name.split(".")[0] for name in imports(module)} & ENGINE_LIBRARIES


@pytest.mark.parametrize("module", [f"vitalis_serve.{name}" for name in PURE])
def test_pure_module_does_no_io(module: str) -> None:
    assert not reached(module) & IMPURE_LIBRARIES


def test_running_worker_has_loaded_no_framework() -> None:
    """What the sources promise, asked of an interpreter."""
    program = "import sys, vitalis_serve.gateway.worker; print(*{name.split('.')[0] for name in sys.modules})"
    environ = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    loaded = set(ended.stdout.split())
    assert "msgspec" in loaded
    assert not loaded & (FRAMEWORKS | ENGINE_LIBRARIES)
