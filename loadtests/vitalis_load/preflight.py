"""Before anything is measured: the server answers, takes the keys, serves the model, and takes what the scenario asks.
And a little load for it to get warm, from which is learnt how its model counts words."""

import time
from collections.abc import Callable
from difflib import get_close_matches

import msgspec

from vitalis_load import plain_http, prompts, sampling, streams
from vitalis_load.asking import Arrival, Ask, Plan
from vitalis_load.client import PATHS
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.prompts import Tokenisation
from vitalis_load.records import Record
from vitalis_load.scenario import Scenario
from vitalis_load.target import Target

TRIES = 3
PAUSE_SECONDS = 2.0
WARM_INDEX = 1_000_000_007  # beyond every request that is measured
WARM_SECONDS = 120.0  # for all of them
MODELS_SHOWN = 8


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


def check(target: Target, scenario: Scenario, say: Callable[[str], None] = lambda _: None) -> Target:
    """The target with the model that is asked for. Raises LoadFailure with NO_TARGET."""
    served: list[str] | None = None
    labels = scenario.labels if target.keys else [""]
    for label in dict.fromkeys(["" if target.key("") else labels[0], *labels]):
        listed = _models(target, label)
        served = listed if served is None else served
    wanted = list(dict.fromkeys(task.model for task in scenario.tasks if task.model))
    if served is None:
        if not target.model and not all(task.model for task in scenario.tasks):
            raise LoadFailure(f"{target.url} does not list its models: name one with --model", Exit.NO_TARGET)
        return target
    model = target.model or (served[0] if served else "")
    for name in dict.fromkeys([model, *wanted]):
        if name not in served:
            near = get_close_matches(name, served, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it serves {_some(served)}"
            raise LoadFailure(f"{target.url} does not serve the model {name!r}; {hint}", Exit.NO_TARGET)
    if not target.model and len(served) > 1:
        say(f"the server has {_some(served)}; asking for {model} (--model names another)")
    return msgspec.structs.replace(target, model=model)


def watched(target: Target, say: Callable[[str], None]) -> Target:
    """The target with itself as its engine, where nothing was said of engines and it turns out to be a vLLM."""
    if target.engines or target.metrics_url:
        return target
    try:
        answer = plain_http.ask(target.url, "/metrics", token=target.key(""))
    except OSError:
        return target  # whoever asks it next says it
    if answer.status == 200 and sampling.engine_sample("", answer.body) is not None:
        return msgspec.structs.replace(target, engines={"engine": target.url}, gateway=False)
    say(
        "the server's queue, running and waiting requests and KV use are not sampled: name its engines with "
        "--engine NAME=ADDRESS, and the gateway's control with --metrics-url and --metrics-token-env"
    )
    return target


def warm(target: Target, scenario: Scenario, plan: Plan, say: Callable[[str], None]) -> Tokenisation:
    """Asks each task's kind of request a few times, none of which is measured. Returns how the model counts words.

    Raises LoadFailure with NO_TARGET where the server refuses what the scenario asks for."""
    seen: dict[str, list[tuple[int, int]]] = {}
    began = told = time.monotonic()
    whole = [plan.request(Arrival(0.0, task, WARM_INDEX)) for task in scenario.tasks]
    asks = [*((ask, False) for ask in plan.probes()), *((ask, True) for ask in whole)]
    for ask, needed in asks:
        if (now := time.monotonic()) - began > WARM_SECONDS:
            say(f"warming up was ended after {WARM_SECONDS:.0f} s; the first repeat may show a cold server")
            break
        if now - told > PAUSE_SECONDS:
            say(f"warming up: {ask.task.name}")
            told = now
        record = _ask(target, ask, scenario.deadline_seconds, needed=needed)
        if ask.words and record is not None and record.prompt_tokens:
            seen.setdefault(ask.api, []).append((ask.words, record.prompt_tokens))
    return prompts.fit_each(seen)


def _ask(target: Target, ask: Ask, seconds: float, *, needed: bool) -> Record | None:
    """One request; what a server that is busy or limits its callers refuses now is no obstacle."""
    what = f"task {ask.task.name}"
    for attempt in range(TRIES):
        last = attempt == TRIES - 1
        try:
            answer = plain_http.ask(
                target.url, PATHS[ask.api], document=ask.document, token=target.key(ask.key),
                headers={"anthropic-version": "2023-06-01"} if ask.api == "messages" else None, seconds=seconds,
            )  # fmt: skip
        except OSError as error:
            if last:
                raise LoadFailure(
                    f"{target.url} does not answer {what} ({plain_http.reason(error)}): look at the server's log",
                    Exit.NO_TARGET,
                ) from None
        else:
            if answer.status == 200:
                return _read(answer.body, ask)
            if answer.status == 429 or not needed:
                return None
            if answer.status < 500 or last:
                raise LoadFailure(
                    f"{target.url} refuses {what} with {answer.status}: {answer.words}{_remedy(answer.status)}",
                    Exit.NO_TARGET,
                )
        time.sleep(PAUSE_SECONDS)
    return None


def _read(body: bytes, ask: Ask) -> Record:
    reader = streams.reader(ask.api, ask.task.stream, lambda _gap, _now: None)
    reader.feed(body, 0.0)
    reader.close(0.0)
    record = Record(task=ask.task.name, api=ask.api, scheduled=0, sent=0, ended=0)
    reader.fill(record)
    return record


def _remedy(status: int) -> str:
    if status in (401, 403):
        return " (give the right key with --key-file or --key-env)"
    if status == 404:
        return " (does it serve this API and this model?)"
    return ""


def _models(target: Target, label: str) -> list[str] | None:
    """What this key may ask for; None where the server has no such list."""
    whose = f"the key of {label}" if label and target.keys.get(label) else "the key"
    try:
        answer = plain_http.ask(target.url, "/v1/models", token=target.key(label))
    except OSError as error:
        raise LoadFailure(
            f"nothing answers at {target.url} ({plain_http.reason(error)}): is the server running, and is the address "
            "right?", Exit.NO_TARGET,
        ) from None  # fmt: skip
    if answer.status in (401, 403):
        given = whose if target.key(label) else "a request without a key"
        raise LoadFailure(
            f"{target.url} refuses {given} ({answer.status}: {answer.words}): give the right one with --key-file, "
            "--key-env or --keys", Exit.NO_TARGET,
        )  # fmt: skip
    if answer.status in (404, 405, 501):
        return None
    if answer.status != 200:
        raise LoadFailure(
            f"{target.url} answers {answer.status} when asked for its models: {answer.words}", Exit.NO_TARGET
        )
    try:
        return [model.id for model in msgspec.json.decode(answer.body, type=_Models).data]
    except msgspec.DecodeError:
        raise LoadFailure(f"what answers at {target.url} is no such server: {answer.words}", Exit.NO_TARGET) from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MODELS_SHOWN} more" if len(names) > MODELS_SHOWN else ""
    return (", ".join(names[:MODELS_SHOWN]) or "no model") + more
