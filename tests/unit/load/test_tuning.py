"""Which configurations are tried, against engines whose best is known."""

from typing import Any

from vitalis_load import tuning
from vitalis_load.searching import Point, Step
from vitalis_load.sweeping import Bounds, best
from vitalis_load.tuning import Dimension, Space, Trial

BOUNDS = Bounds(unit="requests/s", first=2, most=200, confirm=1, precision=0.05)
SEQUENCES = Dimension("sequences", [16, 32, 64, 128, 256], ["engines.slots", "engines.engine_args.max-num-seqs"])
TOKENS = Dimension("batched tokens", [32, 2048, 8192], ["engines.engine_args.max-num-batched-tokens"])
INTERVAL = Dimension("stream interval", [1, 2, 4], ["engines.engine_args.stream-interval"], default=1)
KV = Dimension("kv", ["auto", "fp8"], ["engines.engine_args.kv-cache-dtype"])
LAYOUT = Dimension(
    "layout",
    [
        {"engines.tensor_parallel": 1, "engines.replicas": 2},
        {"engines.tensor_parallel": 2, "engines.replicas": 1},
        {"engines.tensor_parallel": 2, "engines.replicas": 2},
    ],
)
CURRENT = {
    "engines.slots": 64,
    "engines.engine_args.max-num-seqs": 64,
    "engines.engine_args.max-num-batched-tokens": 2048,
    "engines.tensor_parallel": 2,
    "engines.replicas": 1,
}


def capacity(candidate: dict[str, Any]) -> float:
    """Good requests per second: best with 128 sequences, 8192 tokens, interval 2 and two replicas."""
    values = CURRENT | candidate
    made = 20.0
    made *= {16: 0.4, 32: 0.7, 64: 1, 128: 1.3, 256: 1.1}[values["engines.slots"]]
    made *= {32: 0.1, 2048: 1, 8192: 1.2}[values["engines.engine_args.max-num-batched-tokens"]]
    made *= {1: 1, 2: 1.1, 4: 1.0}[values.get("engines.engine_args.stream-interval", 1)]
    made *= {"auto": 1, "fp8": 0.9}[values.get("engines.engine_args.kv-cache-dtype", "auto")]
    return made * (1.5 if values["engines.replicas"] == 2 else 1)


class Bench:
    """Goes through a search as `tune` does; what it measured is in `trials`, how often in `measured`."""

    def __init__(self, space: Space, failing: str = "") -> None:
        self.space, self.failing = space, failing
        self.trials: list[Trial] = []
        self.measured = 0

    def measure(self, candidate: dict[str, Any], step: Step) -> Point:
        self.measured += 1
        holds = capacity(candidate)
        met = step.load <= holds
        return Point(
            load=step.load, requests_per_second=step.load, tokens_per_second=100 * step.load, requests=2000,
            goodput=step.load if met else 0.1, slo_met=met, missed=[] if met else ["TTFT p99"], repeats=step.repeats,
        )  # fmt: skip

    def one(self) -> bool:
        progress = tuning.search(self.space, CURRENT, self.trials, BOUNDS, gpus=2)
        if progress.following is None:
            return False
        trial = Trial(candidate=progress.following)
        champion = next((t for t in self.trials if t.candidate == progress.winner), None)
        mark = best(champion.points, BOUNDS) if champion else None
        if self.failing and self.failing in tuning.name(trial.candidate):
            trial.state, trial.reason = "failed", "out of memory"
        else:
            while step := tuning.next_measurement(trial.points, mark, BOUNDS):
                trial.points.append(self.measure(trial.candidate, step))
            trial.state, trial.reason = tuning.verdict(trial.points, mark, BOUNDS)
        self.trials.append(trial)
        return True

    def whole(self) -> dict[str, Any]:
        while self.one():
            assert len(self.trials) < 60
        return tuning.search(self.space, CURRENT, self.trials, BOUNDS, gpus=2).winner


