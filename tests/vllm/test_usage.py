"""What the gateway counts, against what real engines count themselves: to the token for what finished, near for what
was left. The engine's counters are read before and after each request, while nothing else runs."""

import itertools
import json
import time
import warnings
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import client
from tests.support.client import Response
from tests.support.engines import Stack, until

pytestmark = pytest.mark.filterwarnings("default::pytest.PytestWarning")

MODEL = "gpt-oss-tiny"
QUESTION = "What is the capital of France?"
REASONING = "The user asks for a capital city."
WEATHER = "What is the weather in Paris?"
COUNTING = "Count to two hundred."  # 400 tokens
ENDLESS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "The capital of France is", "max_tokens": 3000, "ignore_eos": True},
}
MANUAL = "You are a helpful assistant. " * 100  # 600 tokens: an engine on CPU keeps blocks of 128
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# A shared machine stands still now and then, and with it the way of a client's leave; not each time.
ATTEMPTS = 3
_ids = itertools.count()


def document(api: str, text: str, *, manual: str = "", **more: Any) -> dict[str, Any]:
    """A question, below instructions where there are any."""
    asked: dict[str, Any]
    if api == "chat":
        asked = {"messages": [*([{"role": "system", "content": manual}] if manual else []), user(text)]}
    elif api == "completions":
        asked = {"prompt": f"{manual} {text}" if manual else text}
    elif api == "responses":
        asked = {"input": text} | ({"instructions": manual} if manual else {})
    else:
        asked = {"messages": [user(text)], "max_tokens": 1000} | ({"system": manual} if manual else {})
    return {"model": MODEL, "temperature": 0} | asked | more


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tool(api: str) -> dict[str, Any]:
    if api == "messages":
        return {"name": "get_weather", "description": "Current weather in a city", "input_schema": CITY}
    function = {"name": "get_weather", "description": "Current weather in a city", "parameters": CITY}
    return {"type": "function", "function": function} if api == "chat" else {"type": "function", **function}


ALL_ALONG = {"include_usage": True, "continuous_usage_stats": True}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "chat": {
        "question": document("chat", QUESTION),
        "several": document("chat", QUESTION, n=2, temperature=0.2, max_tokens=60),
        "tool": document("chat", WEATHER, tools=[tool("chat")]),
        "cut": document("chat", COUNTING, max_tokens=30),
        "usage asked": document("chat", QUESTION, stream_options={"include_usage": True}),
        "usage all along": document("chat", QUESTION, stream_options=ALL_ALONG),
    },
    "completions": {
        "question": document("completions", "The capital of France is"),
        "several": document("completions", "The capital of France is", n=2, temperature=0.2),
        "several prompts": document("completions", "") | {"prompt": ["The capital of France is", "Two and two"]},
        "usage asked": document("completions", "The capital of France is", stream_options={"include_usage": True}),
    },
    "responses": {
        "question": document("responses", QUESTION),
        "tool": document("responses", WEATHER, tools=[tool("responses")]),
        "cut": document("responses", COUNTING, max_output_tokens=30),
    },
    "messages": {
        "question": document("messages", QUESTION),
        "tool": document("messages", WEATHER, tools=[tool("messages")]),
        "cut": document("messages", COUNTING, max_tokens=30),
    },
}
FINISHED = [
    (api, what, stream)
    for api, cases in CASES.items()
    for what in ("cached", *cases)
    for stream in (False, True)
    if stream or not what.startswith("usage")
]


@dataclass(frozen=True)
class Tokens:
    prompt: float
    cached: float
    completion: float

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.cached - other.cached, self.completion - other.completion)


def of_engines(tree: Stack) -> Tokens:
    """As both engines counted since they were started, once nothing runs."""
    tree.idle()
    both = [engine.metrics() for engine in tree.engines()]
    names = ("vllm:prompt_tokens_total", "vllm:prompt_tokens_cached_total", "vllm:generation_tokens_total")
    return Tokens(*(sum(metrics[name] for metrics in both) for name in names))


class Count:
    """What one request is counted as: by engines, in the access log, in the gateway's metrics. Made before it."""

    def __init__(self, tree: Stack) -> None:
        self.tree = tree
        self.name = f"usage-{next(_ids)}-{time.time_ns()}"
        self._engines, self._metrics = of_engines(tree), tree.metrics()

    def post(self, api: str, body: dict[str, Any]) -> bytes:
        headers = {"authorization": f"Bearer {self.tree.key}", "x-request-id": self.name}
        return client.post(PATHS[api], body, headers)

    def ask(self, api: str, body: dict[str, Any]) -> Response:
        answer = client.ask(self.url, self.post(api, body), 60)
        assert answer.status == 200, answer.body
        return answer

    @property
    def url(self) -> str:
        host, port = self.tree.address
        return f"http://{host}:{port}"

    def engines(self) -> Tokens:
        return of_engines(self.tree) - self._engines

    def record(self) -> dict[str, Any]:
        """With the defaults that it leaves out."""
        path = self.tree.data / "log" / "access.jsonl"
        found: list[dict[str, Any]] = []

        def there() -> bool:
            lines = path.read_text().splitlines() if path.exists() else []
            found[:] = [json.loads(line) for line in lines if self.name in line]
            return bool(found)

        until(there, 5, f"the record of {self.name}")
        (record,) = found
        nothing = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0}
        return nothing | {"estimated": False} | record

    def metrics(self) -> dict[str, float]:
        after = self.tree.metrics()
        kinds = ("prompt", "cached", "completion", "reasoning", "estimated")
        return {
            kind: after.get(name, 0) - self._metrics.get(name, 0)
            for kind in kinds
            for name in [f"vitalis_{kind}_tokens_total"]
        }


