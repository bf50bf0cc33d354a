"""The lifecycle under any sequence of events, at any pace."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from vitalis_serve.fleet import ReplicaState as State
from vitalis_serve.supervise import lifecycle as lc

from tests.support.examples import examples

POLICY = lc.Policy(start_seconds=30, stop_seconds=5, drain_seconds=10, hung_seconds=8, tries=3, steady_seconds=60)
EXTERNAL = lc.Policy(hung_seconds=8, drain_seconds=10, owned=False)

seconds = st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0])
events = st.one_of(
    st.just(lc.Start()),
    st.builds(lc.Stop, seconds),
    st.builds(lc.Restart, seconds),
    st.just(lc.Hasten()),
    st.just(lc.Answered()),
    st.builds(lc.Observed, st.booleans(), st.booleans(), st.booleans()),
    st.builds(lc.ProbeFailed, st.just("refused"), st.booleans(), st.booleans(), st.booleans()),
    st.just(lc.Idle()),
    st.builds(lc.Exited, st.sampled_from([0, 1, -9, None]), st.just(""), st.floats(0, 0.999)),
    st.just(lc.Tick()),
)
ORDERS = (lc.Start, lc.Stop, lc.Restart, lc.Hasten)
story = st.lists(st.tuples(events, st.floats(0, 40)), max_size=60)
policies = st.sampled_from([POLICY, EXTERNAL])


class Edge:
    """What the edge knows: whether a process lives. Events that could not happen then are left out."""

    def __init__(self, policy: lc.Policy) -> None:
        self.policy = policy
        self.life = lc.Life()
        self.alive = False
        self.told_to_end = False
        self.now = 0.0

    def feed(self, event: lc.Event) -> tuple[lc.Action, ...]:
        if isinstance(event, lc.Exited):
            if not self.alive:
                return ()
            self.alive = self.told_to_end = False
        self.life, actions = lc.step(self.life, event, self.now, self.policy)
        for action in actions:
            if isinstance(action, lc.Spawn):
                assert not self.alive, "a second process beside the first"
                self.alive, self.told_to_end = True, False
            else:
                assert self.alive, "nothing is there to be ended"
                self.told_to_end = True
        if self.policy.owned:
            assert self.alive == (self.life.state not in lc.RESTING), "state and process disagree"
        else:
            assert not self.alive
        return actions


@given(story, policies)
def test_no_story_makes_an_illegal_transition(story, policy):
    """`step` asserts each against the table; state and process agree at every point."""
    edge = Edge(policy)
    for event, pause in story:
        edge.now += pause
        edge.feed(event)


@given(story)
def test_failed_is_left_on_an_order_only(story):
    edge = Edge(POLICY)
    for event, pause in story:
        edge.now += pause
        was = edge.life.state
        edge.feed(event)
        if was is State.FAILED and edge.life.state is not State.FAILED:
            assert isinstance(event, ORDERS)


@given(story, policies)
def test_stopped_is_left_on_an_order_only(story, policy):
    edge = Edge(policy)
    for event, pause in story:
        edge.now += pause
        was = edge.life.state
        edge.feed(event)
        if was is State.STOPPED and edge.life.state is not State.STOPPED:
            assert isinstance(event, ORDERS)


@given(story, policies, seconds, st.booleans())
@settings(max_examples=examples(300))
def test_after_stop_every_path_ends_stopped(story, policy, patience, obeys):
    """Whatever happened before, with an engine that ends when told (`obeys`) or only when its keeper is killed."""
    edge = Edge(policy)
    for event, pause in story:
        edge.now += pause
        edge.feed(event)
    edge.feed(lc.Stop(patience))
    for _ in range(10):
        if edge.life.state is State.STOPPED:
            break
        assert edge.life.deadline is not None, f"nothing would ever happen in {edge.life}"
        edge.now = max(edge.now, edge.life.deadline)
        actions = edge.feed(lc.Tick())
        if edge.alive and (obeys and edge.told_to_end or lc.Kill(keeper=True) in actions):
            edge.feed(lc.Exited(0))
    assert edge.life.state is State.STOPPED
    assert not edge.alive


# Exact in binary, so that sums of them are: a life of 60 s that reads as 59.999999 is another story.
lives = st.integers(0, 100 * 64).map(lambda n: n / 64)
jitters = st.integers(0, 1023).map(lambda n: n / 1024)


@given(st.lists(st.tuples(st.sampled_from([0, 1, -9]), jitters, lives), max_size=20))
@example([(1, 0.0, 60.0)] * 3)
def test_crashes_in_a_row_end_in_failed_after_the_configured_tries(crashes):
    """Those after a steady life start counting anew."""
    edge = Edge(POLICY)
    edge.feed(lc.Start())
    row = 0
    for code, jitter, lived in crashes:
        edge.feed(lc.Answered())
        edge.now += lived
        edge.feed(lc.Exited(code, jitter=jitter))
        row = 1 if lived >= POLICY.steady_seconds else row + 1
        if row >= POLICY.tries:
            assert edge.life.state is State.FAILED
            return
        assert edge.life.state is State.BACKOFF
        delay = edge.life.deadline - edge.now
        top = min(POLICY.backoff_max_seconds, POLICY.backoff_first_seconds * 2 ** (row - 1))
        assert top / 2 <= delay <= top
        edge.now = edge.life.deadline
        edge.feed(lc.Tick())
        assert edge.life.state is State.STARTING


@given(story, policies)
def test_requests_are_only_sent_to_what_has_answered(story, policy):
    edge = Edge(policy)
    answered = 0
    for event, pause in story:
        edge.now += pause
        edge.feed(event)
        if isinstance(event, lc.Answered) and edge.life.state is State.READY:
            answered = edge.life.incarnation
        if edge.life.state in (State.READY, State.BUSY):
            assert answered == edge.life.incarnation


@given(story, policies)
def test_progress_alone_never_brings_back_what_spoils_requests(story, policy):
    edge = Edge(policy)
    for event, pause in story:
        edge.now += pause
        was = edge.life
        edge.feed(event)
        if edge.life.state in (State.READY, State.BUSY):
            assert not edge.life.spoils
            assert not was.spoils or isinstance(event, lc.Answered)


@given(story, policies)
def test_a_process_is_lost_once_and_only_one_that_is_not_ours(story, policy):
    edge = Edge(policy)
    for event, pause in story:
        edge.now += pause
        was = edge.life
        edge.feed(event)
        lost = edge.life.incarnation > was.incarnation and edge.life.state is State.SUSPECT
        assert lost == (
            isinstance(event, lc.ProbeFailed) and event.gone and was.met and was.state in lc.SERVING
            and policy is EXTERNAL
        )  # fmt: skip


@given(story)
def test_only_one_that_is_not_ours_is_hung_and_left_alone(story):
    edge = Edge(POLICY)
    for event, pause in story:
        edge.now += pause
        edge.feed(event)
        if edge.life.state is State.HUNG:
            assert edge.life.ending == "crash"
