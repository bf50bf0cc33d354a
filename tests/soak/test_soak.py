"""What only time shows: a storm, a long steady load, a worker killed again and again.

`make soak` runs it with SOAK_SECONDS (600) of load: two fifths each for the first two, the rest for the third.
Nothing here judges speed: latencies are printed, and bounded only where they would mean that something piles up."""

import os
import random
import signal
import statistics
import time
from functools import partial
from pathlib import Path

import pytest

from tests.integration.test_gateway_trouble import BEFORE, LATER, MIDDLE
from tests.soak.clients import Clients, judge
from tests.soak.site import ENGINES, Site, open_files, site
from tests.support import client, engines, gateway

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
GROWTH_BYTES = 4 << 20  # what a worker's memory may seem to grow by over two thirds of the steady load
GROWTH_DESCRIPTORS = 4
MANNERS = ["polite"] * 6 + ["slow", "leaving", "leaving", "stranger", "garbage"]
STEADY = ["polite"] * 12 + ["slow", "slow", "leaving", "leaving", "stranger", "garbage"]  # more than there are slots
TROUBLES = [
    *[rule for rule, _, _ in BEFORE],
    *[{"after_events": LATER, **rule} for rule, _ in MIDDLE],
    {"kind": "status", "status": 503}, {"kind": "silent"}, {"kind": "stale"}, {"kind": "dribble"},
    {"kind": "delay", "seconds": 0.5}, {"kind": "stream_error", "after_events": LATER},
]  # fmt: skip

pytestmark = [pytest.mark.soak, pytest.mark.timeout(SECONDS + 600)]


def storm(made: Site, until: float) -> None:
    """One engine after another is spoilt, closed, frozen or killed, and made well again."""
    dice = random.Random(7)
    while time.monotonic() < until:
        index = dice.randrange(ENGINES)
        engine = made.engines[index]
        match dice.choice(["kill", "refuse", "freeze", *["spoil"] * 6]):
            case "kill":
                made.restart(index, dice.random() * 2)
            case "spoil":
                for rule in dice.sample(TROUBLES, 3):
                    engine.misbehave(requests=dice.randint(1, 5), **rule)
                time.sleep(dice.random() * 2)
            case kind:
                engine.misbehave(kind)
                time.sleep(dice.random() * 2)
                engine.reset()
    for engine in made.engines:
        engine.reset()


def every_answer_is_right(made: Site) -> None:
    for api in gateway.APIS:
        for stream in (False, True):
            data = gateway.request(api, stream=stream, headers={"authorization": f"Bearer {made.stack.key}"})
            assert judge(api, client.ask(made.stack.url, data, 25), stream, gateway.TOKENS) == "whole"


def test_after_a_storm_nothing_is_left(tmp_path: Path) -> None:
    with site(tmp_path, step_ms=2) as made:
        every_answer_is_right(made)
        before = made.descriptors()
        with Clients(made, MANNERS) as crowd:
            storm(made, time.monotonic() + SECONDS * 0.4)
        crowd.check()
        asked = sum(count for name, count in crowd.outcomes.items() if name.startswith("polite"))
        assert crowd.outcomes["polite whole"] > asked / 2
        made.stack.wait_ready(ENGINES, 60)
        every_answer_is_right(made)
        made.quiet(before)


def first_bytes(made: Site) -> float:
    """The median time to the first byte, in seconds, when nobody else asks."""
    took = []
    for _ in range(200):
        data = gateway.request("chat", tokens=1, headers={"authorization": f"Bearer {made.stack.key}"})
        began = time.monotonic()
        with client.connect(made.stack.url) as wire:
            wire.send(data)
            assert wire.read_head(25).status == 200
            took.append(time.monotonic() - began)
    return statistics.median(took)


def test_a_steady_load_makes_nothing_grow(tmp_path: Path) -> None:
    """An hour pressed together: all APIs, tenants and classes, a queue, clients that leave and that read slowly, and
    an engine's failure every second, most of them retried. By slope over the last two thirds; the first is the
    warm-up."""
    seconds, dice = SECONDS * 0.4, random.Random(11)
    with site(tmp_path, step_ms=1, slots=2) as made:
        before, worker = made.descriptors(), made.processes()["worker-0"]
        page = os.sysconf("SC_PAGE_SIZE")
        samples: list[tuple[float, int, int]] = []  # when, bytes resident, descriptors
        every_answer_is_right(made)
        quick, spoilt, queued = first_bytes(made), 0.0, 0.0
        with Clients(made, STEADY) as crowd:
            began = time.monotonic()
            while (now := time.monotonic() - began) < seconds:
                resident = int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * page
                samples.append((now, resident, len(open_files(worker))))
                if now - spoilt >= 1:
                    spoilt = now
                    made.engines[dice.randrange(ENGINES)].misbehave(requests=1, **dice.choice(TROUBLES))
                    queued = max(queued, made.gauges()["vitalis_queued"])
                time.sleep(seconds / 300)
        crowd.check()
        third = seconds / 3
        warm = [sample for sample in samples if sample[0] >= third]
        slope, _ = statistics.linear_regression([at for at, _, _ in warm], [float(size) for _, size, _ in warm])
        growth = slope * 2 * third
        middle, last = [s for s in warm if s[0] < 2 * third], [s for s in warm if s[0] >= 2 * third]
        descriptors = [statistics.median(fds for _, _, fds in part) for part in (middle, last)]
        times = [
            statistics.median(took for at, took in crowd.latencies if low <= at - began < low + third)
            for low in (third, 2 * third)
        ]
        for engine in made.engines:
            engine.reset()
        made.stack.wait_ready(ENGINES, 60)
        said, late = made.stack.metrics(), first_bytes(made)
        print(f"{sum(crowd.outcomes.values()) / seconds:.0f} requests/s, {said['vitalis_retries_total']:.0f} retries,"
              f" up to {queued:.0f} queued; resident {warm[0][1] >> 10} to {warm[-1][1] >> 10} KiB, by slope"
              f" {growth / 1024:+.0f} KiB; descriptors {descriptors}; median under load {times[0] * 1e3:.1f} and"
              f" {times[1] * 1e3:.1f} ms, first byte at rest before {quick * 1e3:.1f} and after {late * 1e3:.1f} ms"
              )  # fmt: skip
        assert said["vitalis_retries_total"] > 0
        assert queued > 0
        assert growth <= GROWTH_BYTES
        assert descriptors[1] <= descriptors[0] + GROWTH_DESCRIPTORS
        assert times[1] <= 5 * times[0] + 0.25
        assert late <= 3 * quick + 0.05
        every_answer_is_right(made)
        made.quiet(before)


def test_a_worker_killed_again_and_again_is_replaced(tmp_path: Path) -> None:
    """Connections break; no stream that broke looks whole, every other answer is right, and nothing piles up."""
    with site(tmp_path, step_ms=2) as made:
        every_answer_is_right(made)
        before, kills, until = made.descriptors(), 0, time.monotonic() + SECONDS * 0.2
        with Clients(made, MANNERS, breaks=True) as crowd:
            while kills < 3 or time.monotonic() < until:
                doomed = made.processes()["worker-0"]
                os.kill(doomed, signal.SIGKILL)
                kills += 1
                wanted = crowd.outcomes["polite whole"] + 20
                engines.until(partial(crowd.has, "polite whole", wanted), 60, "answers from the next worker")
                assert made.processes()["worker-0"] not in (None, doomed)
        crowd.check()
        print(f"{kills} kills")
        made.stack.wait_ready(ENGINES, 60)
        every_answer_is_right(made)
        made.quiet(before)
