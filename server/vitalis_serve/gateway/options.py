"""What a worker is told at its start, as one JSON document (`vitalis_serve.main` writes it, the worker decodes
it with msgspec). The gateway must not reach pydantic, so this is its own small schema."""

import msgspec


class WorkerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Durations in seconds, sizes in bytes. `slots` of each replica travel with the fleet instead."""

    name: str
    snapshot_path: str  # keys and routes, written by control; read once at start
    control_socket: str  # where control pushes snapshots and collects metrics
    access_log_path: str = ""  # "" for none, "-" for standard error
    max_header_bytes: int = 65_536
    max_body_bytes: int = 8 << 20
    max_bodies_bytes: int = 256 << 20
    max_connections: int = 10_000
    header_seconds: float = 10
    body_seconds: float = 60
    keepalive_seconds: float = 75
    queue_requests: int = 1024
    queue_seconds: float = 30
    class_seconds: dict[str, float] = {}  # another patience for some classes
    cold_start_seconds: float = 0  # while the engine that would serve is starting
    overload_seconds: float = 1  # nobody waits longer once a queue has stood for seconds; 0: off
    reserved_share: float = 0.1  # of every replica's caps, for emergency alone
    routing: str = "affinity"  # or session, least_tokens, round_robin
    connect_seconds: float = 5
    first_token_seconds: float = 120
    idle_seconds: float = 60
    client_stalled_seconds: float = 60
    upstream_idle_seconds: float = 60  # below the engines' own keep-alive (75 s for ours; 5 s by default)
    breaker_failures: int = 5  # in a row, of one replica
    retries_at_least: int = 16  # a minute, whatever a tenth of the traffic is
    harmony: bool = False  # the engines' models speak Harmony (gpt-oss)
    workers: int = 1  # how many there are on this host; the first owns admission for all
    worker: int = 0  # which of them this is
    gateways: int = 1  # how many hosts share the slots of each replica
    admission_socket: str = ""  # where the first worker is asked by the others
    total_seconds: float = 1800
    spool_folder: str = ""  # "" records nothing
    spool_segment_bytes: int = 16 << 20
    spool_full: str = "refuse"  # or serve: what happens to new requests when their use cannot be recorded
    spent_path: str = ""  # what the ledger says of this day and month (`spool/spent.py`)
    limits_redis_url: str = ""  # "": limits are counted on this host
    limits_wait_seconds: float = 0.05
    limits_away: str = "share"  # or refuse
    limits_lease_seconds: float = 30
