"""One replica's life as a pure state machine: (life, event, now) -> (life, actions). Owned by `replica.py`.

How it works. `Life` is everything that decides what happens next; `step` returns its successor and what the
edge has to do (`Spawn`, `Terminate`, `Kill`). Time and jitter come in with the events, so a whole night of
crashes is a loop in a test. Every change of state is looked up in TRANSITIONS; one that is not there is a
bug.

`ending` says why a process is being ended, because its exit code does not: vLLM exits 0 when it crashes. An
exit with `ending` empty is one that nobody asked for, and that is a crash whatever its code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from vitalis_serve.fleet import ReplicaState as State

TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.PLANNED: frozenset({State.STARTING, State.STOPPED}),
    State.STARTING: frozenset({State.READY, State.DRAINING, State.BACKOFF, State.FAILED}),
    State.READY: frozenset({State.BUSY, State.SUSPECT, State.DRAINING, State.BACKOFF, State.FAILED}),
    State.BUSY: frozenset({State.READY, State.SUSPECT, State.DRAINING, State.BACKOFF, State.FAILED}),
    State.SUSPECT: frozenset({State.READY, State.BUSY, State.HUNG, State.DRAINING, State.BACKOFF, State.FAILED}),
    State.HUNG: frozenset({State.READY, State.BUSY, State.SUSPECT, State.DRAINING, State.BACKOFF, State.FAILED}),
    State.DRAINING: frozenset({State.STARTING, State.STOPPED, State.BACKOFF, State.FAILED}),
    State.STOPPED: frozenset({State.STARTING}),
    State.BACKOFF: frozenset({State.STARTING, State.STOPPED}),
    State.FAILED: frozenset({State.STARTING, State.STOPPED}),
}
SERVING: Final = frozenset({State.READY, State.BUSY, State.SUSPECT, State.HUNG})
AWAY: Final = frozenset({State.SUSPECT, State.HUNG})  # serving what it has, and out of routing
RESTING: Final = frozenset({State.PLANNED, State.STOPPED, State.BACKOFF, State.FAILED})  # no process

KILL_SECONDS: Final = 10.0  # from asking a keeper for SIGKILL to giving up on the keeper itself


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds and counts of one replica. `owned` is False for an engine somebody else runs: probed, never
    spawned."""

    start_seconds: float = 900
    stop_seconds: float = 30
    drain_seconds: float = 30
    hung_seconds: float = 60
    backoff_first_seconds: float = 1
    backoff_max_seconds: float = 60
    tries: int = 5
    steady_seconds: float = 300
    owned: bool = True


# Events


@dataclass(frozen=True, slots=True)
class Start:
    """Bring it up, from whatever rest it is in. Ignored while a process lives or is on its way."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Take no new requests, let what runs end for `seconds`, then stop and stay stopped."""

    seconds: float = 0


@dataclass(frozen=True, slots=True)
class Restart:
    """As Stop, but start again afterwards. From rest it is Start with the count of crashes forgotten."""

    seconds: float = 0


@dataclass(frozen=True, slots=True)
class Hasten:
    """Somebody pressed Ctrl-C twice: whatever is being ended is killed now."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The model gave a right answer to a real request. `models`: what the engine said that it serves, where it was
    asked."""

    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Observed:
    """A look at a serving engine. `working`: it has requests (by its count or the gateway's); `moved`: its counters
    differ from the last look's, or tokens arrived at the gateway; `full`: it has no slot for an ordinary one;
    `models`: as in Answered."""

    working: bool
    moved: bool
    full: bool = False
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """`refused`: the engine said no (connection refused, 503), rather than nothing in time. `spoilt`: it was a real
    request that it said no to. `gone`: the process that was there is not any more (nobody listens, or another does)."""

    reason: str
    refused: bool = False
    spoilt: bool = False
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Idle:
    """No worker has a request in flight there any more (asked for while draining)."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The process and everything below it is gone. `jitter` in [0, 1) spreads the back-off."""

    code: int | None
    reason: str = ""
    jitter: float = 0.5


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline may have passed."""


Event = Start | Stop | Restart | Hasten | Answered | Observed | ProbeFailed | Idle | Exited | Tick


# Actions


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process; answer with Exited if that fails."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM now, SIGKILL to the whole group after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to the whole group now. `keeper`: the keeper did not manage it: kill it too and sweep."""

    keeper: bool = False


Action = Spawn | Terminate | Kill
Ending = Literal["", "stop", "restart", "crash"]


@dataclass(frozen=True, slots=True)
class Life:
    """`deadline` is the one instant at which the next Tick matters: end of starting, of back-off, of a drain
    or of a termination. `proof_at`: when it was last seen well (idle and healthy, or moving). `spoils`: it said no to a
    real request, and only a right answer takes that back: a vLLM that drains finishes what runs, is healthy, and
    answers 500 to all that is new. `met`: this incarnation has answered. `models`: what it said last that it serves,
    where it is asked; kept while it is away."""

    state: State = State.PLANNED
    incarnation: int = 0
    crashes: int = 0
    deadline: float | None = None
    ready_at: float | None = None
    proof_at: float = 0.0
    after: Literal["stop", "restart"] = "stop"  # what a drain leads to
    ending: Ending = ""
    detail: str = ""
    spoils: bool = False
    met: bool = False
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.state in RESTING and self.ending), "a replica at rest has nothing to end"

    @property
    def restarts(self) -> int:
        return max(0, self.incarnation - 1)


