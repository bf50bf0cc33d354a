"""Caps, classes, tenants, bounds: who gets a seat, who waits, who is told to come back and when."""

import time
from typing import Any

import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.admission import Admission, AdmissionOptions, ClassLimits, Grant
from vitalis_serve.gateway.routing import policy
from vitalis_serve.gateway.seats import CLASSES, Demand, Seat


def replica(
    name: str = "e0",
    slots: int = 1,
    models: tuple[str, ...] = ("m",),
    state: ReplicaState = ReplicaState.READY,
    incarnation: int = 1,
    kv: int = 0,
    prefill: int = 1_000_000,
) -> Replica:
    return Replica(name, f"unix:/{name}", state, models, slots, incarnation, "", kv, prefill)


def fleet(*replicas: Replica) -> Fleet:
    return Fleet(1, replicas)


def admission(
    *replicas: Replica,
    queue: int = 4,
    seconds: float = 30,
    size: int = 1 << 20,
    overload: float = 0,
    share: float = 1.0,
    **more: Any,
) -> Admission:
    limits = ClassLimits(queue, size, seconds, overload, 2.0)
    options = AdmissionOptions(**{"classes": dict.fromkeys(CLASSES, limits), "reserved": 0.0, "headroom": 0.0, **more})
    made = Admission(options, routing=policy("round_robin"), share=share)
    assert made.update(fleet(*replicas), 0.0) == []
    return made


def ask(waiter: Any, model: str = "m", **more: Any) -> Demand:
    return Demand(**{"waiter": waiter, "model": model, "prompt_tokens": 10, "output_tokens": 10, **more})


def entered(made: Admission, waiter: Any, now: float = 0.0, **more: Any) -> Seat:
    entry = made.enter(ask(waiter, **more), now)
    assert entry.seat is not None
    return entry.seat


def queued(made: Admission, *waiters: Any, now: float = 0.0, **more: Any) -> None:
    for waiter in waiters:
        entry = made.enter(ask(waiter, **more), now)
        assert entry.seat is None
        assert (entry.grants, entry.shed) == ((), ())


def refused(made: Admission, **more: Any) -> ServeError:
    with pytest.raises(ServeError) as caught:
        made.enter(ask("refused", **more), 0.0)
    return caught.value


def names(grants: list[Grant]) -> list[Any]:
    return [grant.waiter for grant in grants]


def served(made: Admission, first: Any, count: int, now: float = 1.0) -> list[Any]:
    """The order in which a single slot goes on."""
    order = []
    for _ in range(count):
        (grant,) = made.leave(first, now)
        first = grant.waiter
        order.append(first)
    return order


# -- seats


def test_a_full_fleet_queues_and_then_refuses() -> None:
    made = admission(replica(), queue=2)
    entered(made, "a")
    queued(made, "b", "c")
    error = refused(made)
    assert (error.code, error.status) == ("queue_full", 503)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 60
    assert (made.queued, made.in_flight) == (2, 1)


def test_first_come_first_served_within_a_tenant() -> None:
    made = admission(replica())
    entered(made, "a")
    queued(made, "b", "c", "d")
    assert served(made, "a", 3) == ["b", "c", "d"]


def test_nobody_overtakes_the_queue() -> None:
    made = admission(replica("e0", 1))
    entered(made, "a")
    queued(made, "b")
    assert names(made.leave("a", 0.0)) == ["b"]
    queued(made, "late")


def test_a_queue_for_one_model_does_not_hold_up_another() -> None:
    made = admission(replica("e0", 1, ("m",)), replica("e1", 1, ("n",)), queue=50)
    entered(made, "a", model="m")
    queued(made, *range(40), model="m")
    assert entered(made, "c", model="n").replica.name == "e1"


@pytest.mark.parametrize("state", [s for s in ReplicaState if s not in (ReplicaState.READY, ReplicaState.BUSY)])
def test_replicas_that_are_not_ready_get_nothing(state: ReplicaState) -> None:
    error = refused(admission(replica(state=state)))
    assert (error.code, error.status) == ("no_ready_engine", 503)


def test_a_model_nobody_holds_and_a_replica_already_tried() -> None:
    made = admission(replica())
    assert refused(made, model="other").code == "no_ready_engine"
    assert refused(made, excluded=frozenset({"e0"})).code == "no_ready_engine"


