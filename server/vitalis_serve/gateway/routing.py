"""Which replica a request goes to. Pure: a policy looks at seats and decides; admission takes the slot.

How it works: for `affinity` and `session` a key falls into one of BUCKETS buckets, and every bucket has its own
order of all replicas (rendezvous hashing over replica names, computed when the bucket is first used). The first of
the order is the bucket's home. A request goes to the first replica in its order that has room; who is asked again
later is sent home again. All gateways agree without talking, because names and keys are all that counts; when a
replica goes, only its own keys move, each to the next in its own order. Hashing once per bucket instead of once per
request and replica makes a decision 0.5 us whatever the number of replicas.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, Protocol

import msgspec

from vitalis_serve.gateway.seats import Demand, Seat

BUCKETS: Final = 8192  # home shares even to 1 % with 2 replicas, 4 % with 16
_MASK: Final = BUCKETS - 1


class Decision(msgspec.Struct, frozen=True):
    """The seat, why it, and who was passed over before it for what reason."""

    seat: Seat
    reason: str
    passed: tuple[tuple[str, str], ...] = ()

    @property
    def replica(self) -> str:
        return self.seat.replica.name


class Candidate(msgspec.Struct, frozen=True):
    """One line of an explanation. `lacks` is "" where the replica could take the request now."""

    replica: str
    place: int
    why_here: str
    lacks: str


class Explanation(msgspec.Struct, frozen=True):
    policy: str
    chosen: str | None
    reason: str
    ranking: tuple[Candidate, ...]


class Policy(Protocol):
    """A way to choose. `update` is told of every new set of seats; the seats' counts change underneath."""

    name: str

    def update(self, seats: Sequence[Seat]) -> None: ...

    def choose(self, demand: Demand, heavy: bool = False) -> Decision | None:
        """The seat to take, or None where none has room. `heavy`: see `Seat.lacks`."""

    def prefers(self, demand: Demand, seat: Seat) -> bool:
        """Whether a request that waits would rather have this seat than another."""

    def ranking(self, demand: Demand) -> list[tuple[Seat, str]]:
        """All seats in the order in which they would be tried just now, each with why it stands there."""


def affinity_key(salt: bytes, prefix: bytes) -> int:
    """Where a prefix belongs. `salt` is the tenant's: two tenants with the same prompt share no cache anyway."""
    return int.from_bytes(blake2b(prefix, digest_size=8, key=salt[:64]).digest(), "big")


def policy(name: str, seed: int = 0) -> Policy:
    """`affinity`, `least_tokens`, `round_robin` or `session`. KeyError for another name.

    `seed` should differ between gateways: it starts `least_tokens`' dice and `round_robin`'s turn."""
    made: dict[str, Policy] = {
        "affinity": Rendezvous("affinity"),
        "session": Rendezvous("session"),
        "least_tokens": LeastTokens(seed),
        "round_robin": RoundRobin(seed),
    }
    return made[name]


def explain(chosen_by: Policy, demand: Demand) -> Explanation:
    """The whole ranking for a request, and what would be chosen; changes nothing."""
    ranked = chosen_by.ranking(demand)
    lines = tuple(
        Candidate(seat.replica.name, place, why, seat.lacks(demand)) for place, (seat, why) in enumerate(ranked, 1)
    )
    best = next((line for line in lines if not line.lacks), None)
    if best is not None:
        return Explanation(chosen_by.name, best.replica, best.why_here, lines)
    busy = any(seat.open and seat.serves(demand) for seat, _ in ranked)
    reason = "every replica that could take it is busy" if busy else "no replica takes this request"
    return Explanation(chosen_by.name, None, reason, lines)


