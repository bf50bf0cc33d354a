"""Whether two runs differ is told apart from how far the same run differs from itself."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from vitalis_load import result
from vitalis_load.comparison import Comparison, compare, load_changes
from vitalis_load.errors import LoadFailure
from vitalis_load.result import Result

from tests.support import measured
from tests.support.measured import Load, Server

LOAD = Load(rate=15, seconds=20, warmup=2, cooldown=2)


def made(folder: Path, name: str, server: Server | None = None, load: Load = LOAD, **more: Any) -> Result:
    return result.build(measured.write(folder / name, server or Server(), load, **more))


def verdicts(found: Comparison) -> dict[str, str]:
    return {each.key: each.verdict for each in found.differences if each.judged}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return made(tmp_path_factory.mktemp("base"), "base")


def test_the_same_server_twice_is_no_difference(base: Result, tmp_path: Path) -> None:
    """Five more runs of it: of the 55 verdicts hardly one may be wrong by chance."""
    wrong = []
    for seed in range(2, 7):
        found = compare(base, made(tmp_path, f"same-{seed}", seed=seed))
        wrong += [key for key, verdict in verdicts(found).items() if verdict != "same"]
    assert len(verdicts(found)) >= 10
    assert len(wrong) <= 2, wrong


def test_a_slower_server_is_worse_and_the_other_way_better(base: Result, tmp_path: Path) -> None:
    slower = made(tmp_path, "slower", Server(step=0.016), seed=4)
    found = compare(base, slower)
    assert found.verdict == "worse"
    assert found.worse
    assert verdicts(found)["tpot_p50"] == "worse"
    tpot = next(each for each in found.differences if each.key == "tpot_p50")
    assert tpot.change == pytest.approx(0.35, abs=0.1)
    back = compare(slower, base)
    assert back.verdict == "better"
    assert not back.worse
    assert verdicts(back)["tpot_p50"] == "better"


def test_failures_are_weighed_by_how_many_requests_there_were(base: Result, tmp_path: Path) -> None:
    failing = compare(base, made(tmp_path, "failing", Server(failing=0.1), seed=5))
    assert verdicts(failing)["failed_share"] == "worse"
    share = next(each for each in failing.differences if each.key == "failed_share")
    assert share.said.endswith(" points")
    # two of some nine hundred are chance
    few = made(tmp_path, "few", seed=6)
    few.figures["failed_share"] = few.figures["failed_share"].__class__(
        values=[0.0, 0.003, 0.003], median=0.003, mean=0.002, min=0.0, max=0.003, low=0.0, high=0.0, deviation=0.0017
    )
    assert verdicts(compare(base, few))["failed_share"] == "same"


def test_single_repeats_tell_only_large_differences(tmp_path: Path) -> None:
    one = made(tmp_path, "one", repeats=1)
    near = compare(one, made(tmp_path, "near", Server(step=0.0125), repeats=1, seed=3))
    far = compare(one, made(tmp_path, "far", Server(step=0.02), repeats=1, seed=3))
    assert verdicts(near)["tpot_p50"] == "same"
    assert verdicts(far)["tpot_p50"] == "worse"
    assert any("one repeat" in caveat for caveat in near.caveats)


def test_another_load_is_refused_and_named(base: Result, tmp_path: Path) -> None:
    other = made(tmp_path, "other", load=Load(rate=30, seconds=20, warmup=2, cooldown=2))
    with pytest.raises(LoadFailure, match=r"scenario\.arrivals\.rate: 15 against 30.*--anyway"):
        compare(base, other)
    found = compare(base, other, anyway=True)
    assert found.load_differs
    assert "asked different things" in found.caveats[0]
    scale = made(tmp_path, "scale", changes={"scale": "small"})
    with pytest.raises(LoadFailure, match="scale: full against small"):
        compare(base, scale)


@pytest.mark.parametrize(("place", "content", "same"), [("/a/t", "1", True), ("/b/t", "1", True), ("/a/t", "2", False)])
def test_a_trace_is_what_is_in_it_wherever_it_lies(base: Result, place: str, content: str, same: bool) -> None:
    def replayed(path: str, digest: str) -> Result:
        asked = base.run.scenario | {"arrivals": {"kind": "trace", "path": path}}
        asked["expected"] = {**asked.get("expected", {}), "files": {"arrivals": digest}}
        return msgspec.structs.replace(base, run=msgspec.structs.replace(base.run, scenario=asked))

    changes = [change.what for change in load_changes(replayed("/a/t", "1"), replayed(place, content))]
    assert changes == ([] if same else ["scenario.files.arrivals"])


def test_what_else_differs_and_what_spoils_it_is_told(base: Result, tmp_path: Path) -> None:
    changes = {"commit": "abc+changes", "machine": {"cpu": "another", "cores": 2}}
    slo = Load(rate=15, seconds=20, warmup=2, cooldown=2, cpu=0.99, slo={"ttft_p99_ms": 500})
    other = made(tmp_path, "other", Server(slots=64, drift=0.5), slo, seed=2, changes=changes)
    found = compare(base, other)
    told = {change.what: (change.a, change.b) for change in found.changed}
    assert told["commit"] == ("0123456789ab", "abc+changes")
    assert told["target.engine_options.max_num_seqs"] == ("48", "64")
    assert told["slo.ttft_p99_ms"] == ("2000.0", "500.0")
    words = "\n".join(found.caveats)
    for part in ("client-bound", "SLOs differ", "different machines", "Answers were -5"):
        assert part in words
    assert "goodput" not in verdicts(found)
