"""kill -9 of workers, and of whoever counts, at any moment: each request is told exactly once, and counted once."""

import random
from pathlib import Path

import pytest
from vitalis_serve.spool.reader import files
from vitalis_serve.spool.spent import day_of, seed

from tests.support.spool import NOW, Child, Ledger

TODAY = day_of(NOW)


@pytest.mark.parametrize("chosen", range(3))
def test_two_killed_workers_lose_and_double_nothing(tmp_path: Path, chosen: int) -> None:
    """Two write at once, and while they do the spool is drained, counted and deleted."""
    folder, spent = tmp_path / "spool", tmp_path / "spent.json"
    ledger = Ledger(folder, spent)
    chance = random.Random(chosen)
    children = [Child(folder, f"worker-{name}", chosen * 10 + name) for name in range(2)]
    try:
        for share in (1, 2, 3):
            for child in children:
                child.hear(share * chance.randrange(300, 900))
            ledger.round()
    finally:
        for child in children:
            child.kill()
    ledger.round(delete=False)
    seeded = seed(spent, folder, NOW)
    ledger.round()

    ended = children[0].of(b"c") | children[1].of(b"c")
    begun = children[0].of(b"o") | children[1].of(b"o")
    assert len(begun) > 500
    cut = {identity for identity, record in ledger.kept.items() if record.outcome == "cut"}
    assert ended <= ledger.kept.keys() - cut, "a close that had returned is not there"
    assert begun <= ledger.kept.keys()
    # Of each worker one call may have been under way.
    assert len(ledger.kept.keys() - begun) <= 2
    assert len(begun - ended - cut) <= 2
    assert all(record.code == "worker_died" and record.prompt_estimated and record.completion_estimated
               and (record.prompt_tokens, record.completion_tokens) == (100, 50)
               for record in ledger.kept.values() if record.outcome == "cut")  # fmt: skip

    tokens = sum(record.prompt_tokens + record.completion_tokens for record in ledger.kept.values())
    assert seeded == dict.fromkeys(("key:k1", "tenant:acme", "route:chat"), (tokens, tokens))
    assert files(folder) == []
    assert seed(spent, folder, NOW) == seeded


def test_killed_before_its_first_request_leaves_nothing(tmp_path: Path) -> None:
    for again in range(3):
        child = Child(tmp_path, "worker-0", again)
        child.hear(1)
        child.kill()
    # What the next one finds unused it takes away; a file with a record stays.
    child = Child(tmp_path, "worker-0", 9)
    child.hear(1)
    used = [path for path in files(tmp_path) if any(path.read_bytes()[:8])]
    unused = [path for path in files(tmp_path) if not any(path.read_bytes()[:8])]
    child.kill()
    assert len(used) == 4
    assert len(unused) == 2
