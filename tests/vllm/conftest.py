"""Trees with real engines, each started once a session and used by many tests.

They run one after the other: a machine with two cores and a few gigabytes cannot hold three at once. A test that needs
another tree than the one that runs ends that one first, and pytest is told to order tests by tree.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.support import engines

TREES = {
    "pair": {"profile": "cpu-tiny", "engines_replicas": 2, "cache_groups": "{kin: [alike, akin]}"},
    "parallel": {"profile": "cpu-tiny", "engines_replicas": 1, "engines_tensor_parallel": 2},
}


class Trees:
    """The one tree that runs."""

    def __init__(self) -> None:
        self.name = ""
        self._context: object = None
        self._tree: engines.Stack | None = None

    def get(self, name: str) -> engines.Stack:
        if self.name != name:
            self.end()
            self._context = engines.stack(**TREES[name])
            self._tree = self._context.__enter__()
            self.name = name
            self._tree.wait_ready(TREES[name]["engines_replicas"])
        assert self._tree is not None
        return self._tree

    def succeed(self, name: str) -> None:
        """The running one's supervisor is dead: `name` starts in its folder."""
        assert self._tree is not None
        self._tree.start(**TREES[name])
        self.name = name
        self._tree.wait_ready(TREES[name]["engines_replicas"])

    def end(self) -> None:
        if self.name:
            self.name = ""
            self._context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def trees() -> Iterator[Trees]:
    running = Trees()
    try:
        yield running
    finally:
        running.end()


def _tree(trees: Trees, name: str) -> engines.Stack:
    try:
        return trees.get(name)
    except engines.NotHere as reason:
        pytest.skip(str(reason))


@pytest.fixture
def pair(trees: Trees) -> engines.Stack:
    """Two replicas of the tiny gpt-oss."""
    return _tree(trees, "pair")


@pytest.fixture
def parallel(trees: Trees) -> engines.Stack:
    """One replica of the tiny gpt-oss over two processes."""
    return _tree(trees, "parallel")


@pytest.fixture
def succeed(trees: Trees) -> Callable[[str], None]:
    """For the last test of a tree: it kills that, and has another one started in its place."""
    return trees.succeed


@pytest.fixture
def no_tree(trees: Trees) -> None:
    """For tests that start one of their own: the machine may not hold two."""
    trees.end()


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By tree, and every test of this folder is marked: it starts a real vLLM, and building a model takes minutes."""
    order = ["pair", "succeed", "parallel", "no_tree"]

    def rank(item: pytest.Item) -> int:
        used = [order.index(name) for name in getattr(item, "fixturenames", ()) if name in order]
        return max(used, default=len(order))

    here = [item for item in items if "tests/vllm/" in item.path.as_posix()]
    for item in here:
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.timeout(1200))
    # Last of all: a fault that the fast tests show should not wait for engines.
    items[:] = [item for item in items if item not in here] + sorted(here, key=rank)