Step = tuple[Life, tuple[Action, ...]]


def step(life: Life, event: Event, now: float, policy: Policy) -> Step:
    """The next life and what to do about it. Events that mean nothing in a state leave it unchanged."""
    match event:
        case Start():
            return _start(life, now, policy) if life.state in RESTING else (life, ())
        case Restart(seconds):
            return _restart(life, seconds, now, policy)
        case Stop(seconds):
            return _stop(life, seconds, now, policy)
        case Hasten():
            return _hasten(life, now, policy)
        case Exited():
            return _exited(life, event, now, policy)
        case Idle():
            draining = life.state is State.DRAINING and not life.ending
            return _end_drain(life, now, policy, "nothing in flight") if draining else (life, ())
        case Tick():
            return _tick(life, now, policy)
        case _:
            return _seen(life, event, now, policy)


def _to(life: Life, state: State, **changes: object) -> Life:
    assert state in TRANSITIONS[life.state], f"{life.state} -> {state} is not a transition"
    return replace(life, state=state, **changes)  # type: ignore[arg-type]


def _start(life: Life, now: float, policy: Policy) -> Step:
    starting = _to(
        life,
        State.STARTING,
        # An engine that is not ours is only asked again: what was known about it holds.
        incarnation=life.incarnation + 1 if policy.owned else max(life.incarnation, 1),
        deadline=now + policy.start_seconds if policy.owned else None,
        ready_at=None,
        proof_at=now,
        ending="",
        detail="",
        spoils=False,
        met=life.met and not policy.owned,
    )
    return starting, (Spawn(),) if policy.owned else ()


def _restart(life: Life, seconds: float, now: float, policy: Policy) -> Step:
    if life.state in RESTING:
        return _start(replace(life, crashes=0), now, policy)
    if life.state is State.DRAINING:
        # A drain that was to end stopped now ends in a start; one that is under way keeps its deadline.
        ending: Ending = "restart" if life.ending == "stop" else life.ending
        return replace(life, after="restart", ending=ending, detail="draining, then restart"), ()
    return _drain(replace(life, crashes=0), "restart", seconds, now, policy)


def _stop(life: Life, seconds: float, now: float, policy: Policy) -> Step:
    if life.state is State.STOPPED:
        return life, ()
    if life.state in RESTING:
        return _to(life, State.STOPPED, deadline=None, detail=""), ()
    if life.state is State.DRAINING:
        ending: Ending = "stop" if life.ending == "restart" else life.ending
        life = replace(life, after="stop", ending=ending, detail="draining, then stop")
        if life.ending:
            return life, ()
        assert life.deadline is not None
        life = replace(life, deadline=min(life.deadline, now + seconds))
        return _end_drain(life, now, policy, "asked to stop") if seconds <= 0 else (life, ())
    return _drain(life, "stop", seconds, now, policy)


def _drain(life: Life, after: Literal["stop", "restart"], seconds: float, now: float, policy: Policy) -> Step:
    was = life
    life = _to(life, State.DRAINING, after=after, deadline=now + seconds, detail=f"draining, then {after}")
    if was.ending == "crash":  # being killed already: only what follows has changed
        return replace(life, ending=after, deadline=was.deadline), ()
    if was.state is State.STARTING or seconds <= 0:
        return _end_drain(life, now, policy, "")
    return life, ()


def _end_drain(life: Life, now: float, policy: Policy, why: str) -> Step:
    if not policy.owned:
        if life.after == "restart":
            return _start(life, now, policy)
        return _to(life, State.STOPPED, deadline=None, ending="", detail=""), ()
    # The keeper kills at stop_seconds by itself; the deadline here is for a keeper that does not.
    deadline = now + policy.stop_seconds + KILL_SECONDS
    detail = f"stopping: {why}" if why else "stopping"
    return replace(life, ending=life.after, deadline=deadline, detail=detail), (Terminate(policy.stop_seconds),)


def _hasten(life: Life, now: float, policy: Policy) -> Step:
    if life.state is not State.DRAINING:
        return life, ()
    if not policy.owned:
        return _end_drain(life, now, policy, "")
    return replace(life, ending=life.ending or life.after, deadline=now + KILL_SECONDS), (Kill(),)