def test_the_best_configuration_is_found_and_most_are_not_tried():
    bench = Bench(Space([SEQUENCES, TOKENS, INTERVAL, KV, LAYOUT]))
    assert bench.whole() == {
        "engines.slots": 128,
        "engines.engine_args.max-num-seqs": 128,
        "engines.engine_args.max-num-batched-tokens": 8192,
        "engines.engine_args.stream-interval": 2,
        "engines.tensor_parallel": 1,
        "engines.replicas": 2,
    }
    assert len(bench.trials) <= 20, "of 5 x 3 x 3 x 2 x 3"
    assert bench.trials[0].candidate == {}, "the configuration in force comes first"
    tried = [tuning.key(trial.candidate) for trial in bench.trials]
    assert len(tried) == len(set(tried))


def test_a_bad_candidate_is_left_after_one_measurement():
    bench = Bench(Space([KV]))
    bench.whole()
    force, auto, fp8 = bench.trials
    assert len(fp8.points) == 1
    assert fp8.points[0].load == best(force.points, BOUNDS).load
    assert (fp8.state, fp8.reason) == ("left", "does not hold the load at which the best so far holds: TTFT p99")
    assert auto.state == "measured"


def test_what_cannot_be_started_is_not_tried():
    bench = Bench(Space([TOKENS, LAYOUT]))
    bench.whole()
    for trial in bench.trials:
        values = CURRENT | trial.candidate
        assert values["engines.tensor_parallel"] * values["engines.replicas"] <= 2
        assert values["engines.engine_args.max-num-batched-tokens"] >= 64


def test_one_that_fails_to_start_is_passed_over():
    bench = Bench(Space([SEQUENCES, TOKENS]), failing="max-num-seqs=128")
    winner = bench.whole()
    assert winner == {"engines.engine_args.max-num-batched-tokens": 8192}
    assert any(trial.state == "failed" for trial in bench.trials)


def test_after_an_interruption_it_goes_on_as_if_nothing_had_been():
    space = Space([SEQUENCES, TOKENS, INTERVAL, LAYOUT])
    whole = Bench(space)
    winner = whole.whole()
    for cut in range(len(whole.trials)):
        again = Bench(space)
        again.trials = whole.trials[:cut]
        assert again.whole() == winner
        assert [t.candidate for t in again.trials] == [t.candidate for t in whole.trials]


def test_where_nothing_held_the_first_that_does_is_better():
    assert tuning.better(
        Trial(candidate={"engines.slots": 1}, points=[_good(1)], state="measured"),
        Trial(candidate={}, points=[], state="left"), BOUNDS,
    )  # fmt: skip


def test_a_difference_within_the_noise_is_none():
    def trial(goodput: float, spread: float) -> Trial:
        return Trial(candidate={}, points=[_good(goodput, spread)], state="measured")

    assert not tuning.better(trial(10.2, 0), trial(10, 0), BOUNDS)
    assert tuning.better(trial(10.5, 0), trial(10, 0), BOUNDS)
    assert not tuning.better(trial(10.5, 0), trial(10, 0.18), BOUNDS)


def test_a_profile_is_the_base_with_the_candidate_in_it():
    base = {"engines": {"slots": 64, "device": "cuda", "engine_args": {"max-model-len": 4096}}}
    made = tuning.profile(base, {"engines.slots": 128, "engines.engine_args.max-num-seqs": 128})
    assert made == {
        "engines": {"slots": 128, "device": "cuda", "engine_args": {"max-model-len": 4096, "max-num-seqs": 128}}
    }
    assert base["engines"]["slots"] == 64
    assert tuning.name({"engines.slots": 128, "engines.engine_args.enforce-eager": True}) == (
        "enforce-eager=true,slots=128"
    )


def _good(goodput: float, spread: float = 0.0) -> Point:
    return Point(load=goodput, requests_per_second=goodput, tokens_per_second=1, goodput=goodput, spread=spread,
                 requests=2000)  # fmt: skip
