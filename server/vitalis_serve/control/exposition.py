"""Workers' reports and control's own state as Prometheus text. Nothing is kept between scrapes.

Series of workers carry a `worker` label instead of being summed: a worker that is replaced begins at 0
again, and only so can a rate tell that from a decrease.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from vitalis_serve.fleet import Fleet, ReplicaState
from vitalis_serve.metrics import CONTROL_METRICS, TIME_BUCKETS, WORKER_METRICS, Metric

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS: Final = (*(str(bound) for bound in TIME_BUCKETS), "+Inf")
_CONTROL: Final = {metric.name: metric for metric in CONTROL_METRICS}
_LEDGER: Final = tuple(name for name in _CONTROL if name.startswith(("vitalis_spool_", "vitalis_ledger_")))


def render(
    reports: Mapping[str, Mapping[str, Any]],
    fleet: Fleet,
    versions: Mapping[str, int],
    ledger: Mapping[str, float] | None = None,
) -> bytes:
    """The text of one scrape. `reports`: each worker's, as metrics.py describes; `versions`: of the
    snapshot that each connected worker serves from; `ledger`: its figures by metric. What does not fit metrics.py is
    left out."""
    return generate_latest(_Scrape(reports, fleet, versions, ledger or {}))


class _Scrape(Collector):
    def __init__(
        self,
        reports: Mapping[str, Mapping[str, Any]],
        fleet: Fleet,
        versions: Mapping[str, int],
        ledger: Mapping[str, float],
    ) -> None:
        self._reports = reports
        self._fleet = fleet
        self._versions = versions
        self._ledger = ledger

    def collect(self) -> Iterator[Family]:
        yield from self._workers()
        yield from self._control()

    def _workers(self) -> Iterator[Family]:
        families = {metric.name: (metric, _family(metric, "worker")) for metric in WORKER_METRICS}
        for worker, report in sorted(self._reports.items()):
            for kind in ("counter", "gauge", "histogram"):
                for sample in report.get(f"{kind}s", ()):
                    try:
                        _add(families, kind, worker, sample)
                    except (KeyError, TypeError, ValueError, IndexError) as error:
                        logger.warning(
                            "a worker reported what metrics.py does not know",
                            extra={"worker": worker, "reason": repr(error)},
                        )
        for _, family in families.values():
            yield family

    def _control(self) -> Iterator[Family]:
        states = _family(_CONTROL["vitalis_replica_state"])
        restarts = _family(_CONTROL["vitalis_replica_restarts_total"])
        for replica in self._fleet.replicas:
            for state in ReplicaState:
                states.add_metric([replica.name, state.value], float(replica.state is state))
            restarts.add_metric([replica.name], max(0, replica.incarnation - 1))
        versions = _family(_CONTROL["vitalis_snapshot_version"])
        for worker, version in sorted(self._versions.items()):
            versions.add_metric([worker], version)
        workers = _family(_CONTROL["vitalis_workers"])
        workers.add_metric([], len(self._versions))
        yield from (states, restarts, versions, workers)
        for name in _LEDGER:
            figure = _family(_CONTROL[name])
            if name in self._ledger:
                figure.add_metric([], self._ledger[name])
            yield figure


def _family(metric: Metric, *more_labels: str) -> Any:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](metric.name, metric.help, labels=(*metric.labels, *more_labels))


def _add(families: Mapping[str, tuple[Metric, Any]], kind: str, worker: str, sample: Any) -> None:
    name, labels, *values = sample
    metric, family = families[name]
    if metric.kind != kind or set(labels) != set(metric.labels):
        raise ValueError(f"{name} is a {metric.kind} with labels {metric.labels}")
    label_values = [*(str(labels[label]) for label in metric.labels), worker]
    if kind != "histogram":
        family.add_metric(label_values, float(values[0]))
        return
    counts, total = values
    if len(counts) != len(_BOUNDS):
        raise ValueError(f"{name} has {len(counts)} buckets, not {len(_BOUNDS)}")
    reached = 0
    buckets = []
    for bound, count in zip(_BOUNDS, counts, strict=True):
        reached += count
        buckets.append((bound, float(reached)))
    family.add_metric(label_values, buckets, float(total))
