"""The folder of a run: its name, and what is written into it before the first request."""

import time
from datetime import UTC, datetime
from pathlib import Path

from vitalis_load import facts, recorder
from vitalis_load.order import Order
from vitalis_load.records import RunInfo


def begin(
    order: Order, out: str | Path, *, scale: str, processes: int, repeats: int = 1, note: str = ""
) -> Path:  # fmt: skip
    """Makes it below `out`. Raises LoadFailure with CANNOT_WRITE."""
    now = time.time()
    scenario = order.scenario_made()
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%d-%H%M%S")
    info = RunInfo(
        id=_free(Path(out), f"{stamp}-{scenario.name}"),
        scenario=order.scenario,
        scale=scale,
        url=order.target.url,
        model=order.target.model,
        repeats=repeats,
        processes=processes,
        began_at=now,
        commit=facts.commit(),
        versions=facts.versions(order.target),
        machine=facts.machine(),
        target=facts.told(order.target) | {"seed": order.seed, "tokens_per_word": round(order.per_word, 4)},
        note=note,
    )
    return recorder.make_run(Path(out), info)


def _free(out: Path, name: str) -> str:
    """Two runs may begin in the same second."""
    number, found = 2, name
    while (out / found).exists():
        found, number = f"{name}-{number}", number + 1
    return found