def test_a_new_replica_wakes_those_who_wait() -> None:
    made = admission(replica("e0", 1))
    entered(made, "a")
    queued(made, "b", "c")
    grants = made.update(fleet(replica("e0", 1), replica("e1", 2)), 0.0)
    assert [(grant.waiter, grant.seat.replica.name) for grant in grants] == [("b", "e1"), ("c", "e1")]
    assert made.queued == 0


def test_a_restarted_replica_starts_from_nothing_and_old_seats_still_go_back() -> None:
    made = admission(replica("e0", 1))
    entered(made, "a")
    queued(made, "b")
    (grant,) = made.update(fleet(replica("e0", 1, incarnation=2)), 0.0)
    assert grant.waiter == "b"
    assert made.first_token("a", 0.0) == []
    assert made.leave("a", 0.0) == []
    assert made.in_flight == 1
    made.leave("b", 0.0)
    assert made.in_flight == 0


def test_a_slot_goes_back_once() -> None:
    made = admission(replica())
    entered(made, "a")
    made.leave("a", 0.0)
    with pytest.raises(AssertionError, match="twice"):
        made.leave("a", 0.0)


def test_an_open_breaker_keeps_requests_away_until_it_closes() -> None:
    made = admission(replica("e0", 2))
    made.set_breaker("e0", 0.0, is_open=True)
    queued(made, "a")
    assert names(made.set_breaker("e0", 0.0, is_open=False)) == ["a"]
    assert made.set_breaker("unknown", 0.0, is_open=False) == []


# -- leaving the queue


def test_patience_and_deadlines_end_in_order() -> None:
    made = admission(replica(), seconds=10)
    entered(made, "a")
    queued(made, "b")
    queued(made, "c", now=5.0)
    queued(made, "d", now=5.0, deadline=7.0)
    assert made.expired(6.9) == []
    assert made.expired(9.9) == ["d"]
    assert made.expired(10.0) == ["b"]
    assert made.expired(20.0) == ["c"]
    assert made.queued == 0


def test_a_lasting_overload_is_refused_early_and_a_burst_is_waited_out() -> None:
    made = admission(replica(), overload=1.0)
    entered(made, "a")
    queued(made, "b")
    assert made.expired(1.9) == []  # the queue has not stood for 2 s yet
    queued(made, "c", now=1.9)
    assert made.expired(2.0) == ["b"]
    assert made.expired(2.9) == ["c"]


def test_who_leaves_is_gone() -> None:
    made = admission(replica())
    entered(made, "a")
    queued(made, "b")
    assert made.withdraw("b")
    assert not made.withdraw("b")
    assert made.leave("a", 0.0) == []


def test_waiters_are_stranded_when_the_last_replica_for_them_goes() -> None:
    made = admission(replica("e0", 1), replica("e1", 1, ("n", "m")))
    entered(made, "a")
    entered(made, "b", model="n")
    queued(made, "c", excluded=frozenset({"e1"}))
    queued(made, "d", model="n")
    made.update(fleet(replica("e1", 1, ("n", "m"))), 0.0)
    assert made.stranded() == ["c"]
    assert made.queued == 1


def test_what_another_admission_granted_is_taken_over_and_given_back() -> None:
    made = admission(replica("e0", 1, incarnation=3), queue=10)
    assert made.adopt(ask("old"), "e0", 2, 0.0) is None
    assert made.adopt(ask("gone"), "e1", 1, 0.0) is None
    for waiter in ("a", "b"):  # room or not
        assert made.adopt(ask(waiter), "e0", 3, 0.0) is not None
    queued(made, "c")
    assert (made.in_flight, made.leave("a", 1.0)) == (2, [])
    assert names(made.leave("b", 1.0)) == ["c"]


def test_nobody_is_granted_before_it_is_open() -> None:
    made = Admission(AdmissionOptions(), is_open=False)
    made.update(fleet(replica(slots=4)), 0.0)
    queued(made, "a")
    assert made.adopt(ask("held"), "e0", 1, 0.0) is not None
    assert made.tick(0.1) == []
    assert names(made.open(0.2)) == ["a"]
    assert (made.in_flight, made.queued) == (2, 0)


