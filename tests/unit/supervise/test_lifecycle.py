"""The lifecycle's decisions, one at a time."""

import pytest
from vitalis_serve.fleet import ReplicaState as State
from vitalis_serve.supervise import lifecycle as lc

POLICY = lc.Policy(start_seconds=30, stop_seconds=5, hung_seconds=8, tries=3)


def after(*events, life=None, now=0.0, policy=POLICY):
    """The last life and its actions after (event, at) pairs; a bare event happens at once."""
    life = life or lc.Life()
    actions = ()
    for event in events:
        event, now = event if isinstance(event, tuple) else (event, now)
        life, actions = lc.step(life, event, now, policy)
    return life, actions


def ready(policy=POLICY):
    return after(lc.Start(), lc.Answered(), policy=policy)[0]


def test_start_spawns():
    life, actions = after(lc.Start())
    assert (life.state, life.incarnation, actions) == (State.STARTING, 1, (lc.Spawn(),))


def test_starting_ends_at_its_deadline_in_a_kill_and_then_backoff():
    life, actions = after(lc.Start(), (lc.Tick(), 30.0))
    assert actions == (lc.Kill(),)
    life, _ = after(lc.Exited(-9), life=life, now=31)
    assert life.state is State.BACKOFF
    assert "not ready within 30 s" in life.detail


@pytest.mark.parametrize("code", [0, 1, -9, None])
def test_an_exit_nobody_asked_for_is_a_crash_whatever_its_code(code):
    life, _ = after(lc.Exited(code), life=ready())
    assert life.state is State.BACKOFF


def test_an_exit_that_was_asked_for_is_none_whatever_its_code():
    life, actions = after(lc.Stop(0), life=ready())
    assert actions == (lc.Terminate(5),)
    assert after(lc.Exited(1), life=life)[0].state is State.STOPPED


def test_a_crash_while_it_drains_to_be_stopped_stops_it():
    life, _ = after(lc.Stop(10), lc.Exited(0), life=ready())
    assert life.state is State.STOPPED


def test_draining_ends_when_idle():
    life, actions = after(lc.Stop(10), life=ready())
    assert (life.state, actions) == (State.DRAINING, ())
    assert after(lc.Idle(), life=life)[1] == (lc.Terminate(5),)


def test_draining_ends_at_its_deadline():
    life, _ = after(lc.Stop(10), life=ready())
    assert after((lc.Tick(), 9.9), life=life)[1] == ()
    assert after((lc.Tick(), 10.0), life=life)[1] == (lc.Terminate(5),)


def test_a_keeper_that_does_not_obey_is_killed():
    life, _ = after(lc.Stop(0), life=ready())
    assert after((lc.Tick(), 5 + lc.KILL_SECONDS), life=life)[1] == (lc.Kill(keeper=True),)


def test_restart_of_a_ready_one_drains_stops_and_starts():
    life, _ = after(lc.Restart(10), lc.Idle(), life=ready())
    assert life.state is State.DRAINING
    life, actions = after(lc.Exited(0), life=life)
    assert (life.state, life.incarnation, actions) == (State.STARTING, 2, (lc.Spawn(),))


def test_stop_overtakes_a_restart_under_way():
    life, _ = after(lc.Restart(0), lc.Stop(0), lc.Exited(0), life=ready())
    assert life.state is State.STOPPED


def test_refused_is_suspect_at_once_and_a_silent_probe_is_not():
    assert after(lc.ProbeFailed("no", refused=True), life=ready())[0].state is State.SUSPECT
    assert after((lc.ProbeFailed("slow"), 1.0), life=ready())[0].state is State.READY


def test_no_progress_while_work_runs_is_suspect_at_half_time_and_killed_at_full():
    still = lc.Observed(working=True, moved=False)
    life, _ = after((still, 3.9), life=ready())
    assert life.state is State.READY
    life, _ = after((still, 4.0), life=life)
    assert life.state is State.SUSPECT
    life, actions = after((still, 8.0), life=life)
    assert (life.state, actions) == (State.HUNG, (lc.Kill(),))
    life, _ = after(lc.Exited(-9), life=life, now=8.1)
    assert life.state is State.BACKOFF
    assert "hung" in life.detail


