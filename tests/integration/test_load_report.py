"""The pages of the load tests, made by the commands and looked at in a real browser."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_load import result
from vitalis_load.report import page
from vitalis_load.result import Sweep

from tests.support import browser, measured
from tests.support.measured import Load, Server

ROOT = Path(__file__).resolve().parents[2]
LOAD = Load(
    rate=10,
    seconds=16,
    warmup=3,
    cooldown=3,
    peak=2,
    tenants=("acme", "umbrella"),
    classes=("normal", "emergency"),
    slo={"ttft_p99_ms": 2000, "tpot_p99_ms": 40, "failed_share": 0.1},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good: a plain run with everything there is. slower: the same load, slower server. bound: client-bound, killed."""
    folder = tmp_path_factory.mktemp("runs")
    measured.write(folder / "good", Server(failing=0.04, engines=2, gpus=2), LOAD)
    measured.write(folder / "slower", Server(step=0.03, engines=2), LOAD, seed=7, changes={"commit": "fedcba"})
    bound = Load(rate=6, seconds=10, warmup=2, cooldown=2, late=0.04, cpu=0.98, slo={"ttft_p99_ms": 50})
    killed = measured.write(folder / "bound", Server(), bound, name="<script>alert(1)</script>")
    (killed / "repeat-3" / "end.json").unlink()
    with (killed / "repeat-3" / "requests.jsonl").open("a") as file:
        file.write('{"task": "ch')
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Chromium]:
    with browser.started() as running:
        yield running


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT / "loadtests")}
    argv = [sys.executable, "-m", "vitalis_load", *map(str, arguments)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_made_again_is_looked_at_wide_narrow_and_dark(runs: Path, chromium: browser.Chromium) -> None:
    done = command("report", runs / "good")
    assert done.returncode == 0, done.stderr
    assert "output tokens/s" in done.stdout
    assert json.loads((runs / "good" / "result.json").read_text())["schema"] == "vitalis-load-result/1"

    shown = chromium.open(runs / "good" / "report.html")
    assert shown.evaluate("document.documentElement.dataset.ready") == "yes"  # its script ran, under its own policy
    assert only_itself(shown, runs / "good" / "report.html")
    headings = shown.evaluate("[...document.querySelectorAll('section h2')].map(h => h.textContent)")
    assert {"SLO", "Throughput against latency", "Distributions", "Timelines", "Failures", "Tokens"} <= set(headings)
    titles = shown.evaluate("[...document.querySelectorAll('.panel:nth-of-type(2) h4')].map(h => h.textContent)")
    assert {"Requests per second", "TTFT", "Gateway", "KV cache used", "GPU use", "GPU power, W"} <= set(titles)
    assert whole_drawings(shown) == []
    assert overflow(shown) <= 0
    light = shown.screenshot()
    assert len(light) > 30_000

    shown.size(1280, 900, dark=True)
    assert brightness(shown) < 60
    assert shown.screenshot() != light
    shown.size(390, 800)
    assert brightness(shown) > 200
    assert overflow(shown) <= 0
    assert smallest_text(shown) >= 9
    assert shown.complaints == []


def test_a_crosshair_goes_through_all_timelines_of_the_repeat_that_is_chosen(
    runs: Path, chromium: browser.Chromium
) -> None:
    made = result.load(runs / "good")
    page.write(made, runs / "good.html")
    shown = chromium.open(runs / "good.html", height=1200)
    before = "document.querySelector('.choices label:nth-of-type(2)').scrollIntoView({block: 'start'});"
    place = shown.evaluate(before + middle("document.querySelector('.choices label:nth-of-type(2)')"))
    shown.click(*place)
    visible = "[...document.querySelectorAll('.panel')].map(p => p.getBoundingClientRect().height > 0)"
    assert shown.evaluate(visible) == [False, True, False]

    plots = "[...document.querySelectorAll('.panel')][1].querySelectorAll('.plot.time')"
    shown.evaluate(f"[...{plots}][0].scrollIntoView({{block: 'center'}})")
    shown.move(*shown.evaluate(middle(f"[...{plots}][0].querySelector('svg')")))
    told = shown.evaluate(f"[...{plots}].map(p => [...p.querySelectorAll('.key b')].map(b => b.textContent))")
    assert all(value for values in told for value in values), told
    # the first is what the result says of that moment
    timeline = made.repeats[1].timeline
    due = float(told[0][0].replace(",", ""))
    assert any(due == pytest.approx(value, rel=0.01) for value in timeline.scheduled if value)
    assert shown.complaints == []


def test_what_spoils_a_run_stands_first(runs: Path, chromium: browser.Chromium) -> None:
    done = command("report", runs / "bound")
    assert done.returncode == 1, done.stdout  # its SLO
    assert "CLIENT-BOUND" in done.stdout
    assert "repeat 3 was killed" in done.stdout

    shown = chromium.open(runs / "bound" / "report.html")
    banners = shown.evaluate("[...document.querySelectorAll('.banner strong')].map(b => b.textContent)")
    assert "bottleneck" in banners[0]
    assert "partial" in banners[1]
    assert "missed" in banners[2]
    above = shown.evaluate(
        "document.querySelector('.banner').getBoundingClientRect().top"
        " < document.querySelector('.tiles').getBoundingClientRect().top"
    )
    assert above
    assert shown.evaluate("document.querySelector('h1').textContent").startswith("<script>alert(1)</script>")
    assert shown.complaints == []


def test_two_runs_are_drawn_side_by_side(runs: Path, chromium: browser.Chromium) -> None:
    done = command("compare", runs / "good", runs / "slower", "--html", runs / "both.html")
    assert done.returncode == 1, done.stderr
    assert re.search(r"TPOT p50 .*worse", done.stdout), done.stdout
    shown = chromium.open(runs / "both.html")
    assert "worse" in shown.evaluate("document.querySelector('.banner strong').textContent")
    assert shown.evaluate("document.querySelectorAll('#differences td svg').length") >= 8
    assert "commit" in shown.evaluate("document.querySelector('#changed').textContent")
    assert whole_drawings(shown) == []
    shown.size(390, 800)
    assert overflow(shown) <= 0
    assert only_itself(shown, runs / "both.html")
    assert shown.complaints == []


def test_what_cannot_be_compared_or_written_is_one_sentence(runs: Path) -> None:
    differs = command("compare", runs / "good", runs / "bound")
    assert (differs.returncode, differs.stdout) == (2, "")
    assert "scenario.arrivals.rate: 10" in differs.stderr
    full = command("report", runs / "good", "--html", "/proc/nowhere/report.html")
    assert full.returncode == 4
    nothing = command("report")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    described = command("report", "--schema")
    assert described.returncode == 0
    assert "properties" in json.loads(described.stdout)["$defs"]["Result"]
    for failed in (differs, full, nothing):
        assert failed.stderr.startswith("vitalis-load: ")
        assert failed.stderr.count("\n") == 1, failed.stderr


def test_curves_of_several_sweeps(runs: Path, chromium: browser.Chromium) -> None:
    made = result.load(runs / "good")
    points = [result.point(load, made, run=f"runs/{load:g}") for load in (2.0, 4.0, 8.0)]
    points[2].met, points[2].missed = False, ["ttft_p99_ms"]
    sweeps = [
        Sweep(id="s", label=label, unit="requests/s", run=made.run, slo=made.slo, points=points, best=4.0)
        for label in ("direct", "gateway")
    ]
    page.write_sweep(sweeps, runs / "sweep.html", title="Direct & through the gateway", evidence=["Found <so>."])
    shown = chromium.open(runs / "sweep.html")
    assert shown.evaluate("document.querySelector('h1').textContent") == "Direct & through the gateway"
    assert shown.evaluate("document.querySelectorAll('#curves .ring').length") >= 4
    assert "TTFT p99" in shown.evaluate("document.querySelector('#points .lost').parentElement.textContent")
    assert whole_drawings(shown) == []
    shown.size(390, 800)
    assert overflow(shown) <= 0
    assert shown.complaints == []


def only_itself(shown: browser.Page, path: Path) -> bool:
    return {url for url in shown.asked if not url.startswith("data:")} == {path.resolve().as_uri()}


def whole_drawings(shown: browser.Page) -> list[Any]:
    """What of the drawings is broken: no size, or coordinates that are none."""
    return list(
        shown.evaluate(
            "[...document.querySelectorAll('svg')].filter(s => /NaN|Infinity|undefined/.test(s.outerHTML)"
            " || (s.checkVisibility() && (s.getBoundingClientRect().height < 5 || !s.children.length)))"
            ".map(s => s.getAttribute('aria-label'))"
        )
    )


def overflow(shown: browser.Page) -> float:
    """By how many pixels the page is wider than its window."""
    return float(shown.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def brightness(shown: browser.Page) -> float:
    colour = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(map(float, re.findall(r"[\d.]+", colour)[:3]))


def smallest_text(shown: browser.Page) -> float:
    """Pixels of the smallest letters of any drawing that is to be seen."""
    return float(
        shown.evaluate(
            "Math.min(...[...document.querySelectorAll('svg')]"
            ".filter(s => s.checkVisibility() && s.querySelector('text'))"
            ".map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width"
            " * parseFloat(getComputedStyle(s.querySelector('text')).fontSize)))"
        )
    )


def middle(element: str) -> str:
    return (
        f"(() => {{ const b = {element}.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
    )