def test_each_answer_asked_for_takes_a_slot() -> None:
    made = admission(replica(slots=4), queue=10)
    entered(made, "a", sequences=3)
    queued(made, "b", sequences=2)
    entered(made, "c")
    assert made.in_flight == 4
    assert made.leave("c", 1.0) == []
    assert names(made.leave("a", 2.0)) == ["b"]
    assert made.in_flight == 2


def test_who_asks_for_more_answers_than_there_are_slots_gets_in_alone() -> None:
    made = admission(replica(slots=4), queue=10)
    entered(made, "a")
    queued(made, "b", sequences=9)
    assert names(made.leave("a", 1.0)) == ["b"]
    queued(made, "c")
    assert names(made.leave("b", 2.0)) == ["c"]
    assert made.in_flight == 1


def test_while_an_engine_starts_its_requests_may_wait_for_it() -> None:
    starting, ready = replica(state=ReplicaState.STARTING, slots=2), replica(slots=2)
    made = admission(starting, cold_start_seconds=60, overload=1)
    queued(made, "a", "b")
    assert refused(made, model="another").code == "no_ready_engine"
    assert refused(made, excluded=frozenset({"e0"})).code == "no_ready_engine"
    assert (made.stranded(), made.expired(59.9)) == ([], [])
    assert names(made.update(fleet(ready), 59.9)) == ["a", "b"]
    made = admission(starting, cold_start_seconds=60)
    queued(made, "a")
    assert made.expired(60.0) == ["a"]
    queued(made, "b", now=60.0)
    made.update(fleet(replica(state=ReplicaState.FAILED)), 61.0)
    assert made.stranded() == ["b"]
    assert refused(admission(starting)).code == "no_ready_engine"


def test_gateways_share_the_caps_and_none_is_left_without() -> None:
    made = admission(replica("e0", 9, kv=1000, prefill=100), replica("e1", 1), share=0.25)
    assert [(seat.slots, seat.kv_limit, seat.prefill_limit) for seat in made.seats()][0] == (2, 250, 25)
    assert [seat.slots for seat in made.seats()] == [2, 1]
    made.update(fleet(replica("e0", 9)), 0.0, share=1.0)
    assert [seat.slots for seat in made.seats()] == [9]


# -- the caps


def test_kv_room_is_a_cap() -> None:
    made = admission(replica(slots=8, kv=1000))
    entered(made, "a", prompt_tokens=600, output_tokens=300)
    queued(made, "b", prompt_tokens=100, output_tokens=50)
    assert names(made.leave("a", 0.0)) == ["b"]


def test_prefill_room_comes_back_with_the_first_token() -> None:
    made = admission(replica(slots=8, prefill=1000))
    entered(made, "a", prompt_tokens=800)
    queued(made, "b", prompt_tokens=800)
    assert names(made.first_token("a", 0.1)) == ["b"]
    assert made.first_token("a", 0.2) == []  # once
    assert made.leave("a", 0.3) == []
    assert next(made.seats()).prefill == 800


def test_prefill_of_an_answer_that_is_not_streamed_is_over_after_its_time() -> None:
    made = admission(replica(slots=8, prefill=1000), prefill_tokens_per_second=1000)
    entered(made, "a", prompt_tokens=800, streamed=False)
    queued(made, "b", prompt_tokens=800)
    assert made.tick(1.1) == []
    assert names(made.tick(1.3)) == ["b"]
    made.leave("a", 2.0)
    assert next(made.seats()).prefill == 800


def test_a_replica_rests_from_a_tenants_long_prompts_where_others_ask_too() -> None:
    made = admission(replica(slots=8, prefill=1000))
    entered(made, "long", tenant="a", prompt_tokens=2000)
    queued(made, "small", tenant="b", prompt_tokens=100)
    assert names(made.first_token("long", 0.4)) == ["small"]
    made.first_token("small", 0.45)
    queued(made, "next", now=0.5, tenant="a", prompt_tokens=2000)
    entered(made, "another's", now=0.5, tenant="b", prompt_tokens=100)
    made.first_token("another's", 0.55)
    assert names(made.tick(0.7)) == []
    assert names(made.tick(0.8)) == ["next"]