@pytest.fixture(autouse=True)
def ready(pair: Stack) -> None:
    pair.wait_ready(2)


def assert_finished(count: Count, prompts: int) -> dict[str, Any]:
    """To the token; the record. `prompts`: how often the engine computes a prompt that is counted once."""
    ours, theirs, metrics = count.record(), count.engines(), count.metrics()
    assert ours["outcome"] == "ok"
    assert not ours["estimated"]
    assert (ours["prompt_tokens"] * prompts, ours["completion_tokens"]) == (theirs.prompt, theirs.completion)
    assert ours["cached_tokens"] == theirs.cached
    assert metrics == {
        "prompt": ours["prompt_tokens"],
        "cached": ours["cached_tokens"],
        "completion": ours["completion_tokens"],
        "reasoning": ours["reasoning_tokens"],
        "estimated": 0,
    }
    return ours


@pytest.mark.parametrize(("api", "what", "stream"), FINISHED)
def test_finished(pair: Stack, api: str, what: str, stream: bool) -> None:
    # Of instructions that were never given before; cached the second time.
    anew = document(api, QUESTION, manual=f"{next(_ids)}. {MANUAL}")
    body = CASES[api].get(what, anew) | {"stream": stream}
    for cached in (False, True) if what == "cached" else (False,):
        count = Count(pair)
        answer = count.ask(api, body)
        ours = assert_finished(count, body.get("n", 1))
        assert ours["prompt_tokens"] > 4
        assert ours["completion_tokens"] > 2
        assert (ours["cached_tokens"] > 0) == cached
        assert ours["cached_tokens"] < ours["prompt_tokens"]
        # Completions are not told to reason, and Messages does not say how much of an answer is.
        assert (0 < ours["reasoning_tokens"] < ours["completion_tokens"]) == (api in ("chat", "responses"))
        if what == "tool":
            assert b"get_weather" in answer.body
        if what == "cut":
            assert ours["completion_tokens"] == 30
        if stream and api in ("chat", "completions"):
            assert (b'"usage":{' in answer.body) == what.startswith("usage")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_reasoning_tokens_are_those_of_the_reasoning(pair: Stack, api: str, stream: bool) -> None:
    count = Count(pair)
    answer = count.ask(api, document(api, QUESTION, stream=stream))
    if not stream:
        assert REASONING in answer.body.decode()
    asked = client.post("/tokenize", {"model": MODEL, "prompt": REASONING}, {"authorization": f"Bearer {pair.key}"})
    assert count.record()["reasoning_tokens"] == client.ask(count.url, asked).json["count"]


def test_refused_by_the_engine(pair: Stack) -> None:
    """Nothing used, and nothing estimated."""
    count = Count(pair)
    answer = client.ask(
        count.url, count.post("chat", document("chat", QUESTION, n=2)), 60
    )  # greedy: both would be the same
    assert answer.status == 400
    ours = count.record()
    assert (ours["outcome"], ours["prompt_tokens"], ours["completion_tokens"]) == ("refused", 0, 0)
    assert not ours["estimated"]
    assert count.engines() == Tokens(0, 0, 0)
    assert set(count.metrics().values()) == {0}


def leave(tree: Stack, api: str, events: int) -> str:
    """A stream whose client leaves after so many events: empty if what was counted is near enough, else how far off."""
    count = Count(tree)
    with client.connect(count.url) as wire:
        wire.send(count.post(api, document(api, COUNTING, stream=True) | ENDLESS.get(api, {})))
        stream = wire.events(wire.read_head(30), 30)
        for _ in range(events):
            next(stream)
    ours, theirs, metrics = count.record(), count.engines(), count.metrics()
    assert (ours["outcome"], ours["estimated"]) == ("client_gone", True)
    assert ours["completion_tokens"] > 0
    assert metrics["completion"] == 0
    # Messages tells its prompt at the start.
    told = api == "messages"
    assert ours["prompt_tokens"] == theirs.prompt if told else ours["prompt_tokens"] > 0
    assert metrics["prompt"] == (ours["prompt_tokens"] if told else 0)
    assert metrics["estimated"] == ours["completion_tokens"] + (0 if told else ours["prompt_tokens"])
    if abs(ours["completion_tokens"] - theirs.completion) <= max(8, theirs.completion * 0.02):
        return ""
    return f"counted {ours['completion_tokens']} tokens, the engine {theirs.completion:g}"


@pytest.mark.parametrize("events", [12, 70])  # in reasoning or just behind it, and far behind it
@pytest.mark.parametrize("api", PATHS)
def test_clients_that_leave_a_stream(pair: Stack, api: str, events: int) -> None:
    """Within 8 tokens or 2 % of what the engine generated."""
    off: list[str] = []
    while why := leave(pair, api, events):
        off.append(why)
        assert len(off) < ATTEMPTS, "\n".join(off)
    if off:
        warnings.warn(pytest.PytestWarning("\n".join(off)), stacklevel=2)


def test_a_client_that_leaves_a_plain_request(pair: Stack) -> None:
    """Nobody saw a token: the time says how many there may be, and they are counted apart."""
    count = Count(pair)
    generated = sum(engine.generated() for engine in pair.engines())
    with client.connect(count.url) as wire:
        wire.send(count.post("chat", document("chat", COUNTING)))
        until(lambda: sum(engine.generated() for engine in pair.engines()) > generated + 20, 30, "tokens are made")
    ours, metrics = count.record(), count.metrics()
    assert (ours["outcome"], ours["estimated"]) == ("client_gone", True)
    assert ours["prompt_tokens"] > 0
    assert ours["completion_tokens"] > 0
    assert metrics == dict.fromkeys(metrics, 0) | {"estimated": ours["prompt_tokens"] + ours["completion_tokens"]}
    pair.idle()
