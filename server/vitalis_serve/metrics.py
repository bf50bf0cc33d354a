"""Every metric of ours, in one list. Workers count in plain numbers; control renders them (`control/exposition.py`).

A worker's report (JSON): {"counters": [[name, {label: value}, number]...], "gauges": the same, "histograms":
[[name, {label: value}, [count per bucket, one more than bounds], sum]...]}; bucket counts are not cumulative.
"""

from dataclasses import dataclass
from typing import Final, Literal

# Seconds; fine enough that the gateway's own 0.1 to 1 ms can be told apart.
TIME_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0, 300.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


# Said by every worker, with a `worker` label added by control.
WORKER_METRICS: Final = (
    Metric("vitalis_requests_total", "counter", "Requests ended, by how.", ("route", "outcome", "code")),
    Metric("vitalis_in_flight", "gauge", "Requests that hold a slot."),
    Metric("vitalis_queued", "gauge", "Requests that wait for a slot.", ("class",)),
    Metric("vitalis_open_contexts", "gauge", "Request contexts not yet released; 0 when idle, or something leaks."),
    Metric("vitalis_client_connections", "gauge", "Open client connections."),
    Metric("vitalis_upstream_connections", "gauge", "Engine connections by replica and state.", ("replica", "state")),
    Metric("vitalis_replica_in_flight", "gauge", "Requests of all workers at each replica.", ("replica",)),
    Metric("vitalis_shed_total", "counter", "Requests refused for want of room, by reason.", ("reason",)),
    Metric("vitalis_retries_total", "counter", "Requests tried again on another connection or replica.", ("reason",)),
    Metric("vitalis_upstream_failures_total", "counter", "Engine failures by kind.", ("replica", "kind")),
    Metric("vitalis_fallbacks_total", "counter", "Requests that asked another model instead.", ("route", "model")),
    Metric("vitalis_breaker_open", "gauge", "1 while a circuit breaker keeps requests away.", ("replica",)),
    Metric("vitalis_breaker_openings_total", "counter", "How often a circuit breaker opened.", ("replica",)),
    Metric("vitalis_killers_refused_total", "counter", "Requests refused because they were there when engines died."),
    Metric("vitalis_spool_unwritten_total", "counter", "Records of use that could not be written to the spool."),
    Metric("vitalis_limits_away", "gauge", "1 while Redis, where limits are counted, is away."),
    Metric("vitalis_limits_held", "gauge", "Requests that limits count as running; of the first worker those of all."),
    Metric("vitalis_spool_open", "gauge", "Requests in the spool that have not ended."),
    Metric("vitalis_spool_errors_total", "counter", "Writes, syncs and new files of the spool that failed."),
    Metric("vitalis_limits_timeouts_total", "counter", "Requests that waited in vain for Redis."),
    Metric("vitalis_limits_lost_total", "counter", "Settlements that Redis never got; the ledger makes up for them."),
    Metric("vitalis_uncounted_total", "counter", "Requests that came while their use could not be recorded."),
    Metric("vitalis_estimate_error_tokens_total", "counter", "Tokens by which expected answers were wrong, summed."),
    Metric("vitalis_estimates_total", "counter", "Answers whose length was expected and is known."),
    Metric("vitalis_prompt_tokens_total", "counter", "Prompt tokens, as engines counted.", ("route",)),
    Metric("vitalis_completion_tokens_total", "counter", "Completion tokens, as engines counted.", ("route",)),
    Metric("vitalis_cached_tokens_total", "counter", "Prompt tokens found in a prefix cache.", ("route",)),
    Metric("vitalis_reasoning_tokens_total", "counter", "Completion tokens that were reasoning.", ("route",)),
    Metric(
        "vitalis_estimated_tokens_total", "counter", "Tokens that no engine told, in no other count.", ("route", "kind")
    ),
    Metric("vitalis_access_log_dropped_total", "counter", "Access records dropped because the log was too slow."),
    Metric("vitalis_event_loop_lag_seconds", "gauge", "How late the last timer of this worker fired."),
    Metric("vitalis_body_bytes", "gauge", "Bytes of request bodies held."),
    Metric(
        "vitalis_first_byte_seconds", "histogram", "From a whole request to the first byte of its answer.", ("route",)
    ),
    Metric("vitalis_first_token_seconds", "histogram", "From a whole request to its first token.", ("route",)),
    Metric("vitalis_request_seconds", "histogram", "From a whole request to the last byte of its answer.", ("route",)),
    Metric("vitalis_queue_seconds", "histogram", "Time spent waiting for a slot.", ("route",)),
)

# Said by control itself.
CONTROL_METRICS: Final = (
    Metric("vitalis_replica_state", "gauge", "1 for the state each replica is in.", ("replica", "state")),
    Metric("vitalis_replica_restarts_total", "counter", "Processes of each replica after its first.", ("replica",)),
    Metric("vitalis_snapshot_version", "gauge", "Version of keys and routes in force, by worker.", ("worker",)),
    Metric("vitalis_workers", "gauge", "Workers connected to control."),
    Metric("vitalis_spool_bytes", "gauge", "Bytes of this host's spool that are not in the store yet."),
    Metric("vitalis_spool_records", "gauge", "Finished requests in this host's spool that are not in the store yet."),
    Metric("vitalis_spool_oldest_seconds", "gauge", "Since the first of those requests ended; 0 where there is none."),
    Metric("vitalis_ledger_drained_total", "counter", "Requests that went from the spool to the store."),
    Metric("vitalis_ledger_duplicates_total", "counter", "Requests in the spool that the store had already."),
    Metric("vitalis_ledger_cut_total", "counter", "Requests cut by the death of their worker, stored as estimated."),
    Metric("vitalis_ledger_torn_total", "counter", "Places in spool files of dead workers that held no whole record."),
    Metric("vitalis_ledger_rolled_up_total", "counter", "Single requests that were moved into the sums of their day."),
    Metric("vitalis_ledger_store_away", "gauge", "1 while the store does not take what the spool holds."),
)
