"""What a request asks for, and what one replica has room for. Pure: shared by routing and admission."""

from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from vitalis_serve.fleet import Replica, ReplicaState
from vitalis_serve.gateway.pace import PrefillRate

# Strict order: the first one is served before all others, and alone may use the reserved share.
CLASSES: Final = ("emergency", "interactive", "standard", "batch")
EMERGENCY: Final = CLASSES[0]
STARTS: Final = frozenset({ReplicaState.PLANNED, ReplicaState.STARTING, ReplicaState.BACKOFF})
OUTPUT_WEIGHT: Final = 2  # a generated token costs an engine about twice a prompt token


class Demand(msgspec.Struct, frozen=True, array_like=True):
    """One request as admission and routing see it. Tokens are estimates; the same ones go to limits.

    waiter: anything hashable that is unique among those inside (an object here, an id across a socket).
    affinity: `routing.affinity_key` of the tenant's salt and everything through the first user message.
    session: the same of the session header's value, 0 without one.
    deadline: absolute, in the clock of `now`; 0 leaves it to the class's patience.
    streamed: False means that no first token will be reported before the answer is whole.
    sequences: how many answers it asks for at once, each of which takes a slot; output_tokens is of all.
    """

    waiter: Any
    model: str
    tenant: str = ""
    class_: str = msgspec.field(default="standard", name="class")
    prompt_tokens: int = 0
    output_tokens: int = 0
    body_bytes: int = 0
    affinity: int = 0
    session: int = 0
    deadline: float = 0.0
    excluded: frozenset[str] = frozenset()
    weight: float = 1.0
    streamed: bool = True
    sequences: int = 1


def cost(prompt_tokens: int, output_tokens: int) -> int:
    """Weighted tokens: what the fair queue charges, before (estimates) and after (usage)."""
    return prompt_tokens + OUTPUT_WEIGHT * output_tokens


@dataclass(slots=True, eq=False)
class Seat:
    """One replica as one admission uses it: its share of the three caps, and what is taken of them.

    The `ordinary_*` caps hold for every class but emergency; the rest up to the full cap is emergency's. 0: no cap.
    `common_slots` is where tenants stop that have more than their share already, so that the others' next request
    finds a slot free.
    `held_for` is a waiter that was passed over too often: nobody else (but an emergency) gets in before it.
    `rests_from` is the tenant whose last prompt was larger than the whole cap: its next one of that kind waits for as
    long as that took, in seconds of `now`.
    """

    replica: Replica
    rate: PrefillRate = field(default_factory=PrefillRate)
    slots: int = 0
    ordinary_slots: int = 0
    common_slots: int = 0
    kv_limit: int = 0
    ordinary_kv: int = 0
    prefill_limit: int = 0
    ordinary_prefill: int = 0
    in_flight: int = 0
    kv: int = 0
    prefill: int = 0
    takes: bool = False
    open: bool = True  # False while the circuit breaker keeps requests away
    trial: bool = False  # open for one request only
    models: frozenset[str] = frozenset()
    held_for: Any = None
    rests_from: str | None = None
    rests_until: float = 0.0

    def serves(self, demand: Demand) -> bool:
        """Whether this replica could run it at all, room or not."""
        return self.takes and demand.model in self.models and self.replica.name not in demand.excluded

    def wakes(self, demand: Demand) -> bool:
        """Whether it is being started, and could then."""
        starts = self.replica.state in STARTS and demand.model in self.models
        return starts and self.replica.name not in demand.excluded

    def rests(self, demand: Demand) -> bool:
        """Whether only the rest from its tenant's long prompts keeps it out."""
        return self.rests_from == demand.tenant and demand.prompt_tokens > self.ordinary_prefill > 0

    def lacks(self, demand: Demand, heavy: bool = False) -> str:
        """Why the demand does not get in here now; "" where it does. `heavy`: its tenant has more than its share.

        What is larger than a whole cap gets in alone, or it would wait for ever."""
        if demand.class_ == EMERGENCY:
            slots, kv, prefill = self.slots, self.kv_limit, self.prefill_limit
        else:
            slots, kv, prefill = self.ordinary_slots, self.ordinary_kv, self.ordinary_prefill
            if self.held_for is not None and self.held_for != demand.waiter:
                return "held for another"
            if heavy:
                slots = self.common_slots
        if self.in_flight + demand.sequences > slots and (self.in_flight or not slots):
            return "no free slot"
        taken = self.prefill
        if prefill and taken + demand.prompt_tokens > prefill and (taken or self.rests_from == demand.tenant):
            return "no prefill room"
        taken = self.kv
        if taken and kv and taken + demand.prompt_tokens + demand.output_tokens > kv:
            return "no KV room"
        if not self.takes:
            return "takes no requests"
        if not self.open:
            return "circuit breaker open"
        if demand.model not in self.models:
            return "does not hold the model"
        if demand.excluded and self.replica.name in demand.excluded:
            return "excluded by an earlier try"
        return ""
