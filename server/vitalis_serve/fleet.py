"""Replicas as everyone but their owner sees them: immutable snapshots, published by the supervisor.

A snapshot is advice: it may be old by the time it is read. The supervisor alone writes states; workers keep
their own counts of what they have in flight. Pure: no I/O, no clock.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class ReplicaState(StrEnum):
    """`ready` and `busy` take new requests; `draining` only finishes what it has. Dead are `backoff`, which is started
    again, and `failed`, which is not."""

    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    SUSPECT = "suspect"
    HUNG = "hung"
    DRAINING = "draining"
    STOPPED = "stopped"
    BACKOFF = "backoff"
    FAILED = "failed"


TAKES_REQUESTS = frozenset({ReplicaState.READY, ReplicaState.BUSY})


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine as the fleet counts it.

    address: "unix:/path/to.sock" or "http://host:port". models: the names this engine answers to, the first
    one being the base model; () while one that is asked for them has not said yet. slots: most requests the gateway
    keeps in flight there, over all workers.
    incarnation: how often it was started, or, of one given by address, 1 and how often its process went away; a change
    means that nothing known about the old process holds, and one while it serves that the old one crashed.
    kv_tokens: how many tokens its KV cache holds, 0 where that is not known (and then not a limit).
    prefill_tokens: most prompt tokens without a first token yet, 0 to derive it from the measured prefill rate.
    """

    name: str
    address: str
    state: ReplicaState
    models: tuple[str, ...] = ()
    slots: int = 64
    incarnation: int = 0
    detail: str = ""
    kv_tokens: int = 0
    prefill_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """All replicas at one moment. `version` grows with every change the supervisor publishes."""

    version: int = 0
    replicas: tuple[Replica, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that a replica holds, or held when it was last heard of; each once."""
        return tuple(dict.fromkeys(model for replica in self.replicas for model in replica.models))

    def to_json(self) -> dict[str, Any]:
        """A plain mapping; `Fleet.from_json` of it gives an equal fleet."""
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Fleet":
        """Raises KeyError, TypeError or ValueError where the document is not one that `to_json` made."""
        replicas = tuple(
            Replica(
                name=r["name"],
                address=r["address"],
                state=ReplicaState(r["state"]),
                models=tuple(r["models"]),
                slots=r["slots"],
                incarnation=r["incarnation"],
                detail=r.get("detail", ""),
                kv_tokens=r.get("kv_tokens", 0),
                prefill_tokens=r.get("prefill_tokens", 0),
            )
            for r in document["replicas"]
        )
        return Fleet(document["version"], replicas)
