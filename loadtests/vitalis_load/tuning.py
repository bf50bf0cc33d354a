"""Which configuration of the engines to try next, and when to leave one. Pure.

From the configuration in force, one dimension after the other is varied while the rest stays. Along an ordered
dimension (numbers) the search climbs as long as it gets better; of others every value is tried. What is better
becomes the place from which the search goes on; when a whole round over all dimensions brings nothing, it is over.

A candidate is first asked for the load at which the best so far held. Where that fails it cannot win, and is left;
where it holds, the load is raised until it does not.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from vitalis_load.searching import Point, Step
from vitalis_load.sweeping import Bounds, best, next_step

GAIN: Final = 0.03  # of goodput, below which a candidate is no better
ROUNDS: Final = 2

# Of which a profile names one.
_SOURCES: Final = frozenset({"model.hub", "model.folder", "model.package", "model.build", "model.revision"})

Candidate = Mapping[str, Any]  # setting ("engines.slots") to value; empty: the configuration in force


class Dimension(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`values` are numbers or words, given to each setting of `set`, or maps of settings to values."""

    name: str
    values: list[Any]
    set: list[str] = []
    default: Any = None  # what the engine has where nothing is set

    @property
    def ordered(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def settings(self, value: Any) -> dict[str, Any]:
        return dict(value) if isinstance(value, Mapping) else dict.fromkeys(self.set, value)


class Space(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be varied, that with the most effect first."""

    dimensions: list[Dimension]
    about: str = ""


class Trial(msgspec.Struct, kw_only=True):
    """One candidate and all that was measured of it."""

    candidate: dict[str, Any]
    points: list[Point] = []
    state: Literal["going on", "measured", "left", "failed"] = "going on"
    reason: str = ""  # of `left` and `failed`: one sentence


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """`following` is None where the search is over."""

    following: dict[str, Any] | None
    winner: dict[str, Any]


def key(candidate: Candidate) -> str:
    return json.dumps(dict(candidate), sort_keys=True, separators=(",", ":"))


def search(space: Space, current: Candidate, trials: Sequence[Trial], bounds: Bounds, gpus: int) -> Progress:
    """What to try next, found by going the whole way again with what is known. `current`: the values in force, of
    every setting of the space. `gpus`: how many there are; 0 for the CPU."""
    known = {key(trial.candidate): trial for trial in trials if trial.state != "going on"}
    winner: dict[str, Any] = {}
    if key(winner) not in known:
        return Progress(following={}, winner={})
    for _ in range(ROUNDS):
        before = winner
        for dimension in space.dimensions:
            at_first = winner
            for direction in _directions(dimension, {**current, **winner}):
                for value in direction.values:
                    candidate = _without_effect_removed({**winner, **dimension.settings(value)}, current)
                    if key(candidate) == key(winner) or impossible({**current, **candidate}, gpus):
                        continue
                    if key(candidate) not in known:
                        return Progress(following=candidate, winner=winner)
                    if better(known[key(candidate)], known[key(winner)], bounds):
                        winner = candidate
                    elif direction.climbs:
                        break
                if direction.climbs and winner != at_first:
                    break  # what got better one way is not looked for the other way
        if winner == before:
            break
    return Progress(following=None, winner=winner)


def better(challenger: Trial, champion: Trial, bounds: Bounds) -> bool:
    """Whether it is, beyond what repeats differ by."""
    if challenger.state != "measured":
        return False
    new, old = best(challenger.points, bounds), best(champion.points, bounds)
    if new is None or old is None:
        return new is not None
    return new.goodput > old.goodput * (1 + max(GAIN, min(new.spread, 0.2) / 2, min(old.spread, 0.2) / 2))


def next_measurement(points: Sequence[Point], champion: Point | None, bounds: Bounds) -> Step | None:
    """Of one candidate. `champion`: the best point of the best so far; None where nothing held yet."""
    return next_step(points, within(bounds, champion) if champion else bounds)


def within(bounds: Bounds, champion: Point) -> Bounds:
    """A candidate's: from where the best so far held, upwards in smaller steps."""
    growth = min(bounds.growth, 1.25)
    return msgspec.structs.replace(bounds, first=champion.load, least=champion.load, growth=growth)


def verdict(points: Sequence[Point], champion: Point | None, bounds: Bounds) -> tuple[Literal["measured", "left"], str]:
    """Of a candidate of which nothing more is to be measured."""
    found = best(points, bounds)
    if found is not None:
        return "measured", ""
    at = points[-1]
    where = "the load at which the best so far holds" if champion else "the smallest load"
    if at.partial:
        return "left", f"cannot be judged at {where}: {at.partial}"
    if at.client_bound:
        return "left", f"cannot be judged at {where}, since the load generator was full: {at.client_bound}"
    why = ", ".join(at.missed) or (f"{at.failed_share:.0%} failed" if at.failed_share else "it does not keep up")
    return "left", f"does not hold {where}: {why}"


def impossible(values: Candidate, gpus: int) -> str:
    """Why an engine with these settings cannot be started; "" where it may."""
    tensor = int(values.get("engines.tensor_parallel") or 1)
    replicas = int(values.get("engines.replicas") or 1)
    if gpus and tensor * replicas > gpus:
        return f"{tensor} x {replicas} GPUs are more than {gpus}"
    sequences = values.get("engines.engine_args.max-num-seqs") or values.get("engines.slots")
    tokens = values.get("engines.engine_args.max-num-batched-tokens")
    if isinstance(sequences, int) and isinstance(tokens, int) and tokens < sequences:
        return f"max-num-batched-tokens {tokens} is less than max-num-seqs {sequences}"
    return ""


class _Direction(msgspec.Struct, frozen=True):
    values: list[Any]
    climbs: bool  # one that is no better ends it


def _directions(dimension: Dimension, values: Candidate) -> list[_Direction]:
    """The values to try, nearest first, upwards and then downwards; all of them where there is no order, or where it
    is not known what is in force."""
    set_ = (values.get(name) for name in dimension.set)
    here = next((value for value in set_ if isinstance(value, int | float)), dimension.default)
    if not dimension.ordered or here is None:
        return [_Direction([value for value in dimension.values if value != here], False)]
    ordered = sorted(dimension.values)
    up = [value for value in ordered if value > here]
    down = [value for value in reversed(ordered) if value < here]
    return [_Direction(up, True), _Direction(down, True)]


def _without_effect_removed(candidate: Candidate, current: Candidate) -> dict[str, Any]:
    """Two ways to say the same are one candidate."""
    return {name: value for name, value in candidate.items() if name not in current or current[name] != value}


def profile(base: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    """A profile's content (maps of maps) with the candidate's settings put in."""
    made: dict[str, Any] = json.loads(json.dumps(base))
    if any(path in _SOURCES for path in candidate):
        made["model"] = {key: value for key, value in made.get("model", {}).items() if f"model.{key}" not in _SOURCES}
    for path, value in candidate.items():
        *parents, last = path.split(".", 2)  # an option of the engine may have a dot in its name
        inner = made
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return made


def name(candidate: Candidate) -> str:
    """For a person, and as a folder's name; `in force` is the configuration as it was found."""
    words = [f"{path.rpartition('.')[2]}={_word(value)}" for path, value in sorted(candidate.items())]
    return ",".join(words) or "in-force"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value).replace("/", "-")