def test_nothing_is_held_for_a_long_prompt_that_has_to_wait_for_a_rest() -> None:
    made = admission(replica(slots=8, prefill=1000), bypasses=1)
    entered(made, "much", tenant="b", output_tokens=100_000)  # so that "next" comes before all of b's
    made.first_token("much", 0.0)
    entered(made, "long", tenant="a", prompt_tokens=2000)
    queued(made, "next", tenant="a", prompt_tokens=2000)
    for number in range(3):
        queued(made, f"small {number}", tenant="b", prompt_tokens=400)
    assert names(made.first_token("long", 0.4)) == ["small 0", "small 1"]
    assert names(made.first_token("small 0", 0.45)) == ["small 2"]
    for waiter in ("small 1", "small 2"):
        assert made.first_token(waiter, 0.5) == []
    entered(made, "small 3", now=0.6, tenant="b", prompt_tokens=400)
    made.first_token("small 3", 0.65)
    assert names(made.tick(0.8)) == ["next"]


def test_a_tenant_alone_may_send_long_prompts_one_after_the_other() -> None:
    made = admission(replica(slots=8, prefill=1000))
    entered(made, "one", tenant="a", prompt_tokens=2000)
    made.first_token("one", 0.4)
    entered(made, "two", now=0.41, tenant="a", prompt_tokens=2000)


def test_tenants_take_turns_with_long_prompts_without_a_rest() -> None:
    made = admission(replica(slots=8, prefill=1000))
    entered(made, "one", tenant="a", prompt_tokens=2000)
    queued(made, "two", tenant="b", prompt_tokens=2000)
    assert names(made.first_token("one", 0.4)) == ["two"]


def test_the_prefill_cap_follows_the_measured_rate() -> None:
    made = admission(replica(slots=8, prefill=0), prefill_seconds=0.5, prefill_tokens_per_second=10_000)
    (seat,) = made.seats()
    assert seat.prefill_limit == 5000
    now = 0.0
    for turn in range(40):
        entered(made, turn, now=now, prompt_tokens=8000)
        now += 0.4  # 20,000 tokens a second
        made.first_token(turn, now)
        made.leave(turn, now)
        now += 5.0  # idle time says nothing
    assert 9_500 < seat.prefill_limit < 10_500


def test_small_requests_pass_a_large_one_but_not_for_ever() -> None:
    made = admission(replica(slots=8, kv=1000), queue=100, bypasses=5, bypass_seconds=1e9)
    for small in range(5):
        entered(made, small, prompt_tokens=150, output_tokens=10)
    queued(made, "large", tenant="L", prompt_tokens=900)
    waiting = list(range(5, 40))
    for small in waiting[:2]:
        entered(made, small, now=0.0, prompt_tokens=50, output_tokens=10)
    queued(made, *waiting[2:], prompt_tokens=150, output_tokens=10)
    order: list[Any] = []
    held = list(range(7))
    while "large" not in order:
        grants = made.leave(held.pop(0), 1.0)
        order += names(grants)
        held += names(grants)
    assert 3 <= order.index("large") <= 8
    assert made.in_flight == 1  # it needed nearly everything


def test_small_requests_pass_a_large_one_until_its_time_has_come() -> None:
    made = admission(replica(slots=8, prefill=1000), bypasses=1000, bypass_seconds=1.0)
    entered(made, "a", prompt_tokens=500)
    queued(made, "large", prompt_tokens=995)
    assert made.enter(ask("small", prompt_tokens=10), 0.0).seat is not None
    assert made.enter(ask("later", prompt_tokens=10), 1.1).seat is not None
    queued(made, "too late", now=1.2, prompt_tokens=10)
    assert [*made.first_token("a", 1.3), *made.first_token("small", 1.3)] == []
    assert names(made.first_token("later", 1.4)) == ["large"]


def test_what_is_larger_than_a_cap_still_runs() -> None:
    made = admission(replica(slots=8, kv=1000, prefill=500))
    entered(made, "a")
    queued(made, "huge", prompt_tokens=5000)
    assert names(made.leave("a", 0.0)) == ["huge"]


# -- classes


