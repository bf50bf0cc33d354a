"""Where requests go: home while there is room, evenly, the same for all gateways, and able to say why."""

from collections import Counter

import pytest
from vitalis_serve.fleet import Replica, ReplicaState
from vitalis_serve.gateway.routing import Decision, Policy, affinity_key, explain, policy
from vitalis_serve.gateway.seats import Demand, Seat

from tests.support.worker import SESSION

ALL = ("affinity", "least_tokens", "round_robin", "session")


def seat(name: str, **more: object) -> Seat:
    made = Seat(
        Replica(name, f"unix:/{name}", ReplicaState.READY),
        slots=4, ordinary_slots=3, common_slots=2, kv_limit=10_000, ordinary_kv=9_000,
        prefill_limit=5_000, ordinary_prefill=4_500, takes=True, models=frozenset({"m"}),
    )  # fmt: skip
    for field, value in more.items():
        setattr(made, field, value)
    return made


def seats(count: int) -> list[Seat]:
    return [seat(f"engine-{i}") for i in range(count)]


def ask(key: int = 0, **more: object) -> Demand:
    return Demand(waiter=1, model="m", affinity=key, prompt_tokens=100, output_tokens=50, **more)  # type: ignore[arg-type]


def made(name: str, among: list[Seat], seed: int = 0) -> Policy:
    chosen_by = policy(name, seed)
    chosen_by.update(among)
    return chosen_by


def chosen(by: Policy, demand: Demand) -> Decision:
    decision = by.choose(demand)
    assert decision is not None
    return decision


def keys(count: int) -> list[int]:
    return [affinity_key(b"tenant", b"%d" % i) for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 16])
def test_homes_are_even(count: int) -> None:
    by = made("affinity", seats(count))
    homes = Counter(chosen(by, ask(key)).replica for key in keys(20_000))
    assert len(homes) == count
    assert max(homes.values()) / min(homes.values()) < 1.35


def test_gateways_agree_whatever_the_order_in_which_they_learnt_of_replicas() -> None:
    one, other = made("affinity", seats(5), 1), made("affinity", seats(5)[::-1], 2)
    assert [chosen(one, ask(k)).replica for k in keys(200)] == [chosen(other, ask(k)).replica for k in keys(200)]


def test_only_the_keys_of_a_replica_that_went_move() -> None:
    five, four = made("affinity", seats(5)), made("affinity", seats(4))
    before = {k: chosen(five, ask(k)).replica for k in keys(2000)}
    after = {k: chosen(four, ask(k)).replica for k in keys(2000)}
    assert all(after[k] == home for k, home in before.items() if home != "engine-4")
    assert len({after[k] for k, home in before.items() if home == "engine-4"}) == 4


def test_a_diversion_goes_to_the_next_in_order_and_moves_nothing() -> None:
    among = seats(4)
    by = made("affinity", among)
    home, second = (one for one, _ in by.ranking(ask(7))[:2])
    assert chosen(by, ask(7)).reason == "home"
    home.in_flight = 3
    decision = chosen(by, ask(7))
    assert (decision.seat, decision.reason) == (second, f"diverted from {home.replica.name}: no free slot")
    assert decision.passed == ((home.replica.name, "no free slot"),)
    home.in_flight = 2
    assert chosen(by, ask(7)).seat is home


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("in_flight", 3, "no free slot"),
        ("kv", 8_851, "no KV room"),
        ("prefill", 4_401, "no prefill room"),
        ("takes", False, "takes no requests"),
        ("open", False, "circuit breaker open"),
        ("models", frozenset({"n"}), "does not hold the model"),
        ("held_for", "another", "held for another"),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_what_keeps_a_request_away(name: str, field: str, value: object, why: str) -> None:
    among = seats(2)
    setattr(among[0], field, value)
    by = made(name, among)
    assert {chosen(by, ask(key)).replica for key in keys(20)} == {"engine-1"}
    lines = {line.replica: line.lacks for line in explain(by, ask()).ranking}
    assert lines == {"engine-0": why, "engine-1": ""}
    setattr(among[1], field, value)
    assert by.choose(ask()) is None
    assert explain(by, ask()).chosen is None


@pytest.mark.parametrize("name", ALL)
def test_an_excluded_replica_is_left_out(name: str) -> None:
    by = made(name, seats(2))
    for key in keys(20):
        assert chosen(by, ask(key, excluded=frozenset({"engine-0"}))).replica == "engine-1"


def test_emergency_uses_what_is_reserved() -> None:
    by = made("affinity", [seat("engine-0", in_flight=3, kv=9_000, prefill=4_500, held_for="another")])
    assert by.choose(ask()) is None
    assert chosen(by, ask(class_="emergency")).replica == "engine-0"


def test_a_tenant_with_more_than_its_share_leaves_headroom() -> None:
    by = made("affinity", [seat("engine-0", in_flight=2)])
    assert by.choose(ask(), True) is None
    assert by.choose(ask(), False) is not None


def test_what_is_larger_than_a_cap_gets_in_alone() -> None:
    only = seat("engine-0")
    large = Demand(waiter=1, model="m", prompt_tokens=20_000, output_tokens=10)
    assert only.lacks(large) == ""
    only.prefill = only.kv = 1
    assert only.lacks(large) == "no prefill room"


def test_session_keeps_a_session_together_and_falls_back_to_affinity() -> None:
    by, plain = made("session", seats(8)), made("affinity", seats(8))
    assert len({chosen(by, ask(key, session=99)).replica for key in keys(50)}) == 1
    assert [chosen(by, ask(k)).replica for k in keys(50)] == [chosen(plain, ask(k)).replica for k in keys(50)]


def test_least_tokens_takes_the_lesser_of_two_and_spreads() -> None:
    among = seats(2)
    among[0].kv = 500
    by = made("least_tokens", among)
    assert {chosen(by, ask()).replica for _ in range(20)} == {"engine-1"}
    even = made("least_tokens", seats(16))
    assert len({chosen(even, ask()).replica for _ in range(300)}) == 16


def test_round_robin_takes_turns_and_skips_the_full() -> None:
    among = seats(3)
    among[1].in_flight = 3
    by = made("round_robin", among)
    assert [chosen(by, ask()).replica for _ in range(4)] == ["engine-0", "engine-2", "engine-0", "engine-2"]


def test_an_explanation_names_every_replica_in_order_and_changes_nothing() -> None:
    among = seats(3)
    by = made("affinity", among)
    home = chosen(by, ask(5)).seat
    home.in_flight = 3
    first = explain(by, ask(5))
    assert first == explain(by, ask(5))
    assert [line.place for line in first.ranking] == [1, 2, 3]
    assert (first.ranking[0].replica, first.ranking[0].why_here) == (home.replica.name, "home")
    assert first.chosen == first.ranking[1].replica == chosen(by, ask(5)).replica
    for one in among:
        one.in_flight = 3
    assert explain(by, ask(5)).reason == "every replica that could take it is busy"
    for one in among:
        one.takes = False
    assert explain(by, ask(5)).reason == "no replica takes this request"


def test_tenants_keep_their_prefixes_apart() -> None:
    assert affinity_key(b"one", b"same prompt") != affinity_key(b"two", b"same prompt")


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(KeyError):
        policy("fastest")


def test_the_session_of_the_tests_is_at_home_on_the_first_engine() -> None:
    made = policy("session")
    made.update(seats(4))
    order = [one.replica.name for one, _ in made.ranking(ask(session=affinity_key(b"test", SESSION.encode())))]
    assert order[:3] == ["engine-0", "engine-1", "engine-2"]
