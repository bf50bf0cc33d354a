"""Admission under any sequence of events: never above a cap, nothing lost, emergency first, nobody starved."""

from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.admission import AGED_EVERY, Admission, AdmissionOptions, ClassLimits, Entered, Grant
from vitalis_serve.gateway.routing import policy
from vitalis_serve.gateway.seats import CLASSES, EMERGENCY, Demand, Seat

from tests.support.examples import examples

NAMES = ("e0", "e1", "e2")
KV, PREFILL, QUEUE = 1000, 400, 8

replicas = st.lists(
    st.builds(
        Replica,
        st.sampled_from(NAMES),
        st.just("unix:/e"),
        st.sampled_from([ReplicaState.READY, ReplicaState.BUSY, ReplicaState.DRAINING]),
        st.sampled_from([("m",), ("n",), ("m", "n")]),
        st.integers(1, 6),
        st.integers(1, 2),
        st.just(""),
        st.sampled_from([0, KV]),
        st.sampled_from([0, PREFILL]),
    ),
    max_size=3,
    unique_by=lambda made: made.name,
)


def options(**more: Any) -> AdmissionOptions:
    limits = ClassLimits(queue_requests=QUEUE, queue_bytes=4000, queue_seconds=10)
    return AdmissionOptions(**{"classes": dict.fromkeys(CLASSES, limits), "bypasses": 3, **more})


