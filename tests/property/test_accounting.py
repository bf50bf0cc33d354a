"""Whatever clients, engines and the clock do at any moment: nothing leaks, and what was settled is what was used."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from vitalis_serve.fleet import ReplicaState

from tests.integration.test_gateway_trouble import BEFORE, LATER, MIDDLE
from tests.property.accounting import CLASSES, Asked, Engine, Site, Visit, site
from tests.support import gateway
from tests.support.examples import examples
from tests.support.gateway import APIS

ENDLESS = 20_000
MOST_VISITS = 24
# Nothing is shrunk: sockets and processes make the same steps another story each time.
LIVE = settings(
    max_examples=min(examples(5), 100), stateful_step_count=40, deadline=None,
    phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
)  # fmt: skip
TROUBLES = [
    *[rule for rule, _, _ in BEFORE],
    *[{"after_events": LATER, **rule} for rule, _ in MIDDLE],
    {"kind": "status", "status": 503}, {"kind": "status", "status": 429}, {"kind": "status", "status": 400},
    *[{"kind": "silent"}] * 3, *[{"kind": "stall", "after_events": LATER}] * 2, {"kind": "stale"},
    {"kind": "dribble"}, {"kind": "delay", "seconds": 0.3},
    {"kind": "stream_error"}, {"kind": "stream_error", "after_events": LATER},
    {"kind": "stall", "after_events": LATER, "seconds": 0.3},
]  # fmt: skip
FLEET: list[dict[str, Any]] = [
    {"state": ReplicaState.DRAINING}, {"state": ReplicaState.SUSPECT}, {"state": ReplicaState.BUSY},
    {"state": ReplicaState.READY}, {"state": ReplicaState.READY, "renewed": True}, {"slots": 1}, {"slots": 3},
]  # fmt: skip
engines = st.integers(0, 2)
which = st.integers(0, MOST_VISITS - 1)
shares = st.one_of(st.just(1.0), st.just(1.0), st.floats(0.01, 0.99))
requests = st.fixed_dictionaries(
    {
        "api": st.sampled_from(APIS),
        "stream": st.sampled_from([True, True, False]),
        "tokens": st.sampled_from([24, 24, 60, 300, ENDLESS]),
        "class_": st.sampled_from(CLASSES),
        "home": st.integers(0, 8),
        "pad": st.sampled_from([0, 0, 0, 8_000, 40_000]),
    }
)
arrivals = st.tuples(requests, shares, st.integers(0, 1))  # the last is the worker


@dataclass
class Story:
    """What was done, and what came of it. The first failure is the last thing that is done: Hypothesis would do it
    again to see it again, on processes in which something has leaked."""

    site: Site
    steps: list[str] = field(default_factory=list)
    failure: Exception | None = None


def step(act: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(act)
    def acts(self: "Accounting", **given: Any) -> None:
        story = self.story
        if story.failure is not None:
            return
        if act.__name__ != "lives":
            story.steps.append(f"{act.__name__} {given}")
        try:
            act(self, **given)
        except Exception as failure:  # noqa: BLE001 - the test's own, raised where the story ends
            story.failure = failure

    return acts


class Accounting(RuleBasedStateMachine):
    def __init__(self, story: Story) -> None:
        super().__init__()
        self.story = story
        self._site = story.site
        self._visits: list[Visit] = []
        self._gone: list[Visit] = []

    @initialize(troubles=st.lists(st.lists(st.sampled_from(TROUBLES), max_size=6), min_size=3, max_size=3),
                many=st.lists(arrivals, min_size=4, max_size=10))  # fmt: skip
    @step
    def rush(self, troubles: list[list[dict[str, Any]]], many: list[tuple[dict[str, Any], float, int]]) -> None:
        """No story begins calmly."""
        self.story.steps.clear()
        self._site.begin()
        for index, some in enumerate(troubles):
            self.spoil(index=index, troubles=some)
        self.arrive(many=many, deaf=False)

    # -- clients

    @rule(many=st.lists(arrivals, min_size=1, max_size=6), deaf=st.booleans())
    @step
    def arrive(self, many: list[tuple[dict[str, Any], float, int]], deaf: bool) -> None:
        for request, share, worker in many:
            self._arrive(request, share, worker, deaf)

    def _arrive(self, request: dict[str, Any], share: float, worker: int, deaf: bool) -> None:
        if len(self._visits) == MOST_VISITS:
            self._gone.append(self._visits.pop(0))
            self._gone[-1].leave("close")
        visit = self._site.visit(worker, deaf=deaf)
        self._visits.append(visit)
        visit.ask(*self._site.request(visit.number, **request))
        visit.send(share)

    @rule(worker=st.integers(0, 1), home=st.integers(0, 8), reads=st.booleans())
    @step
    def arrive_for_much(self, worker: int, home: int, reads: bool) -> None:
        """A plain answer of a megabyte and more, which is relayed while it comes."""
        much = {"api": "completions", "stream": False, "tokens": 2000, "class_": "standard", "home": home, "n": 100}
        self._arrive(much, 1.0, worker, deaf=not reads)

    @rule(index=which, request=requests, share=shares)
    @step
    def ask_again(self, index: int, request: dict[str, Any], share: float) -> None:
        """On the same connection: behind its last answer, or pipelined."""
        if (visit := self._visit(index)) is None:
            return
        visit.ask(*self._site.request(visit.number, **request))
        visit.send(share)

    @rule(index=which, share=shares)
    @step
    def send_on(self, index: int, share: float) -> None:
        if (visit := self._visit(index)) is not None:
            visit.send(share)

    @rule(index=which, most=st.sampled_from([1, 200, 5_000, 1 << 30]))
    @step
    def read(self, index: int, most: int) -> None:
        if (visit := self._visit(index)) is not None:
            visit.read(most)

    @rule(index=which, how=st.sampled_from(["close", "reset", "half close"]), after_bytes=st.booleans())
    @step
    def leave(self, index: int, how: str, after_bytes: bool) -> None:
        if (visit := self._visit(index)) is None:
            return
        self._visits.remove(visit)
        if after_bytes:  # of an answer, if one is coming
            until = time.monotonic() + 0.3
            while visit.pending and not visit.read(4096) and time.monotonic() < until:
                time.sleep(0.002)
        visit.leave(how)
        self._gone.append(visit)

    # -- engines

    @rule(index=engines, troubles=st.lists(st.sampled_from(TROUBLES), min_size=1, max_size=4))
    @step
    def spoil(self, index: int, troubles: list[dict[str, Any]]) -> None:
        """The next requests that it gets, one trouble each."""
        engine = self._engine(index)
        if engine.alive:
            for trouble in troubles:
                engine.process.misbehave(requests=1, **trouble)

    @rule(index=engines, kind=st.sampled_from(["freeze", "refuse", "nothing", "nothing"]))
    @step
    def stand_still(self, index: int, kind: str) -> None:
        engine = self._engine(index)
        if engine.alive:
            engine.process.reset() if kind == "nothing" else engine.process.misbehave(kind)

    @rule(index=engines, soon=st.booleans())
    @step
    def die(self, index: int, soon: bool) -> None:
        """The fleet hears of it soon, or when the engine is back."""
        engine = self._engine(index)
        if not engine.alive:
            engine.start()
            self._site.change(engine, state=ReplicaState.READY, renewed=True)
            return
        engine.kill()
        if soon:
            self._site.change(engine, state=ReplicaState.BACKOFF)

    @rule(index=engines, change=st.sampled_from(FLEET))
    @step
    def change(self, index: int, change: dict[str, Any]) -> None:
        self._site.change(self._engine(index), **change)

    @rule(index=engines)
    @step
    def drop(self, index: int) -> None:
        """Until the fleet is published the next time."""
        self._site.publish(without=self._engine(index).name)

    # -- time

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.6]))
    @step
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @rule()
    @step
    def contexts_have_clients(self) -> None:
        """There are no more of them than requests that somebody may still wait for."""

        def waited_for() -> int:
            for visit in self._visits:
                visit.read()
            return sum(visit.pending for visit in self._visits)

        gateway.wait_until(lambda: self._site.open_contexts() <= waited_for(), what="no context without a client")

    @invariant()
    @step
    def lives(self) -> None:
        self._site.lives()

    @step
    def teardown(self) -> None:
        self._site.publish()
        for engine in self._site.engines:
            if engine.alive:
                engine.process.reset()
        until = time.monotonic() + 0.6
        while time.monotonic() < until and any(visit.pending and not visit.unsent for visit in self._visits):
            for visit in self._visits:
                visit.read(1 << 18)
            time.sleep(0.005)
        for index, visit in enumerate(self._visits):
            visit.leave("reset" if index % 2 else "close")
        for visit in self._gone:
            visit.wire.close()
        asked: list[Asked] = [one for visit in (*self._gone, *self._visits) for one in visit.asked]
        self._visits.clear()
        self._site.check(asked)

    def _visit(self, index: int) -> Visit | None:
        return self._visits[index % len(self._visits)] if self._visits else None

    def _engine(self, index: int) -> Engine:
        return self._site.engines[index]


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def books(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("books"), request.param) as made:
        yield made


def test_nothing_leaks(books: Site) -> None:
    story = Story(books)
    run_state_machine_as_test(lambda: Accounting(story), settings=LIVE)
    if story.failure is not None:
        raise AssertionError("\n".join(["after", *story.steps, str(story.failure)])) from story.failure