class Rendezvous:
    """`affinity`, and `session` (by header, by affinity where there is none)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._by_session = name == "session"
        self._seats: tuple[Seat, ...] = ()
        self._orders: dict[int, tuple[Seat, ...]] = {}
        self._at_home: dict[str, Decision] = {}  # by replica: what most requests are told

    def update(self, seats: Sequence[Seat]) -> None:
        if tuple(seats) != self._seats:
            self._seats = tuple(seats)
            self._orders.clear()
            self._at_home = {seat.replica.name: Decision(seat, "home") for seat in seats}

    def choose(self, demand: Demand, heavy: bool = False) -> Decision | None:
        bucket = (demand.session if self._by_session and demand.session else demand.affinity) & _MASK
        order = self._orders.get(bucket) or self._order(bucket)
        for seat in order:
            if not seat.lacks(demand, heavy):
                return self._at_home[seat.replica.name] if seat is order[0] else _diverted(order, seat, demand, heavy)
        return None

    def prefers(self, demand: Demand, seat: Seat) -> bool:
        return self._home(demand) is seat

    def ranking(self, demand: Demand) -> list[tuple[Seat, str]]:
        order = self._order(self._key(demand) & _MASK)
        home = self._home(demand)
        return [(seat, "home" if seat is home else f"place {place}") for place, seat in enumerate(order, 1)]

    def _key(self, demand: Demand) -> int:
        return demand.session if self._by_session and demand.session else demand.affinity

    def _home(self, demand: Demand) -> Seat | None:
        """The first in the order that could run it at all: a replica that is away lends its keys to the next."""
        key = self._key(demand) & _MASK
        for seat in self._orders.get(key) or self._order(key):
            if seat.serves(demand):
                return seat
        return None

    def _order(self, bucket: int) -> tuple[Seat, ...]:
        order = self._orders.get(bucket)
        if order is None:
            salt = bucket.to_bytes(4, "big")
            order = self._orders[bucket] = tuple(
                sorted(
                    self._seats, key=lambda seat: blake2b(seat.replica.name.encode(), digest_size=8, key=salt).digest()
                )
            )
        return order


def _diverted(order: tuple[Seat, ...], taken: Seat, demand: Demand, heavy: bool) -> Decision:
    """Those who could not run it at all are no home and were not passed over."""
    passed = []
    for seat in order:
        if seat is taken:
            break
        if seat.serves(demand):
            passed.append((seat.replica.name, seat.lacks(demand, heavy)))
    if not passed:
        return Decision(taken, "home")
    home, why = passed[0]
    return Decision(taken, f"diverted from {home}: {why}", tuple(passed))


class LeastTokens:
    """Two replicas drawn by lot, the one with fewer outstanding tokens; all of them where neither has room.

    The least of all would send a burst, seen by several gateways at once, to the same replica."""

    name = "least_tokens"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random  # noqa: S311 - balances load, guards nothing
        self._seats: tuple[Seat, ...] = ()

    def update(self, seats: Sequence[Seat]) -> None:
        self._seats = tuple(seats)

    def choose(self, demand: Demand, heavy: bool = False) -> Decision | None:
        seats = self._seats
        count = len(seats)
        if count > 1:
            one = int(self._random() * count)
            other = int(self._random() * (count - 1))
            first, second = seats[one], seats[other if other < one else other + 1]
            if second.kv < first.kv:
                first, second = second, first
            if not first.lacks(demand, heavy):
                return Decision(first, "fewer tokens of two")
            if not second.lacks(demand, heavy):
                return Decision(second, "the one of two with room")
        best: Seat | None = None
        for seat in seats:
            if (best is None or seat.kv < best.kv) and not seat.lacks(demand, heavy):
                best = seat
        return None if best is None else Decision(best, "fewest tokens of those with room")

    def prefers(self, demand: Demand, seat: Seat) -> bool:
        return True

    def ranking(self, demand: Demand) -> list[tuple[Seat, str]]:
        return [(seat, f"{seat.kv} tokens outstanding") for seat in sorted(self._seats, key=lambda seat: seat.kv)]


class RoundRobin:
    """One after the other, those without room left out."""

    name = "round_robin"

    def __init__(self, seed: int) -> None:
        self._turn = seed
        self._seats: tuple[Seat, ...] = ()

    def update(self, seats: Sequence[Seat]) -> None:
        self._seats = tuple(seats)

    def choose(self, demand: Demand, heavy: bool = False) -> Decision | None:
        seats, count = self._seats, len(self._seats)
        for step in range(count):
            seat = seats[(self._turn + step) % count]
            if not seat.lacks(demand, heavy):
                self._turn = (self._turn + step + 1) % count
                return Decision(seat, "next in turn")
        return None

    def prefers(self, demand: Demand, seat: Seat) -> bool:
        return True

    def ranking(self, demand: Demand) -> list[tuple[Seat, str]]:
        seats, count = self._seats, len(self._seats)
        return [(seats[(self._turn + step) % count], f"place {step + 1} in turn") for step in range(count)]
