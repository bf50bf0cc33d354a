"""Slots and the queue: never over, never lost, first come first served."""

import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.admission import Admission, Grant, Seat


def fleet(*replicas: Replica) -> Fleet:
    return Fleet(1, replicas)


def replica(
    name: str = "e0",
    slots: int = 1,
    models: tuple[str, ...] = ("m",),
    state: ReplicaState = ReplicaState.READY,
    incarnation: int = 1,
) -> Replica:
    return Replica(name, f"unix:/{name}", state, models, slots, incarnation)


def admission(*replicas: Replica, queue: int = 4, seconds: float = 30, workers: int = 1) -> Admission:
    made = Admission(queue_requests=queue, queue_seconds=seconds, workers=workers)
    assert made.update(fleet(*replicas)) == []
    return made


def entered(made: Admission, waiter: Any, model: str = "m", now: float = 0.0, **more: Any) -> Seat:
    seat = made.enter(waiter, model, now, **more)
    assert seat is not None
    return seat


def refused(made: Admission, model: str = "m", **more: Any) -> ServeError:
    with pytest.raises(ServeError) as caught:
        made.enter("refused", model, 0.0, **more)
    return caught.value


def test_the_replica_with_the_least_outstanding_is_chosen() -> None:
    made = admission(replica("e0", 3), replica("e1", 3))
    assert [entered(made, i).replica.name for i in range(4)] == ["e0", "e1", "e0", "e1"]
    assert made.in_flight == 4


def test_a_full_fleet_queues_and_then_refuses() -> None:
    made = admission(replica(), queue=2)
    entered(made, "a")
    assert made.enter("b", "m", 0.0) is None
    assert made.enter("c", "m", 0.0) is None
    error = refused(made)
    assert (error.code, error.status) == ("queue_full", 503)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 60
    assert made.queued == 2


def test_first_come_first_served() -> None:
    made = admission(replica())
    seat = entered(made, "a")
    for name in "bcd":
        assert made.enter(name, "m", 0.0) is None
    order = []
    for _ in range(3):
        (grant,) = made.leave(seat, 1.0)
        seat = grant.seat
        order.append(grant.waiter)
    assert order == ["b", "c", "d"]


def test_nobody_overtakes_the_queue() -> None:
    made = admission(replica("e0", 1))
    seat = entered(made, "a")
    made.enter("b", "m", 0.0)
    (grant,) = made.leave(seat, 0.0)
    assert grant.waiter == "b"
    assert made.enter("late", "m", 0.0) is None


def test_a_queue_for_one_model_does_not_hold_up_another() -> None:
    made = admission(replica("e0", 1, ("m",)), replica("e1", 1, ("n",)))
    entered(made, "a", "m")
    assert made.enter("b", "m", 0.0) is None
    assert entered(made, "c", "n").replica.name == "e1"


@pytest.mark.parametrize("state", [s for s in ReplicaState if s not in (ReplicaState.READY, ReplicaState.BUSY)])
def test_replicas_that_are_not_ready_get_nothing(state: ReplicaState) -> None:
    error = refused(admission(replica(state=state)))
    assert (error.code, error.status) == ("no_ready_engine", 503)


def test_a_model_nobody_holds_and_a_replica_already_tried() -> None:
    made = admission(replica())
    assert refused(made, "other").code == "no_ready_engine"
    assert refused(made, excluded=frozenset({"e0"})).code == "no_ready_engine"


def test_a_new_replica_wakes_those_who_wait() -> None:
    made = admission(replica("e0", 1))
    entered(made, "a")
    made.enter("b", "m", 0.0)
    made.enter("c", "m", 0.0)
    grants = made.update(fleet(replica("e0", 1), replica("e1", 2)))
    assert [(grant.waiter, grant.seat.replica.name) for grant in grants] == [("b", "e1"), ("c", "e1")]
    assert made.queued == 0


def test_a_restarted_replica_starts_from_nothing_and_old_seats_still_go_back() -> None:
    made = admission(replica("e0", 1))
    old = entered(made, "a")
    made.enter("b", "m", 0.0)
    (grant,) = made.update(fleet(replica("e0", 1, incarnation=2)))
    assert grant.waiter == "b"
    assert made.leave(old, 0.0) == []
    assert made.in_flight == 1
    made.leave(grant.seat, 0.0)
    assert made.in_flight == 0


def test_a_slot_goes_back_once() -> None:
    made = admission(replica())
    seat = entered(made, "a")
    made.leave(seat, 0.0)
    with pytest.raises(AssertionError, match="twice"):
        made.leave(seat, 0.0)


def test_patience_ends_in_order() -> None:
    made = admission(replica(), seconds=10)
    entered(made, "a")
    made.enter("b", "m", 0.0)
    made.enter("c", "m", 5.0)
    assert made.expired(9.9) == []
    assert made.expired(10.0) == ["b"]
    assert made.expired(20.0) == ["c"]
    assert made.queued == 0


def test_who_leaves_is_gone() -> None:
    made = admission(replica())
    seat = entered(made, "a")
    made.enter("b", "m", 0.0)
    assert made.withdraw("b")
    assert not made.withdraw("b")
    assert made.leave(seat, 0.0) == []


def test_waiters_are_stranded_when_the_last_replica_for_them_goes() -> None:
    made = admission(replica("e0", 1, ("m",)), replica("e1", 1, ("n",)))
    entered(made, "a", "m")
    entered(made, "b", "n")
    made.enter("c", "m", 0.0)
    made.enter("d", "n", 0.0)
    made.update(fleet(replica("e1", 1, ("n",))))
    assert made.stranded() == ["c"]
    assert made.queued == 1