def test_classes_come_in_strict_order() -> None:
    made = admission(replica(), queue=10)
    entered(made, "a")
    for name in ("batch", "standard", "interactive", "emergency"):
        queued(made, name, class_=name)
    assert served(made, "a", 4) == ["emergency", "interactive", "standard", "batch"]


def test_emergency_has_slots_of_its_own() -> None:
    made = admission(replica("e0", 10), reserved=0.1, queue=20)
    for i in range(9):
        entered(made, i)
    queued(made, "ordinary")
    entered(made, "sos", class_="emergency")
    queued(made, "sos 2", class_="emergency")
    assert names(made.leave("sos", 0.0)) == ["sos 2"]
    assert made.leave("sos 2", 0.0) == []
    assert names(made.leave(0, 0.0)) == ["ordinary"]


@pytest.mark.parametrize(("slots", "ordinary"), [(1, 1), (2, 1), (10, 9), (64, 58)])
def test_the_reserve_is_a_share_at_least_one_and_never_everything(slots: int, ordinary: int) -> None:
    (seat,) = admission(replica("e0", slots), reserved=0.1).seats()
    assert seat.ordinary_slots == ordinary


def test_who_has_waited_long_is_served_whatever_its_tenant_owes() -> None:
    made = admission(replica(), queue=200, seconds=1e9, ageing_seconds=10)
    entered(made, "a")
    queued(made, "old", tenant="debtor")
    made.settle("debtor", "standard", 1_000_000)
    queued(made, *range(40), tenant="other")
    assert served(made, "a", 16, now=9.0) == list(range(16))
    assert "old" in served(made, 15, 8, now=11.0)


def test_a_lower_class_gets_one_grant_in_eight_once_it_has_waited_long() -> None:
    made = admission(replica(), queue=200, seconds=1e9, ageing_seconds=10)
    entered(made, "a")
    queued(made, "batch 1", "batch 2", class_="batch")
    queued(made, *range(40), class_="interactive", now=15.0)
    early = served(made, "a", 16, now=19.0)
    assert early == list(range(16))
    late = served(made, early[-1], 17, now=21.0)
    assert {"batch 1", "batch 2"} <= set(late)
    assert abs(late.index("batch 1") - late.index("batch 2")) == 8


# -- tenants


def test_tenants_take_turns_by_tokens_and_output_weighs_double() -> None:
    made = admission(replica(), queue=500, burst_tokens=0)
    entered(made, "a", tenant="x")
    for i in range(60):
        queued(made, ("long", i), tenant="long", prompt_tokens=100, output_tokens=250)
        queued(made, ("short", i), tenant="short", prompt_tokens=200, output_tokens=0)
    order = served(made, "a", 40)
    assert sum(name == "long" for name, _ in order) == pytest.approx(10, abs=1)


def test_weights_give_shares() -> None:
    made = admission(replica(), queue=500, burst_tokens=0)
    entered(made, "a", tenant="x")
    for i in range(100):
        queued(made, ("one", i), tenant="one")
        queued(made, ("three", i), tenant="three", weight=3.0)
    assert sum(name == "three" for name, _ in served(made, "a", 80)) == pytest.approx(60, abs=2)


def test_a_newly_active_tenant_comes_soon_but_cannot_make_up_for_all_its_absence() -> None:
    made = admission(replica(), queue=500, burst_tokens=100)
    entered(made, "a", tenant="old")
    queued(made, *(("old", i) for i in range(200)), tenant="old")
    order = served(made, "a", 100)
    queued(made, *(("new", i) for i in range(60)), tenant="new")
    later = [name for name, _ in served(made, order[-1], 40)]
    assert later[0] == "new"
    assert later[:6].count("new") <= 5  # 100 tokens ahead are three or four requests of 30
    assert later.count("new") == pytest.approx(22, abs=3)


def test_tenants_that_are_ever_new_do_not_starve_one_with_debts() -> None:
    made = admission(replica(), queue=500, burst_tokens=0)
    entered(made, "a", tenant="x")
    queued(made, "debtor 1", "debtor 2", tenant="debtor")
    assert served(made, "a", 1) == ["debtor 1"]
    made.settle("debtor", "standard", 300)
    order: list[Any] = ["debtor 1"]
    queued(made, "new", tenant="new")
    for i in range(200):
        queued(made, i, tenant=f"new-{i}")
        order += served(made, order[-1], 1)
    assert order.index("debtor 2") < 50


