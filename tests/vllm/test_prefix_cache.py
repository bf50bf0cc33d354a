"""Engines' prefix caches, through the whole tree: conversations come home to what was computed for them, and no tenant
reaches what was computed for another.

An engine on CPU keeps blocks of 128 tokens, so prompts here are far longer. What came out of the cache is read from the
answer's usage; the replica and why it was chosen from the headers that keys with the scope `debug` see.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
from vitalis_serve.control.client import Client

from tests.support import client
from tests.support.client import Response
from tests.support.engines import Engine, Stack

MODEL = "gpt-oss-tiny"
BLOCK = 128  # tokens
MANUAL = "You are a helpful assistant. " * 100  # 600 tokens
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
MOST_MANUALS = 40
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
_ids = itertools.count()


@pytest.fixture(autouse=True)
def quiet(pair: Stack) -> None:
    """A replica with something to do may send a conversation elsewhere."""
    pair.wait_ready(2)
    pair.idle()


@dataclass(frozen=True)
class Asked:
    """What an answer showed."""

    replica: str
    reason: str
    cached_tokens: int
    prompt_tokens: int

    def __str__(self) -> str:
        return f"{self.cached_tokens} of {self.prompt_tokens} tokens cached at {self.replica}, {self.reason}"


def key_of(tree: Stack, tenant: str) -> str:
    """A new key of a tenant, which is made where there is none."""
    control = Client.of_folder(tree.data)
    if tenant not in [known["name"] for known in control.call("GET", "/v1/tenants")["tenants"]]:
        control.call("POST", "/v1/tenants", {"name": tenant})
    made = control.call("POST", "/v1/keys", {"tenant": tenant, "scopes": ["inference", "debug"]})
    assert made["applied"]
    return str(made["key"])


def body_of(api: str, manual: str, **more: Any) -> dict[str, Any]:
    """A known question below long instructions; completions have no place for these."""
    body: dict[str, Any] = {"model": MODEL, "temperature": 0}
    if api == "responses":
        body |= {"instructions": manual, "input": QUESTION, "max_output_tokens": 4}
    elif api == "completions":
        body |= {"prompt": manual, "max_tokens": 4}
    elif api == "messages":
        body |= {"system": manual, "messages": [user(QUESTION)], "max_tokens": 4}
    else:
        body |= {"messages": [{"role": "system", "content": manual}, user(QUESTION)], "max_tokens": 4}
    return body | more


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def posted(path: str, body: dict[str, Any], key: str = "") -> bytes:
    """As official clients write it, without spaces: homes go by the bytes."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return client.post(path, json.dumps(body, separators=(",", ":")).encode(), headers)


def usage_of(api: str, answer: Response) -> tuple[int, int]:
    """Prompt and cached tokens."""
    assert answer.status == 200, answer.body
    usage = answer.json["usage"]
    if api == "messages":
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached + usage["cache_creation_input_tokens"], cached
    kind = "input" if api == "responses" else "prompt"
    return usage[f"{kind}_tokens"], usage[f"{kind}_tokens_details"]["cached_tokens"]


def ask(tree: Stack, key: str, manual: str, api: str = "chat", **more: Any) -> Asked:
    host, port = tree.address
    answer = client.ask(f"http://{host}:{port}", posted(PATHS[api], body_of(api, manual, **more), key), 60)
    prompt, cached = usage_of(api, answer)
    headers = answer.head.headers
    return Asked(headers["x-vitalis-replica"], headers["x-vitalis-reason"], cached, prompt)


def engine_of(tree: Stack, replica: str) -> Engine:
    (found,) = [one for name, one in zip(tree.states(), tree.engines(), strict=True) if name == replica]
    return found


def hits(tree: Stack) -> dict[str, float]:
    """Tokens that each engine says it found in its cache."""
    return {name: engine_of(tree, name).metrics()["vllm:prompt_tokens_cached_total"] for name in tree.states()}


def test_conversations_come_home(pair: Stack) -> None:
    key = key_of(pair, "travellers")
    first: dict[str, Asked] = {}
    for number in range(MOST_MANUALS):
        manual = f"{number}. {MANUAL}"
        first[manual] = ask(pair, key, manual)
        if number >= 3 and {seen.replica for seen in first.values()} == set(pair.states()):
            break
    assert {seen.replica for seen in first.values()} == set(pair.states()), "all conversations live at one replica"
    assert {(seen.reason, seen.cached_tokens) for seen in first.values()} == {("home", 0)}

    pair.idle()
    before = hits(pair)
    expected = dict.fromkeys(before, 0.0)
    for manual, seen in first.items():
        again = ask(pair, key, manual)
        turns = [*body_of("chat", manual)["messages"], {"role": "assistant", "content": ANSWER}]
        later = ask(pair, key, manual, messages=[*turns, user("Who are you?")])
        for repeat in (again, later):
            assert (repeat.replica, repeat.reason) == (seen.replica, "home")
            assert repeat.cached_tokens > seen.prompt_tokens - 2 * BLOCK, f"first: {seen}, then: {repeat}"
            expected[seen.replica] += repeat.cached_tokens
        assert later.prompt_tokens > again.prompt_tokens
    pair.idle()
    after = hits(pair)
    assert {name: after[name] - before[name] for name in after} == expected, "what engines counted themselves"


def one_home(tree: Stack, api: str, tenants: list[str]) -> tuple[str, str]:
    """Instructions never given before that have the same home for all of these tenants, and that replica."""
    control = Client.of_folder(tree.data)
    for _ in range(MOST_MANUALS):
        manual = f"{next(_ids)} {api}. {MANUAL}"
        homes = {
            control.call(
                "POST", "/v1/explain", {"model": MODEL, "tenant": tenant, "api": api, "body": body_of(api, manual)}
            )["chosen"]
            for tenant in tenants
        }
        if len(homes) == 1:
            return manual, homes.pop()
    raise AssertionError(f"of {MOST_MANUALS} instructions none have one home for {tenants}")


@pytest.mark.parametrize("api", PATHS)
def test_what_is_cached_is_a_tenants_or_its_groups_alone(pair: Stack, api: str) -> None:
    """All of it at one replica, so that it is the salt that keeps them apart, not the way."""
    keys = {name: key_of(pair, name) for name in ("one", "other", "alike", "akin")}
    keys["one again"] = key_of(pair, "one")
    manual, home = one_home(pair, api, ["one", "other", "alike", "akin"])
    expected = [
        ("one", False), ("one", True), ("one again", True),
        ("other", False), ("other", True),
        ("alike", False), ("akin", True), ("alike", True),
        ("one", True),
    ]  # fmt: skip
    seen = [(name, ask(pair, keys[name], manual, api)) for name, _ in expected]
    told = "; ".join(f"{name}: {asked}" for name, asked in seen)
    assert [(name, asked.cached_tokens > 0) for name, asked in seen] == expected, told
    assert {(asked.replica, asked.reason) for _, asked in seen} == {(home, "home")}, told
    assert all(asked.cached_tokens > asked.prompt_tokens - 2 * BLOCK for _, asked in seen if asked.cached_tokens), told

    # A salt of the client's own does not come through: it would have had nothing cached.
    assert ask(pair, keys["one"], manual, api, cache_salt="mine").cached_tokens > 0
    # Past the gateway, the same engine, without any salt: nothing either. So it was the salt.
    address = f"unix:{engine_of(pair, home).socket}"
    unsalted = [client.ask(address, posted(PATHS[api], body_of(api, manual)), 60) for _ in range(2)]
    assert [usage_of(api, answer)[1] > 0 for answer in unsalted] == [False, True]