def test_requests_that_wait_for_ever_do_not_eject_what_moves():
    """An hour of probes of a full engine, each with a longer queue than the last."""
    life = ready()
    for at in range(0, 3600, 10):
        life, actions = after((lc.Observed(working=True, moved=True, full=True), float(at)), life=life)
        assert (life.state, actions) == (State.BUSY, ())


def test_one_that_spoils_real_requests_is_suspect_until_a_right_answer():
    """vLLM that drains: healthy, moving, and 500 to all that is new."""
    spoilt = lc.ProbeFailed("answered 500", refused=True, spoilt=True)
    life, _ = after((spoilt, 1.0), life=ready())
    assert (life.state, life.detail) == (State.SUSPECT, "answered 500")
    for at in range(2, 40):
        life, actions = after((lc.Observed(working=True, moved=True), float(at)), life=life)
        assert (life.state, actions) == (State.SUSPECT, ()), "what runs there is finished, not killed"
    assert after((lc.Observed(working=False, moved=False), 40.0), life=life)[0].state is State.SUSPECT
    life, _ = after((lc.Answered(), 41.0), life=life)
    assert (life.state, life.spoils) == (State.READY, False)
    assert after((lc.Observed(working=True, moved=True, full=True), 42.0), life=life)[0].state is State.BUSY


def test_one_that_spoils_requests_and_does_nothing_else_is_replaced():
    spoilt = lc.ProbeFailed("answered 500", refused=True, spoilt=True)
    life, actions = after((spoilt, 1.0), (spoilt, 7.9), life=ready())
    assert (life.state, actions) == (State.SUSPECT, ())
    life, actions = after((spoilt, 8.0), life=life)
    assert (life.state, actions) == (State.HUNG, (lc.Kill(),))
    assert "answered 500" in life.detail


def test_idle_is_not_hung():
    life, _ = after((lc.Observed(working=False, moved=False), 1000.0), life=ready())
    assert (life.state, life.proof_at) == (State.READY, 1000.0)


def test_a_suspect_recovers_by_progress_or_an_answer_and_not_by_looking_idle():
    suspect, _ = after(lc.ProbeFailed("no", refused=True), life=ready())
    assert after(lc.Observed(working=False, moved=False), life=suspect)[0].state is State.SUSPECT
    assert after(lc.Observed(working=True, moved=True), life=suspect)[0].state is State.READY
    assert after(lc.Answered(), life=suspect)[0].state is State.READY


def test_full_is_busy():
    life, _ = after(lc.Observed(working=True, moved=True, full=True), life=ready())
    assert life.state is State.BUSY
    assert after(lc.Observed(working=True, moved=True), life=life)[0].state is State.READY


def test_restart_leaves_failed_and_forgets_the_crashes():
    life = ready()
    for _ in range(3):
        life, _ = after(lc.Exited(0), (lc.Tick(), 1e9), life=life)
    assert life.state is State.FAILED
    life, actions = after(lc.Restart(10), life=life)
    assert (life.state, life.crashes, actions) == (State.STARTING, 0, (lc.Spawn(),))


def test_hasten_kills_what_is_being_stopped():
    life, _ = after(lc.Stop(10), life=ready())
    assert after(lc.Hasten(), life=life)[1] == (lc.Kill(),)
    assert after(lc.Hasten(), life=ready())[1] == ()


