"""Whole distributions in few numbers: the values below which given shares of all lie."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from vitalis_load import metrics
from vitalis_load.histograms import Histogram
from vitalis_load.records import Record
from vitalis_load.timelines import quantile, short

# every half percent, and the tail in finer steps
SHARES: Final = (
    *(step / 200 for step in range(199)),
    *(0.99 + step / 1000 for step in range(1, 9)),
    *(0.999, 0.9995, 0.9999, 1.0),
)
MEASURES: Final[Mapping[str, Callable[[Record], float | None]]] = {
    "ttft": metrics.ttft,
    "ttfo": metrics.ttfo,
    "tpot": metrics.tpot,
    "e2e": metrics.e2e,
}
# An answer that was still going at the end had its first token: the slowest are not left out.
_OF_UNFINISHED: Final = ("ttft", "ttfo")


class Distribution(msgspec.Struct, kw_only=True):
    count: int
    values: list[float]  # seconds, one for each of SHARES


def distributions(records: Iterable[Record], gaps: Histogram | None) -> dict[str, Distribution]:
    """Of the requests that did not fail; `gaps` of all chunks. What nobody had is left out."""
    whole = [record for record in records if not metrics.failed(record)]
    ended = [record for record in whole if not record.unfinished]
    result = {}
    for name, measure in MEASURES.items():
        of = whole if name in _OF_UNFINISHED else ended
        values = sorted(value for record in of if (value := measure(record)) is not None)
        if values:
            result[name] = Distribution(count=len(values), values=[short(quantile(values, share)) for share in SHARES])
    if gaps is not None and gaps.count:
        result["gaps"] = Distribution(
            count=gaps.count, values=list(gaps.percentiles(*(100 * share for share in SHARES)))
        )
    return result
