"""The breaker under any sequence of events: one probe at a time, admission and breaker agree, never open for ever."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vitalis_serve.gateway.breaker import BreakerOptions, Breakers, State

OPTIONS = BreakerOptions(failures=3, first_seconds=2, longest_seconds=8, probe_seconds=20)
NAMES = st.sampled_from(["e0", "e1"])


class Machine(RuleBasedStateMachine):
    """`away`: what admission was told. `sent`: request -> replica, incarnation, whether it is the probe, when."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Breakers(OPTIONS)
        self.now = 0.0
        self.next = 0
        self.incarnations = {"e0": 1, "e1": 1}
        self.away = dict.fromkeys(self.incarnations, False)
        self.in_a_row = dict.fromkeys(self.incarnations, 0)
        self.sent: dict[int, tuple[str, int, bool, float]] = {}
        self.made.update(self.incarnations)

    def told(self, replica: str, keep_away: bool | None) -> None:
        if keep_away is not None:
            assert self.away[replica] is not keep_away, "told again what is so already"
            self.away[replica] = keep_away

    @rule(replica=NAMES, late=st.booleans())
    def begins(self, replica: str, late: bool) -> None:
        """`late`: granted together with another, before admission was told."""
        if self.away[replica] and not late:
            return
        self.next += 1
        begun = self.made.begins(self.next, replica, self.incarnations[replica], self.now)
        assert begun.goes or self.away[replica], "refused what admission lets in"
        self.told(replica, begun.keep_away)
        if begun.goes:
            self.sent[self.next] = (replica, self.incarnations[replica], begun.probe, self.now)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), how=st.sampled_from(["answered", "failed", "left"]), jitter=st.floats(0, 1))
    def ends(self, data: st.DataObject, how: str, jitter: float) -> None:
        request = data.draw(st.sampled_from(sorted(self.sent)))
        replica, incarnation, probe, _ = self.sent.pop(request)
        before = self.made.state(replica)
        current = self.incarnations[replica] == incarnation
        if how == "answered":
            self.told(replica, self.made.answered(request, replica, incarnation))
            if current and before is State.CLOSED:
                self.in_a_row[replica] = 0
        elif how == "failed":
            self.told(replica, self.made.failed(request, replica, incarnation, self.now, jitter))
            if current and before is State.CLOSED:
                self.in_a_row[replica] += 1
                assert (self.made.state(replica) is State.OPEN) is (self.in_a_row[replica] >= OPTIONS.failures)
        if probe:
            self.told(replica, self.made.ended(request, replica, incarnation))
        if self.made.state(replica) is State.CLOSED and before is not State.CLOSED:
            assert probe
            assert how == "answered"
            self.in_a_row[replica] = 0

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 25.0]))
    def passes(self, seconds: float) -> None:
        self.now += seconds
        for replica in self.made.tick(self.now):
            self.told(replica, False)
            # Whoever was the probe has been given up.
            self.sent = {n: (r, i, p and r != replica, t) for n, (r, i, p, t) in self.sent.items()}

    @rule(replica=NAMES)
    def restarts(self, replica: str) -> None:
        self.incarnations[replica] += 1
        for name in self.made.update(self.incarnations):
            assert name == replica
            self.away[name] = False
        self.in_a_row[replica] = 0
        assert not self.away[replica]

    @invariant()
    def one_probe(self) -> None:
        for replica, incarnation in self.incarnations.items():
            probes = [n for n, (r, i, p, _) in self.sent.items() if p and (r, i) == (replica, incarnation)]
            assert len(probes) <= 1
            if self.made.state(replica) is State.HALF_OPEN:
                assert self.away[replica] is bool(probes)
            else:
                assert self.away[replica] is (self.made.state(replica) is State.OPEN)

    def teardown(self) -> None:
        """Whatever happened: after the longest back-off or a probe's patience somebody gets in."""
        self.passes(max(OPTIONS.longest_seconds, OPTIONS.probe_seconds))
        for replica, incarnation in self.incarnations.items():
            assert self.made.begins("last", replica, incarnation, self.now).goes


TestBreaker = Machine.TestCase
TestBreaker.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