def test_settling_corrects_what_was_charged() -> None:
    made = admission(replica(), queue=500, burst_tokens=0)
    entered(made, "a", tenant="x")
    for i in range(40):
        queued(made, ("liar", i), tenant="liar", output_tokens=10)
        queued(made, ("honest", i), tenant="honest", output_tokens=10)
    waiter: Any = "a"
    counts = {"liar": 0, "honest": 0}
    for _ in range(40):
        (grant,) = made.leave(waiter, 1.0)
        waiter = grant.waiter
        counts[waiter[0]] += 1
        if waiter[0] == "liar":
            made.settle("liar", "standard", 60)
    assert counts["honest"] == pytest.approx(3 * counts["liar"], abs=4)
    made.settle("never seen", "standard", 60)


def test_a_full_queue_sheds_the_newest_of_whoever_has_most() -> None:
    made = admission(replica(), queue=4)
    entered(made, "a", tenant="flood")
    queued(made, 1, 2, 3, 4, tenant="flood")
    assert refused(made, tenant="flood").code == "queue_full"
    assert made.enter(ask("v1", tenant="victim"), 0.0).shed == (4,)
    assert made.enter(ask("v2", tenant="victim"), 0.0).shed == (3,)
    assert refused(made, tenant="victim").code == "queue_full"  # nobody has more than it would have
    assert made.enter(ask("w1", tenant="third"), 0.0).shed in ((2,), ("v2",))
    assert made.queued == 4


def test_the_queue_is_bounded_by_bytes_too() -> None:
    made = admission(replica(), queue=100, size=1000)
    entered(made, "a")
    queued(made, 1, 2, tenant="flood", body_bytes=450)
    entry = made.enter(ask("v", tenant="victim", body_bytes=300), 0.0)
    assert entry.shed == (2,)
    assert refused(made, tenant="other", body_bytes=2000).code == "queue_full"


def test_classes_have_queues_of_their_own() -> None:
    made = admission(replica(), queue=2)
    entered(made, "a")
    queued(made, 1, 2, class_="batch")
    assert refused(made, class_="batch").code == "queue_full"
    queued(made, 3, class_="interactive")
    assert made.queued_by_class() == {"emergency": 0, "interactive": 1, "standard": 0, "batch": 2}


def test_one_tenant_leaves_headroom_for_another_that_was_here_lately() -> None:
    made = admission(replica("e0", 10), headroom=0.2, queue=50, burst_tokens=0)
    for i in range(10):
        entered(made, i, tenant="flood")  # alone, it may have everything
    queued(made, *range(10, 30), tenant="flood")
    queued(made, "v", tenant="victim")
    assert names(made.leave(0, 1.0)) == ["v"]
    made.leave("v", 1.0)
    made.leave(1, 1.0)
    assert made.in_flight == 8
    entered(made, "v2", now=2.0, tenant="victim")
    made.leave("v2", 2.0)
    made.tick(20.0)  # the victim has not asked for anything for long
    assert made.in_flight == 10


# -- when to come back


def test_retry_after_follows_the_rate_at_which_slots_come_back() -> None:
    made = admission(replica("e0", 1), queue=100)
    entered(made, "first")
    queued(made, *range(60))
    waiter: Any = "first"
    for step in range(40):  # ten a second
        (grant,) = made.leave(waiter, 1.0 + step / 10)
        waiter = grant.waiter
    assert 1 <= made.retry_after(ask("x"), 5.0) <= 3
    assert made.retry_after(ask("x", class_="emergency"), 5.0) == 1.0


def test_those_who_are_sent_away_get_turns_of_their_own() -> None:
    made = admission(replica("e0", 1), queue=100)
    entered(made, "first")
    queued(made, *range(60))
    waiter: Any = "first"
    for step in range(40):
        (grant,) = made.leave(waiter, 1.0 + step / 10)
        waiter = grant.waiter
    turns = [made.retry_after(ask("x"), 5.0) for _ in range(400)]
    assert turns == sorted(turns)
    assert turns[20] - turns[10] == pytest.approx(10 / 3.5, rel=0.2)  # a third of ten a second
    assert max(turns) == 60.0
    assert 45.0 <= made.retry_after(ask("x"), 5.0, jitter=1.0) < 46.0