class Machine(RuleBasedStateMachine):
    """What callers may do, in any order; `held` and `waiting` are what they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Admission(options(), routing=policy("affinity"))
        self.now = 0.0
        self.next = 0
        self.held: dict[int, tuple[Demand, Seat]] = {}
        self.waiting: dict[int, Demand] = {}
        self.prefilled: set[int] = set()
        self.shrunk: set[Seat] = set()  # caps fell below what was there: it may stay, and not grow

    def _hold(self, demand: Demand, seat: Seat) -> None:
        assert demand.waiter not in self.held
        assert seat.takes
        assert seat.open
        assert demand.model in seat.models
        assert seat.replica.name not in demand.excluded
        self.held[demand.waiter] = (demand, seat)
        self.prefilled.discard(demand.waiter)

    def _granted(self, grants: list[Grant] | tuple[Grant, ...]) -> None:
        for grant in grants:
            self._hold(self.waiting.pop(grant.waiter), grant.seat)
        ordinary = {g.seat for g in grants if self.held[g.waiter][0].class_ != EMERGENCY}
        for demand in self.waiting.values():
            if demand.class_ == EMERGENCY:
                assert all(seat.lacks(demand) for seat in ordinary), "somebody went before an emergency"

    @rule(made=replicas, share=st.sampled_from([1.0, 0.5]))
    def update(self, made: list[Replica], share: float) -> None:
        grants = self.made.update(Fleet(1, tuple(made)), self.now, share)
        self.shrunk = set(self.made.seats())
        self._granted(grants)
        for waiter in self.made.stranded():
            demand = self.waiting.pop(waiter)
            assert not any(seat.serves(demand) for seat in self.made.seats())
        for demand in self.waiting.values():
            assert any(seat.serves(demand) for seat in self.made.seats()), "left in the queue for ever"

    @rule(
        model=st.sampled_from(["m", "n"]),
        class_=st.sampled_from(CLASSES),
        tenant=st.sampled_from("abc"),
        tokens=st.sampled_from([(10, 10), (100, 50), (300, 300), (900, 50), (3000, 10)]),
        excluded=st.frozensets(st.sampled_from(NAMES), max_size=2),
        size=st.sampled_from([10, 900]),
        key=st.integers(0, 7),
        streamed=st.booleans(),
        weight=st.just(1.0),
    )
    def enter(self, model: str, class_: str, tokens: tuple[int, int], size: int, key: int, **more: Any) -> None:
        self.next += 1
        demand = Demand(
            waiter=self.next, model=model, class_=class_, prompt_tokens=tokens[0], output_tokens=tokens[1],
            body_bytes=size, affinity=key, **more,
        )  # fmt: skip
        before = [one for one in self.waiting.values() if one.class_ == class_]
        try:
            entry = self.made.enter(demand, self.now)
        except ServeError as error:
            if error.code == "queue_full":
                assert len(before) >= QUEUE or sum(one.body_bytes for one in before) + size > 4000
            else:
                assert not any(seat.serves(demand) for seat in self.made.seats())
            return
        self._entered(demand, entry)

    def _entered(self, demand: Demand, entry: Entered) -> None:
        for waiter in entry.shed:
            shed = self.waiting.pop(waiter)
            assert shed.class_ == demand.class_
            assert shed.tenant != demand.tenant, "a tenant pushed its own request out"
        if entry.seat is not None:
            self._hold(demand, entry.seat)
        else:
            self.waiting[demand.waiter] = demand
        self._granted(entry.grants)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.integers(0, 2000))
    def leave(self, data: st.DataObject, used: int) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.held)))
        demand, _ = self.held.pop(waiter)
        self.made.settle(demand.tenant, demand.class_, used - demand.prompt_tokens - 2 * demand.output_tokens)
        self._granted(self.made.leave(waiter, self.now))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.held)))
        self.prefilled.add(waiter)
        self._granted(self.made.first_token(waiter, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.made.withdraw(waiter)
        assert not self.made.withdraw(waiter)
        del self.waiting[waiter]

    @rule(name=st.sampled_from(NAMES), is_open=st.booleans())
    def breaker(self, name: str, is_open: bool) -> None:
        self._granted(self.made.set_breaker(name, self.now, is_open=is_open))

    @rule(seconds=st.floats(0.1, 12))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for waiter in self.made.expired(self.now):
            del self.waiting[waiter]
        self._granted(self.made.tick(self.now))

    @invariant()
    def every_waiter_is_in_one_place(self) -> None:
        assert self.made.queued == len(self.waiting) == sum(self.made.queued_by_class().values())
        for seat in self.made.seats():
            mine = [demand for demand, held in self.held.values() if held is seat]
            assert seat.in_flight == len(mine)
            assert seat.kv == sum(d.prompt_tokens + d.output_tokens for d in mine)
            unread = sum(d.prompt_tokens for d in mine if d.waiter not in self.prefilled)
            read = sum(d.prompt_tokens for d in mine if d.streamed and d.waiter not in self.prefilled)
            assert read <= seat.prefill <= unread

    @invariant()
    def never_above_a_cap(self) -> None:
        for seat in self.made.seats():
            mine = [demand for demand, held in self.held.values() if held is seat]
            ordinary = [demand for demand in mine if demand.class_ != EMERGENCY]
            below = (
                len(mine) <= seat.slots
                and len(ordinary) <= seat.ordinary_slots
                and (not seat.kv_limit or seat.kv <= seat.kv_limit or len(mine) == 1)
                and (not seat.prefill_limit or seat.prefill <= seat.prefill_limit or _one_alone(seat, mine))
            )
            if below:
                self.shrunk.discard(seat)
            assert below or seat in self.shrunk

    @invariant()
    def whoever_a_replica_is_held_for_waits(self) -> None:
        for seat in self.made.seats():
            assert seat.held_for is None or seat.held_for in self.waiting

    def teardown(self) -> None:
        """When nobody comes any more and everything ends, everybody who waits was served, and all counts are 0."""
        ready = [Replica(n, "unix:/e", ReplicaState.READY, ("m", "n"), 2, 9, "", KV, PREFILL) for n in (*NAMES, "e3")]
        self._granted(self.made.update(Fleet(2, tuple(ready)), self.now, 1.0))
        for name in NAMES:
            self._granted(self.made.set_breaker(name, self.now, is_open=False))
        while self.held:
            waiter = min(self.held)
            del self.held[waiter]
            self._granted(self.made.leave(waiter, self.now))
        assert not self.waiting
        assert (self.made.queued, self.made.in_flight) == (0, 0)
        assert all(seat.kv == seat.prefill == 0 and seat.held_for is None for seat in self.made.seats())


def _one_alone(seat: Seat, mine: list[Demand]) -> bool:
    """A prompt larger than the cap got in when no other was being read; none since."""
    return any(seat.prefill <= d.prompt_tokens and d.prompt_tokens > seat.ordinary_prefill for d in mine)


Machine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestAdmission = Machine.TestCase


# no shrinking: 400 arrivals take minutes to shrink, and say no more for it
@settings(max_examples=examples(40), deadline=None, phases=[Phase.generate])
@given(
    class_=st.sampled_from(CLASSES[1:]),
    prompt=st.sampled_from([10, 350, 900, 5000]),
    others=st.lists(
        st.tuples(st.sampled_from(CLASSES[1:]), st.integers(0, 400), st.sampled_from([10, 100, 390])),
        min_size=400,
        max_size=400,
    ),
    name=st.sampled_from(["affinity", "least_tokens", "round_robin"]),
)
def test_everyone_is_granted_within_a_bound(
    class_: str, prompt: int, others: list[tuple[str, int, int]], name: str
) -> None:
    """However many come after it, of whatever class, size and (endlessly new) tenant."""
    limits = ClassLimits(queue_requests=10_000, queue_bytes=1 << 30, queue_seconds=1e9)
    made = Admission(
        AdmissionOptions(
            classes=dict.fromkeys(CLASSES, limits), bypasses=3, bypass_seconds=1.0, ageing_seconds=1.0, burst_tokens=300
        ),
        routing=policy(name),
    )
    made.update(Fleet(1, tuple(Replica(n, "u", ReplicaState.READY, ("m",), 3, 1, "", KV, PREFILL) for n in "xy")), 0.0)
    held: list[Any] = []
    now = 0.0
    granted = 0
    for i in range(6):
        assert made.enter(Demand(waiter=i, model="m", tenant="first", prompt_tokens=50, output_tokens=5), now)
        held += [i] if made.queued == 0 else []
    for i in range(20):
        made.enter(Demand(waiter=("ahead", i), model="m", tenant=f"ahead-{i % 4}", prompt_tokens=50), now)
    target = Demand(waiter="target", model="m", tenant="target", class_=class_, prompt_tokens=prompt, output_tokens=10)
    assert made.enter(target, now).seat is None
    for i, (other, tenant, tokens) in enumerate(others):
        now += 0.2
        entry = made.enter(
            Demand(waiter=("later", i), model="m", tenant=f"t{tenant}", class_=other, prompt_tokens=tokens,
                   output_tokens=5, affinity=i), now)  # fmt: skip
        grants = list(entry.grants)
        if entry.seat is not None:
            held.append(("later", i))
        if held:
            grants += made.leave(held.pop(0), now)
        held += [grant.waiter for grant in grants]
        granted += len(grants)
        if "target" in held:
            break
    assert "target" in held, f"still waiting after {granted} grants"
    assert granted <= 40 * AGED_EVERY
