"""Tokens in a worker's report: what engines counted, and apart from it what was estimated."""

from vitalis_serve.gateway.counters import Counters
from vitalis_serve.gateway.usage import Usage


def test_estimated_tokens_are_in_no_other_count() -> None:
    counters = Counters()
    counts = counters.routes["a"]
    counts.count(Usage(100, 60, 50, 20))
    counts.count(Usage(10, 4, 7, completion_estimated=True))
    counts.count(Usage(1000, 0, 5, prompt_estimated=True, completion_estimated=True))
    reported = {
        (name, labels.get("kind", "")): value
        for name, labels, value in counters.report([], [])["counters"]
        if labels.get("route") == "a"
    }
    assert reported == {
        ("vitalis_prompt_tokens_total", ""): 110,
        ("vitalis_cached_tokens_total", ""): 64,
        ("vitalis_completion_tokens_total", ""): 50,
        ("vitalis_reasoning_tokens_total", ""): 20,
        ("vitalis_estimated_tokens_total", "prompt"): 1000,
        ("vitalis_estimated_tokens_total", "completion"): 12,
    }