def _exited(life: Life, event: Exited, now: float, policy: Policy) -> Step:
    if life.state in RESTING:
        return life, ()
    if life.ending == "restart":
        return _start(life, now, policy)
    if life.ending == "stop" or (life.state is State.DRAINING and life.after == "stop"):
        return _to(life, State.STOPPED, deadline=None, ending="", detail=""), ()
    steady = life.ready_at is not None and now - life.ready_at >= policy.steady_seconds
    crashes = 1 if steady else life.crashes + 1
    reason = event.reason or f"exited with code {event.code}, which nobody asked for"
    if life.ending == "crash":
        reason = life.detail
    if crashes >= policy.tries:
        detail = f"gave up after {crashes} tries: {reason}"
        return _to(life, State.FAILED, crashes=crashes, deadline=None, ending="", detail=detail), ()
    delay = min(policy.backoff_max_seconds, policy.backoff_first_seconds * 2 ** min(crashes - 1, 32))
    delay *= 0.5 + event.jitter / 2
    detail = f"crash {crashes} of {policy.tries}, next try in {delay:.1f} s: {reason}"
    return _to(life, State.BACKOFF, crashes=crashes, deadline=now + delay, ending="", detail=detail), ()


def _tick(life: Life, now: float, policy: Policy) -> Step:
    # Silence of a serving engine is judged in _overdue, on the word of a probe: after a pause of our own
    # process a clock alone would condemn engines that are well.
    if life.deadline is None or now < life.deadline:
        return life, ()
    if life.ending:
        # Whoever was to end it did not: the keeper is killed and its tree swept.
        return replace(life, deadline=now + KILL_SECONDS), (Kill(keeper=True),)
    if life.state is State.BACKOFF:
        return _start(life, now, policy)
    if life.state is State.STARTING:
        return _condemn(life, f"not ready within {policy.start_seconds:g} s", now)
    if life.state is State.DRAINING:
        return _end_drain(life, now, policy, "requests still in flight at the deadline")
    return life, ()


def _condemn(life: Life, reason: str, now: float) -> Step:
    return replace(life, ending="crash", deadline=now + KILL_SECONDS, detail=reason), (Kill(),)


def _seen(life: Life, event: Event, now: float, policy: Policy) -> Step:
    """Answered, Observed and ProbeFailed: they only matter while it starts or serves."""
    if life.ending or not (life.state in SERVING or life.state is State.STARTING):
        return life, ()
    match event:
        case Answered(models):
            return _well(replace(life, models=models or life.models, spoils=False, met=True), State.READY, now), ()
        case Observed(working, moved, full, models) if life.state in SERVING:
            life = replace(life, models=models or life.models)
            if moved and life.spoils:
                return _works_off(life, now), ()
            # Back into routing only by proof: a frozen vLLM with nothing counted as running looks idle and
            # healthy.
            if moved or (not working and life.state not in AWAY):
                return _well(life, State.BUSY if full else State.READY, now), ()
            return _overdue(life, now, policy)
        case ProbeFailed(reason, gone=True) if life.state in SERVING and life.met and not policy.owned:
            return _lost(life, reason), ()
        case ProbeFailed(reason, refused, spoilt) if life.state in SERVING:
            if refused and life.state not in AWAY:
                return _to(life, State.SUSPECT, detail=reason, spoils=spoilt), ()
            said = reason if life.state is State.SUSPECT else life.detail
            life = replace(life, spoils=life.spoils or spoilt, detail=said)
            return _overdue(life, now, policy, reason, gone=refused)
        case ProbeFailed(reason):
            return replace(life, detail=f"waiting for a right answer: {reason}"), ()
        case _:
            return life, ()


def _well(life: Life, state: State, now: float) -> Life:
    if life.state is State.STARTING:
        return _to(life, State.READY, deadline=None, ready_at=now, proof_at=now, detail="")
    if life.state is state:
        return replace(life, proof_at=now)
    return _to(life, state, proof_at=now, detail="")


def _lost(life: Life, reason: str) -> Life:
    """The process of an engine that is not ours has ended, and nobody here asked for it. What answers there next is
    another one, and said to be so from now on, while its requests are still remembered; it has to answer first."""
    life = replace(life, incarnation=life.incarnation + 1, met=False, spoils=True, detail=reason)
    return life if life.state is State.SUSPECT else _to(life, State.SUSPECT)


def _works_off(life: Life, now: float) -> Life:
    """It moves, so it is not hung, but takes nothing new."""
    if life.state is State.HUNG:
        return _to(life, State.SUSPECT, proof_at=now, detail="it works off what it has")
    return replace(life, proof_at=now)


def _overdue(life: Life, now: float, policy: Policy, reason: str = "", *, gone: bool = False) -> Step:
    """No proof of health for half of hung_seconds: out of routing. For all of it: hung, and killed, as a crash. One
    that is not ours cannot be killed; it is hung as long as it is silent, and suspect where it is `gone`."""
    silent = now - life.proof_at
    why = reason or life.detail or "no progress while requests run"
    if silent >= policy.hung_seconds / 2 and life.state not in AWAY:
        life = _to(life, State.SUSPECT, detail=why)
    if silent < policy.hung_seconds or life.state is not State.SUSPECT or (gone and not policy.owned):
        return life, ()
    hung = _to(life, State.HUNG, detail=f"hung: {why} for {silent:.0f} s")
    return _condemn(hung, hung.detail, now) if policy.owned else (hung, ())