def test_a_waiter_that_may_not_go_back_to_the_only_replica_left_is_stranded() -> None:
    made = admission(replica("e0", 1), replica("e1", 1))
    for name in "ab":
        entered(made, name)
    assert made.enter("c", "m", 0.0, frozenset({"e0"})) is None
    made.update(fleet(replica("e0", 1)))
    assert made.stranded() == ["c"]


def test_workers_share_the_slots_and_none_is_left_without() -> None:
    made = admission(replica("e0", 9), replica("e1", 1), workers=4)
    assert [seat.slots for seat in made.seats()] == [2, 1]


def test_retry_after_follows_the_rate_at_which_slots_come_back() -> None:
    made = admission(replica("e0", 1), queue=100)
    seat = entered(made, "first")
    for i in range(40):
        made.enter(i, "m", 0.0)
    for step in range(20):  # ten a second
        (grant,) = made.leave(seat, 1.0 + step / 10)
        seat = grant.seat
    assert 1 <= made.retry_after(3.0) <= 6


def test_a_full_queue_costs_a_slots_return_next_to_nothing() -> None:
    def seconds(queue: int) -> float:
        made = admission(replica("e0", 1, ("m",)), replica("e1", 1, ("n",)), queue=100_000)
        seat = entered(made, "first")
        for i in range(queue):
            made.enter(i, "m", 0.0)
        began = time.perf_counter()
        for _ in range(100):
            (grant,) = made.leave(seat, 0.0)
            seat = grant.seat
        return time.perf_counter() - began

    # 200 times the queue, and each return of a slot no dearer than the noise of a busy machine
    assert min(seconds(20_000) for _ in range(3)) < 20 * max(seconds(100) for _ in range(3))


class Machine(RuleBasedStateMachine):
    """Everything callers may do, in any order, against the few things that must always hold."""

    NAMES = ("e0", "e1", "e2")

    def __init__(self) -> None:
        super().__init__()
        self.made = Admission(queue_requests=6, queue_seconds=10)
        self.now = 0.0
        self.next = 0
        self.held: list[tuple[int, Seat]] = []
        self.waiting: list[tuple[int, str, frozenset[str]]] = []
        self.entered_slots: dict[str, int] = {}
        self.over = set[int]()  # seats that shrank below what they hold: they may stay over, not grow

    def _take(self, grants: list[Grant]) -> None:
        for grant in grants:
            entry = next(w for w in self.waiting if w[0] == grant.waiter)
            earlier = self.waiting[: self.waiting.index(entry)]
            assert not any(w[1] in grant.seat.models and grant.seat.replica.name not in w[2] for w in earlier), (
                "somebody who came later got a slot that an earlier one could have used"
            )
            assert grant.seat.takes
            assert entry[1] in grant.seat.models
            assert grant.seat.replica.name not in entry[2]
            self.waiting.remove(entry)
            self.held.append((grant.waiter, grant.seat))

    @rule(
        states=st.lists(
            st.tuples(
                st.sampled_from(NAMES),
                st.sampled_from([ReplicaState.READY, ReplicaState.BUSY, ReplicaState.DRAINING]),
                st.sampled_from([("m",), ("n",), ("m", "n")]),
                st.integers(1, 3),
                st.integers(1, 2),
            ),
            max_size=3,
            unique_by=lambda row: row[0],
        )
    )
    def update(self, states: list[tuple[str, ReplicaState, tuple[str, ...], int, int]]) -> None:
        self._take(
            self.made.update(
                fleet(*(replica(name, slots, models, state, inc) for name, state, models, slots, inc in states))
            )
        )
        self.over = {id(seat) for seat in self.made.seats() if seat.in_flight > seat.slots}
        takes = [seat for seat in self.made.seats() if seat.takes]
        for waiter in self.made.stranded():
            entry = next(w for w in self.waiting if w[0] == waiter)
            assert not any(entry[1] in s.models and s.replica.name not in entry[2] for s in takes)
            self.waiting.remove(entry)
        for _, model, excluded in self.waiting:
            assert any(model in s.models and s.replica.name not in excluded for s in takes), (
                "left in the queue for ever"
            )

    @rule(model=st.sampled_from(["m", "n"]), excluded=st.frozensets(st.sampled_from(NAMES), max_size=2))
    def enter(self, model: str, excluded: frozenset[str]) -> None:
        self.next += 1
        try:
            seat = self.made.enter(self.next, model, self.now, excluded)
        except ServeError as error:
            full = error.code == "queue_full" and len(self.waiting) == 6
            if not full and error.code != "no_ready_engine":
                raise
            return
        if seat is None:
            self.waiting.append((self.next, model, excluded))
        else:
            assert seat.takes
            assert model in seat.models
            assert seat.replica.name not in excluded
            self.held.append((self.next, seat))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        _, seat = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self._take(self.made.leave(seat, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting))
        assert self.made.withdraw(entry[0])
        self.waiting.remove(entry)

    @rule(seconds=st.floats(0.1, 12))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        late = set(self.made.expired(self.now))
        self.waiting = [w for w in self.waiting if w[0] not in late]

    @invariant()
    def counts_agree(self) -> None:
        assert self.made.queued == len(self.waiting)
        for seat in self.made.seats():
            assert seat.in_flight == sum(held is seat for _, held in self.held)

    @invariant()
    def never_over_the_slots(self) -> None:
        for seat in self.made.seats():
            if seat.in_flight <= seat.slots:
                self.over.discard(id(seat))
            assert seat.in_flight <= seat.slots or id(seat) in self.over

    @invariant()
    def no_slot_lies_idle_while_somebody_waits_for_it(self) -> None:
        for _, model, excluded in self.waiting:
            assert not any(
                seat.takes
                and model in seat.models
                and seat.in_flight < seat.slots
                and seat.replica.name not in excluded
                for seat in self.made.seats()
            )


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestAdmission = Machine.TestCase