def _standing(**first: Any) -> tuple[Admission, float]:
    """An overload that has lasted long enough, and what the first one sent away was told."""
    made = admission(replica("e0", 1), queue=100, overload=1)
    entered(made, 0)
    for step in range(40):  # ten a second
        queued(made, step + 1, now=step / 10)
        made.leave(step, (step + 1) / 10)
    queued(made, "returning", now=4.0, **first)
    queued(made, "other", now=5.5)
    assert made.expired(6.0) == ["returning"]
    return made, 6.0 + made.retry_after(ask("returning", **first), 6.0)


def test_who_comes_back_when_told_is_waited_for_longer() -> None:
    made, turn = _standing(body_bytes=7)
    made.withdraw("other")
    queued(made, "kept", now=turn - 2.5)  # the queue stands again
    queued(made, "returning", now=turn - 0.5, body_bytes=7)
    queued(made, "new", now=turn - 0.5, body_bytes=8)
    queued(made, "twice", now=turn - 0.4, body_bytes=7)  # one turn is for one
    assert made.expired(turn + 1.0) == ["kept", "new", "twice"]
    assert made.expired(turn + 2.4) == []
    assert made.expired(turn + 2.5) == ["returning"]


@pytest.mark.parametrize("too", [-1.5, 10.5], ids=["early", "late"])
def test_who_comes_at_another_time_than_told_has_no_turn(too: float) -> None:
    made, turn = _standing()
    queued(made, "returning", now=turn + too)
    assert "returning" in made.expired(turn + too + 2.0)


def test_a_full_queue_costs_a_slots_return_next_to_nothing() -> None:
    def seconds(queue: int) -> float:
        made = admission(replica("e0", 1, ("m",)), replica("e1", 1, ("n",)), queue=100_000)
        entered(made, "first")
        for i in range(queue):
            made.enter(ask(i, tenant=f"t{i % 1000}"), 0.0)
        began = time.perf_counter()
        served(made, "first", 90, now=0.0)
        return time.perf_counter() - began

    # 200 times the queue, and each return of a slot no dearer than the noise of a busy machine
    assert min(seconds(20_000) for _ in range(3)) < 20 * max(seconds(100) for _ in range(3))


@pytest.mark.parametrize("class_", ["standard", "emergency"])
def test_a_queue_full_of_others_who_wait_elsewhere_is_in_nobodys_way(class_: str) -> None:
    made = admission(replica("e0", 1, ("m",)), replica("e1", 1, ("n",)), queue=2)
    entered(made, "first", class_=class_)
    queued(made, 1, 2, class_=class_)
    assert entered(made, "other", model="n", class_=class_).replica.name == "e1"
    with pytest.raises(ServeError) as refused:
        made.enter(ask("late", model="n", class_=class_), 0.0)
    assert refused.value.code == "queue_full"


def test_a_quiet_tenant_whose_turn_is_next_is_not_sent_away_for_a_queue_that_another_fills() -> None:
    made = admission(replica(), overload=1.0, queue=8)
    entered(made, "running", tenant="noisy")
    for number in range(4):
        queued(made, f"noisy-{number}", tenant="noisy")
    queued(made, "quiet-0", now=1.0, tenant="quiet")
    queued(made, "quiet-1", now=1.0, tenant="quiet")
    assert made.expired(2.5) == ["noisy-0", "noisy-1", "noisy-2", "noisy-3", "quiet-1"]
    assert made.expired(20.0) == [], "nor later, when nobody else waits"
    assert names(made.leave("running", 25.0)) == ["quiet-0"]
    # who has its share under way waits no longer than others
    queued(made, "quiet-2", now=26.0, tenant="quiet")
    assert made.expired(29.0) == ["quiet-2"]


def test_a_quiet_tenant_waits_no_longer_than_its_class_does() -> None:
    made = admission(replica(), overload=1.0)
    entered(made, "running", tenant="noisy")
    queued(made, "quiet", tenant="quiet")
    assert made.expired(29.0) == []
    assert made.expired(30.0) == ["quiet"]