def test_an_external_engine_is_never_spawned_nor_killed():
    policy = lc.Policy(hung_seconds=8, owned=False)
    life, actions = after(lc.Start(), policy=policy)
    assert (life.state, life.deadline, actions) == (State.STARTING, None, ())
    life, actions = after(lc.Answered(), (lc.ProbeFailed("gone"), 100.0), life=life, policy=policy)
    assert (life.state, actions) == (State.HUNG, ())
    life, actions = after((lc.Observed(working=True, moved=True), 101.0), life=life, policy=policy)
    assert (life.state, actions) == (State.READY, ())
    life, actions = after((lc.ProbeFailed("reset", refused=True), 200.0), life=life, policy=policy)
    life, actions = after((lc.ProbeFailed("nobody listens", refused=True), 300.0), life=life, policy=policy)
    assert (life.state, actions, life.detail) == (State.SUSPECT, (), "nobody listens"), "it is away, not hung"
    life, actions = after(lc.Stop(0), life=life, policy=policy)
    assert (life.state, actions) == (State.STOPPED, ())


def test_an_external_engine_keeps_its_incarnation_and_its_models_over_a_drain():
    policy = lc.Policy(owned=False)
    life, _ = after(lc.Start(), lc.Answered(("a", "b")), lc.Stop(0), lc.Start(), policy=policy)
    assert (life.state, life.incarnation, life.restarts, life.models) == (State.STARTING, 1, 0, ("a", "b"))


GONE = lc.ProbeFailed("nobody listens", refused=True, gone=True)


def test_an_external_engine_that_went_is_another_one_once():
    policy = lc.Policy(hung_seconds=8, owned=False)
    life, _ = after(lc.Start(), GONE, GONE, policy=policy)
    assert (life.state, life.incarnation) == (State.STARTING, 1), "nothing was there yet"
    for incarnation in (2, 3):
        life, _ = after(lc.Answered(), GONE, life=life, policy=policy)
        assert (life.state, life.incarnation, life.detail) == (State.SUSPECT, incarnation, "nobody listens")
        life, actions = after((GONE, 50.0), (lc.ProbeFailed("in time"), 51.0), (GONE, 52.0), life=life, policy=policy)
        assert (life.incarnation, life.restarts, actions) == (incarnation, incarnation - 1, ())


def test_what_comes_after_an_external_engine_that_went_has_to_answer():
    policy = lc.Policy(hung_seconds=8, owned=False)
    moves = lc.Observed(working=True, moved=True)
    life, _ = after(lc.Start(), lc.Answered(), GONE, moves, policy=policy)
    assert life.state is State.SUSPECT
    assert after(lc.Answered(), life=life, policy=policy)[0].state is State.READY


def test_an_external_engine_that_hung_and_then_went_is_suspect():
    policy = lc.Policy(hung_seconds=8, owned=False)
    life, _ = after(lc.Start(), lc.Answered(), (lc.ProbeFailed("silent"), 100.0), policy=policy)
    assert (life.state, life.incarnation) == (State.HUNG, 1)
    life, _ = after((GONE, 101.0), life=life, policy=policy)
    assert (life.state, life.incarnation) == (State.SUSPECT, 2)


def test_an_external_engine_that_went_keeps_its_count_over_a_drain():
    policy = lc.Policy(owned=False)
    life, _ = after(lc.Start(), lc.Answered(), GONE, lc.Answered(), lc.Stop(0), lc.Start(), policy=policy)
    assert (life.state, life.incarnation) == (State.STARTING, 2)


def test_our_own_that_does_not_listen_is_the_same_until_it_exits():
    life, _ = after(GONE, GONE, life=ready())
    assert (life.state, life.incarnation) == (State.SUSPECT, 1)


def test_models_are_what_was_said_last():
    life, _ = after(lc.Start(), lc.Answered(("a",)))
    life, _ = after(lc.Observed(working=False, moved=False), lc.ProbeFailed("no", refused=True), life=life)
    assert life.models == ("a",)
    assert after(lc.Observed(working=True, moved=True, models=("a", "b")), life=life)[0].models == ("a", "b")


def test_every_state_is_in_the_table_and_can_be_reached():
    assert set(lc.TRANSITIONS) == set(State)
    assert set().union(*lc.TRANSITIONS.values()) == set(State) - {State.PLANNED}
