"""kill -9 of workers, and of whoever counts, at any moment: each request is told exactly once, and counted once."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from vitalis_serve.spool.reader import cuts, files
from vitalis_serve.spool.spent import day_of, seed

from tests.support.spool import NOW, ROOT, Child, Ledger

TODAY = day_of(NOW)


@pytest.mark.parametrize("chosen", range(2))
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


def test_files_that_a_killed_worker_never_used_go_with_the_next_one(tmp_path: Path) -> None:
    """One that dies again and again must not fill the disk with files that hold nothing."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.support.spool import SEGMENT, opened\n"
        "from vitalis_serve.spool.writer import SpoolWriter\n"
        "writer = SpoolWriter(Path(sys.argv[1]), 'worker-0', segment_bytes=SEGMENT)\n"
        "writer.open(opened(os.urandom(16)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "server")}
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environ, check=False)
        assert ended.returncode == -signal.SIGKILL
    used = [path for path in files(tmp_path) if any(path.read_bytes()[:8])]
    assert len(used) == 3
    assert len(files(tmp_path)) == 3 + 2
    assert [len(cuts(path)) for path in used] == [1, 1, 1]
