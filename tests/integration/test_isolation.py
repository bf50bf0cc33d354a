"""No call with one tenant's credential shows a byte of another's.

Two tenants before the same workers, engines and control. Whatever is the second one's has a word in it that nothing
else has: `burrow` in its name, notes, prompts and answers, `warren` in its routes and models, 77117711 in its limits.
"""

import contextlib
import itertools
import json
import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vitalis_serve.control.client import Client, Refused
from vitalis_serve.errors import CODES
from vitalis_serve.fleet import Replica, ReplicaState

from tests.support import client, gateway, simulator
from tests.support.client import Response, Wire
from tests.support.control import SECONDS, Control, running
from tests.support.gateway import PATHS, ScriptedEngine, error_code, wait_until
from tests.support.issuer import Issuer, running_issuer
from tests.support.simulator import Simulator
from tests.support.worker import MODEL, WorkerProcess, running_worker

A, KIN, B = "anthill", "anthill-kin", "burrow"
ROUTES: list[dict[str, Any]] = [
    {"name": "shared", "model": MODEL},
    {"name": "nest", "model": MODEL},
    {"name": "warren-day", "model": "warren-model"},
    {"name": "warren-night", "model": MODEL, "policy": {"preamble": "You are a burrow."}},
]
OURS, THEIRS = ["shared", "nest"], ["shared", "warren-day", "warren-night"]
WORDS = [b"burrow", b"warren", b"77117711"]
LIMITS_OF_B = {"requests_per_minute": 771177110001, "tokens_per_minute": 771177110002, "concurrent": 771177110003,
               "tokens_per_day": 771177110004, "tokens_per_month": 771177110005}  # fmt: skip
LIMITS_OF_A = {"requests_per_minute": 5000, "tokens_per_minute": 5_000_000}
ENDLESS = 2000  # tokens: ten seconds of a slow engine
# What control and the ledger alone say, and what no request can bring about.
NOT_THE_DATA_PLANES = {
    "tenant_not_found", "key_not_found", "route_not_found", "already_exists", "tenant_disabled", "key_closed",
    "fleet_refused", "authentication_failures", "worker_unavailable", "supervisor_unavailable", "store_unavailable",
    "storage_full", "internal",
}  # fmt: skip
_ids = itertools.count()


class Site:
    """Control, two workers of one host, engines and an issuer. `keys`: each key's secret by its name here; `secrets`:
    all that opens anything, B's key ids apart in `ids`."""

    def __init__(
        self, folder: Path, control: Control, workers: list[WorkerProcess], issuer: Issuer, engines: "Engines"
    ) -> None:
        self.folder, self.control, self.workers, self.issuer, self.engines = folder, control, workers, issuer, engines
        self.keys: dict[str, str] = {}
        self.ids: dict[str, str] = {}

    def tenant(self, name: str, **fields: Any) -> None:
        assert self.control.call("POST", "/v1/tenants", {"name": name, **fields})["applied"]

    def key(self, called: str, tenant: str, **fields: Any) -> None:
        made = self.control.call("POST", "/v1/keys", {"tenant": tenant, "name": f"{tenant}-{called}", **fields})
        assert made["applied"]
        self.keys[called], self.ids[called] = made["key"], made["id"]

    def token(self, tenant: str) -> str:
        return self.issuer.token(tenant=tenant, sub=f"{tenant}-somebody")

    @property
    def of_b(self) -> list[bytes]:
        """What nobody else may see."""
        return [*WORDS, *(self.ids[name].encode() for name in self.ids if name.startswith("b"))]

    def serve(self, *replicas: Replica) -> None:
        for worker in self.workers:
            worker.fleet(*replicas or self.engines.replicas())


class Engines:
    """`quick` and `scripted` hold one model each; `slow` has one slot for `quick`'s, where a test takes it in."""

    def __init__(self, quick: Simulator, slow: Simulator, scripted: ScriptedEngine) -> None:
        self.quick, self.slow, self.scripted = quick, slow, scripted

    def replicas(self) -> list[Replica]:
        return [ready("engine-0", self.quick.address, MODEL), ready("engine-1", self.scripted.address, "warren-model")]


def ready(name: str, address: str, model: str, slots: int = 64) -> Replica:
    return Replica(name, address, ReplicaState.READY, models=(model,), slots=slots, incarnation=1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("isolation")
    spool: dict[str, Any] = {"spool_folder": str(folder / "spool"), "spent_path": str(folder / "spent.json")}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        issuer = enter(running_issuer())
        engines = Engines(
            enter(simulator.started("--enable-prompt-tokens-details", "--served-model-name", MODEL)),
            enter(simulator.started("--decode-step-ms", "5", "--served-model-name", MODEL)),
            enter(gateway.scripted_engine(folder / "scripted.sock")),
        )
        control = enter(
            running(
                folder, workers=2, apply_seconds=SECONDS, routes=ROUTES, cache_groups={"hill": [A, KIN]},
                issuers=[issuer.options(routes=OURS)], **spool,
            )
        )  # fmt: skip
        workers = []
        for index in range(2):
            home = folder / f"w{index}"
            home.mkdir()
            (home / "control.sock").symlink_to(folder / "control.sock")
            shared: dict[str, Any] = {
                "workers": 2, "admission_socket": str(folder / "admission.sock"), "queue_requests": 2,
                "queue_seconds": 1, "routing": "affinity", **spool,
            }  # fmt: skip
            workers.append(enter(running_worker(home, worker=index, **shared)))
        made = Site(folder, control, workers, issuer, engines)
        made.serve()
        wait_until(lambda: workers[0].log().count("is here") == 1, SECONDS, "both workers have met")
        made.tenant(A, notes="anthill-notes", limits=LIMITS_OF_A)
        made.tenant(KIN)
        made.tenant(B, notes="burrow-notes", limits=LIMITS_OF_B)
        made.key("a", A, routes=OURS, notes="anthill-notes")
        made.key("a2", A, routes=OURS)
        made.key("a-only", A, routes=["nest"])
        made.key("a-debug", A, routes=OURS, scopes=["inference", "debug"])
        made.key("a-metrics", A, scopes=["metrics"])
        made.key("kin", KIN, routes=OURS)
        made.key("b", B, routes=THEIRS, notes="burrow-notes", limits=LIMITS_OF_B)
        made.key("b2", B, routes=THEIRS)
        made.key("b-spent", B, routes=THEIRS, limits={"tokens_per_day": 1})
        wait_until(lambda: models(made, made.token(A)) == OURS, SECONDS, "the issuer's keys at the workers")
        yield made
        for worker in workers:
            gateway.settled(worker)


@pytest.fixture(autouse=True)
def calm(site: Site) -> Iterator[None]:
    """All engines well, and nothing under way before and after."""
    site.serve()
    yield
    for engine in (site.engines.quick, site.engines.slow):
        engine.reset()
    for worker in site.workers:
        gateway.settled(worker)


def auth(site: Site, who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {site.keys.get(who, who)}"}


def ask(site: Site, data: bytes, worker: int = 1, seconds: float = 10) -> Response:
    return client.ask(site.workers[worker].url, data, seconds)


def post(site: Site, who: str, path: str, document: Any, **headers: str) -> bytes:
    return client.post(path, document, auth(site, who) | {name.replace("_", "-"): v for name, v in headers.items()})


def question(
    site: Site, who: str, api: str = "chat", *, route: str = "shared", text: str = "", tokens: int = 5, **more: Any
) -> bytes:
    """A question of somebody's, in whose words its tenant's name stands."""
    words = text or f"{B if who.startswith('b') else A} whispered"
    document = {**gateway.document(api, model=route, tokens=tokens), **more}
    name = {"chat": "messages", "messages": "messages", "completions": "prompt", "responses": "input"}[api]
    document[name] = [{"role": "user", "content": words}] if name == "messages" else words
    return post(site, who, PATHS[api], document)


def models(site: Site, who: str) -> list[str]:
    answer = ask(site, client.get("/v1/models", auth(site, who)))
    return [model["id"] for model in answer.json["data"]] if answer.status == 200 else []


def clean(site: Site, seen: bytes, *own: str) -> None:
    """Nothing of B's is in it. own: words of B's that the caller said itself and was told again."""
    for word in own:
        seen = seen.replace(word.encode(), b"")
    found = [word for word in site.of_b if word in seen.lower() or word in seen]
    assert not found, (found, seen)


def answer_of(text: str, model: str = "warren-model") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c", "object": "chat.completion", "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }  # fmt: skip


def streamed(text: str) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "model": "warren-model"}
    deltas: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    events = b"".join(b"data: " + json.dumps(head | delta).encode() + b"\n\n" for delta in deltas)
    return gateway.STREAM_HEAD + gateway.chunk(events + b"data: [DONE]\n\n") + gateway.LAST_CHUNK


def traffic(site: Site, worker: int = 0) -> None:
    """What B does of each kind: plain, streamed, in error, refused by limits, left, cut."""
    quick, scripted = site.engines.quick, site.engines.scripted
    for api in PATHS:
        for stream in (False, True):
            assert ask(site, question(site, "b", api, stream=stream), worker).status == 200
    scripted.scripts = [[gateway.http_answer(answer_of("burrow muttered"))], [streamed("burrow muttered")]]
    for stream in (False, True):
        answer = ask(site, question(site, "b", route="warren-day", stream=stream), worker)
        assert (answer.status, b"burrow muttered" in answer.body) == (200, True)
    assert ask(site, question(site, "b", route="warren-night"), worker).status == 200
    for data, status in (
        (question(site, "b", route="burrow-unknown"), 404),
        (question(site, "b2", route="nest"), 403),
        (post(site, "b", PATHS["chat"], b'{"model": "burrow'), 400),
        (client.get("/v1/models/burrow", auth(site, "b")), 404),
        (client.get("/burrow?key=burrow", auth(site, "b")), 404),
    ):
        assert ask(site, data, worker).status == status
    quick.misbehave("status", status=400, message="burrow broke", requests=1)
    assert b"burrow broke" in ask(site, question(site, "b"), worker).body
    quick.misbehave("stream_error", after_events=2, message="burrow broke", requests=1)
    assert b"burrow broke" in ask(site, question(site, "b", stream=True), worker).body
    quick.misbehave("cut", after_events=3, requests=1)
    ask(site, question(site, "b", stream=True), worker)
    assert {ask(site, question(site, "b-spent"), worker).status for _ in range(2)} <= {200, 429}
    assert error_code(ask(site, question(site, "b-spent"), worker)) == "budget_spent"
    wire, _, events = gateway.start_stream(site.workers[worker], question(site, "b", stream=True, tokens=ENDLESS))
    next(events)
    wire.close()


@contextlib.contextmanager
def crowd(site: Site) -> Iterator[list[Wire]]:
    """B holds the only slot and waits in both workers' queues for more."""
    site.serve(ready("engine-0", site.engines.slow.address, MODEL, slots=1))
    wires = [gateway.start_stream(site.workers[0], question(site, "b", stream=True, tokens=ENDLESS))[0]]
    try:
        for worker, streams in zip(site.workers, (1, 0), strict=True):
            # what was asked before may still be ending
            wait_until(lambda w=worker, n=streams: w.in_flight()["count"] == n, SECONDS, "it rests")  # type: ignore[misc]
            wires.append(client.connect(worker.url))
            wires[-1].send(question(site, "b"))
            wait_until(lambda w=worker, n=streams: w.in_flight()["count"] > n, SECONDS, "it waits")  # type: ignore[misc]
        yield wires
    finally:
        for wire in wires:
            wire.close()


# What the data plane says


def test_each_sees_its_own_models_alone(site: Site) -> None:
    for who, own in (("a", OURS), ("a-only", ["nest"]), (site.token(A), OURS), ("b", THEIRS)):
        for worker in (0, 1):
            answer = ask(site, client.get("/v1/models", auth(site, who)), worker)
            assert [model["id"] for model in answer.json["data"]] == own
            if who != "b":
                clean(site, answer.head.raw + answer.body)
    nest = ask(site, client.get("/v1/models/nest", auth(site, "a")))
    assert (nest.status, nest.json["id"]) == (200, "nest")


def test_credentials_that_alternate_on_one_connection_stay_apart(site: Site) -> None:
    """As behind a proxy that shares its connections; all sent before the first is answered."""
    order = ["a", "b", "a", "a-only", site.token(A), "b", "a"]
    own = {"a": OURS, "b": THEIRS, "a-only": ["nest"]}
    with client.connect(site.workers[0].url) as wire:
        for who in order:
            wire.send(client.get("/v1/models", auth(site, who)))
        for who in order:
            assert [model["id"] for model in wire.read_response().json["data"]] == own.get(who, OURS)
        for who in order:
            wire.send(question(site, who, route=own.get(who, OURS)[0], tokens=3, text="tell me"))
            answer = wire.read_response()
            assert answer.status == 200
            if who != "b":
                clean(site, answer.head.raw + answer.body)


def test_a_model_that_is_refused_is_refused_without_the_names_of_others(site: Site) -> None:
    """A route that exists is 403, one that does not is 404; either names what the key may use and nothing else."""
    for who, may in (("a", "shared, nest"), ("a-only", "nest"), (site.token(A), "shared, nest")):
        for api in PATHS:
            for name, code in (("warren-day", "route_not_allowed"), ("nowhere", "model_not_found")):
                for stream in (False, True):
                    answer = ask(site, question(site, who, api, route=name, stream=stream))
                    assert error_code(answer) == code
                    assert re.search(rf"may use: {may}\.$", answer.json["error"]["message"])
                    clean(site, answer.head.raw + answer.body, "warren-day")
        for path in ("/tokenize", "/v1/messages/count_tokens"):
            document = {"model": "warren-night", "prompt": "x", "messages": []}
            answer = ask(site, post(site, who, path, document))
            assert error_code(answer) == "route_not_allowed"
            clean(site, answer.head.raw + answer.body, "warren-night")
        answer = ask(site, client.get("/v1/models/warren-night", auth(site, who)))
        assert error_code(answer) == "route_not_allowed"
        clean(site, answer.head.raw + answer.body, "warren-night")


def calls(site: Site, who: str) -> Iterator[bytes]:
    """One good request of every path and kind."""
    for api in PATHS:
        yield question(site, who, api)
        yield question(site, who, api, stream=True)
    yield post(site, "a-only", "/emergency-guidance", {"prompt": "anthill whispered"})
    yield post(
        site, who, "/v1/messages/count_tokens", {"model": "nest", "messages": [{"role": "user", "content": "x"}]}
    )
    yield post(site, who, "/tokenize", {"model": "nest", "prompt": "anthill whispered"})
    yield post(site, who, "/detokenize", {"model": "nest", "tokens": [1, 2, 3]})
    yield from (client.get(path, auth(site, who)) for path in ("/v1/models", "/v1/models/nest", "/health"))
    yield from (client.get(path) for path in ("/healthz", "/readyz"))


def test_every_good_answer_shows_nothing_of_another_tenant(site: Site) -> None:
    for worker in (0, 1):
        traffic(site, worker)
    for who in ("a", "a-debug", site.token(A)):
        for worker, data in itertools.product((0, 1), calls(site, who)):
            answer = ask(site, data, worker)
            assert answer.status == 200, answer.body
            clean(site, answer.head.raw + answer.body)


def test_who_debugs_sees_replicas_and_reasons_and_no_tenant(site: Site) -> None:
    traffic(site)
    reasons = set()
    for stream in (False, True):
        answer = ask(site, question(site, "a-debug", stream=stream))
        reasons.add(answer.head.headers["x-vitalis-reason"])
        assert answer.head.headers["x-vitalis-replica"] == "engine-0"
        clean(site, answer.head.raw + answer.body)
    with crowd(site) as wires, client.connect(site.workers[1].url) as wire:
        before = site.workers[1].in_flight()["count"]
        wire.send(question(site, "a-debug"))
        wait_until(lambda: site.workers[1].in_flight()["count"] > before, SECONDS, "it waits")
        for other in wires:
            other.close()
        answer = wire.read_response(10)
        if answer.status == 200:
            reasons.add(answer.head.headers["x-vitalis-reason"])
        clean(site, answer.head.raw + answer.body)
    assert all(re.fullmatch(r"[a-z, ]+", reason) for reason in reasons), reasons


class Refusals:
    """Everything A is refused with: `codes` are those that came."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.codes: set[str] = set()

    def see(self, code: str, answer: Response | bytes, *own: str) -> None:
        raw = answer if isinstance(answer, bytes) else answer.head.raw + answer.body
        assert f'"code":"{code}"'.encode() in raw.replace(b'": "', b'":"'), (code, raw)
        clean(self.site, raw, *own)
        self.codes.add(code)

    def ask(self, code: str, data: bytes, worker: WorkerProcess | None = None, *own: str) -> None:
        for one in [worker] if worker is not None else self.site.workers:
            with client.connect(one.url) as wire:
                wire.send(data)
                self.see(code, wire.read_response(20), *own)


def test_every_refusal_shows_nothing_of_another_tenant(site: Site, tmp_path: Path) -> None:
    """All codes of the data plane, each while or after B does much of the same."""
    for worker in (0, 1):
        traffic(site, worker)
    seen = Refusals(site)
    of_requests(site, seen)
    of_limits(site, seen)
    of_a_full_queue(site, seen)
    of_engines(site, seen)
    of_deadlines_and_means(site, seen, tmp_path)
    assert seen.codes == set(CODES) - NOT_THE_DATA_PLANES


def of_requests(site: Site, seen: Refusals) -> None:
    chat, mine = PATHS["chat"], auth(site, "a")
    for api in PATHS:
        seen.ask("model_not_found", question(site, "a", api, route="nowhere"))
        seen.ask("route_not_allowed", question(site, "a", api, route="warren-day"), None, "warren-day")
        seen.ask("invalid_json", post(site, "a", PATHS[api], b'{"model": "sha'))
        seen.ask("unsupported_field", question(site, "a", api, kv_transfer_params={}))
        seen.ask("invalid_request", question(site, "a", api, stream="perhaps"))
        seen.ask("missing_key", client.post(PATHS[api], {"model": "shared"}))
        seen.ask("invalid_key", post(site, site.keys["b"][:-1], PATHS[api], {"model": "shared"}))
        seen.ask("invalid_key", post(site, "a", PATHS[api], {"model": "shared"}, x_api_key=site.keys["b"]))
        seen.ask("scope_missing", question(site, "a-metrics", api))
        seen.ask("invalid_token", question(site, site.issuer.token(tenant=A, number=7), api))
    seen.ask("invalid_token", client.get("/v1/models", auth(site, site.issuer.token(tenant="nobody"))))
    site.control.call("PATCH", f"/v1/keys/{site.ids['a2']}", {"expires_in_seconds": 0})
    seen.ask("expired_key", question(site, "a2"))
    site.control.call("PATCH", f"/v1/keys/{site.ids['a2']}", {"expires_in_seconds": None})
    seen.ask("unknown_path", client.get("/v1/usage", mine))
    seen.ask("unknown_path", client.get("/metrics", mine))
    seen.ask("unknown_path", client.get("/v1/responses/resp_1", mine))
    seen.ask("method_not_allowed", client.get(chat, mine))
    seen.ask("method_not_allowed", client.post("/v1/models", {}, mine))
    seen.ask("unsupported_media_type", client.post(chat, b"x", mine | {"content-type": "text/plain"}))
    seen.ask("body_too_large", client.request("POST", chat, b"", mine | {"content-length": str(1 << 40)}))
    seen.ask("headers_too_large", client.get("/v1/models", mine | {"x-large": "x" * 70_000}))
    seen.ask("invalid_request", b"GET /v1/models HTTP/1.1\r\nbad header\r\n\r\n")


def of_limits(site: Site, seen: Refusals) -> None:
    """A's own are told to it; a route's are, but not how much of it the others have left."""
    path = f"/v1/limits/tenant/{A}"
    for limits, code in (
        ({"requests_per_minute": 1}, "requests_limit"),
        ({"tokens_per_minute": 1}, "tokens_limit"),
        ({"tokens_per_day": 1}, "budget_spent"),
        ({"tokens_per_month": 1}, "budget_spent"),
    ):
        assert site.control.call("PUT", path, limits)["applied"]
        wait_until(lambda: ask(site, question(site, "a")).status == 429, SECONDS, code)
        for api in PATHS:
            seen.ask(code, question(site, "a", api, stream=True))
    site.control.call("PUT", path, {"concurrent": 1})
    held = gateway.start_stream(site.workers[0], question(site, "a", stream=True, tokens=1 << 30))[0]
    seen.ask("concurrency_limit", question(site, "a"))
    held.close()
    site.control.call("PUT", path, LIMITS_OF_A)
    site.control.call("PUT", "/v1/limits/route/nest", {"requests_per_minute": 1})
    wait_until(lambda: ask(site, question(site, "kin", route="nest")).status == 429, SECONDS, "its limit is reached")
    seen.ask("requests_limit", question(site, "a", route="nest"))
    refused = ask(site, question(site, "a", route="nest"))
    assert refused.head.headers["x-ratelimit-limit-requests"] == "5000", "the route's own count would tell of others"
    site.control.call("DELETE", "/v1/limits/route/nest")


def of_a_full_queue(site: Site, seen: Refusals) -> None:
    for worker in site.workers:
        codes = set()
        with crowd(site), contextlib.ExitStack() as stack:
            wires = [stack.enter_context(client.connect(worker.url)) for _ in range(4)]
            for wire in wires:
                wire.send(question(site, "a"))
            for wire in wires:
                answer = wire.read_response(20)
                codes.add(error_code(answer))
                seen.see(error_code(answer), answer)
        assert codes == {"queue_full", "queue_timeout"}
    site.serve()


def of_engines(site: Site, seen: Refusals) -> None:
    quick = site.engines.quick
    replica = site.engines.replicas()[0]
    for api in PATHS:
        for stream in (False, True):
            data = question(site, "a", api, stream=stream)
            quick.misbehave("status", status=500, message="it broke", path=PATHS[api])
            seen.ask("engine_protocol", data)
            quick.reset()
            quick.misbehave("reset", path=PATHS[api])
            seen.ask("engine_unreachable", data)
            quick.reset()
        quick.misbehave("cut", after_events=3, path=PATHS[api])
        for worker in site.workers:
            answer = client.ask(worker.url, question(site, "a", api, stream=True, tokens=50), 20)
            assert not gateway.looks_whole(api, answer.events)
            clean(site, answer.head.raw + answer.body)
        quick.reset()
    site.serve(site.engines.replicas()[1])
    seen.ask("no_ready_engine", question(site, "a"))
    site.serve(replica)


def of_deadlines_and_means(site: Site, seen: Refusals, folder: Path) -> None:
    """Of workers that serve from the same snapshot: one with little patience and a full disk, one without its Redis."""
    quick = site.engines.quick
    hasty: dict[str, Any] = {
        "header_seconds": 0.5, "body_seconds": 0.5, "first_token_seconds": 1, "idle_seconds": 1, "total_seconds": 2,
        "spool_folder": str(folder / "spool"), "spent_path": str(folder / "spent.json"), "spool_segment_bytes": 1 << 16,
        "max_connections": 50,  # what the least size of a file follows from
    }  # fmt: skip
    document = (site.folder / "snapshot.json").read_bytes()
    with running_worker(folder / "hasty", document=document, **hasty) as worker:
        worker.fleet(*site.engines.replicas())
        with client.connect(worker.url) as wire:
            wire.send(question(site, "a")[:-4])
            seen.see("body_timeout", wire.read_response(20))
        quick.misbehave("silent")
        seen.ask("first_token_timeout", question(site, "a", stream=True), worker)
        seen.ask("total_timeout", question(site, "a"), worker)
        quick.reset()
        quick.misbehave("stall", after_events=3)
        for api in ("chat", "completions", "messages"):
            answer = client.ask(worker.url, question(site, "a", api, stream=True, tokens=50), 20)
            seen.see("idle_timeout", answer)
        quick.reset()
        unlimited = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))
        full = question(site, "a", tokens=1)
        while (answer := client.ask(worker.url, full, 20)).status == 200:
            pass
        seen.see("ledger_unavailable", answer)
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, unlimited)
        wait_until(lambda: client.ask(worker.url, full, 20).status == 200, SECONDS, "there is room again")
        with client.connect(worker.url) as wire:
            wire.send(question(site, "a", stream=True, tokens=1 << 30))
            assert wire.read_head().status == 200
            worker.say({"type": "drain", "seconds": 0})
            left = wire.read_to_end(20)
        seen.see("draining", left)
    away: dict[str, Any] = {"limits_redis_url": "redis://127.0.0.1:1", "limits_away": "refuse"}
    with running_worker(folder / "away", document=document, **away) as worker:
        worker.fleet(*site.engines.replicas())
        seen.ask("limits_unavailable", question(site, "a"), worker)


# What numbers say


def test_rate_headers_do_not_move_by_another_s_traffic(site: Site) -> None:
    """On the same route, under the same limits, with answers of another length, from both workers."""
    for name in (A, B):
        same = {"requests_per_minute": 1000, "tokens_per_minute": 100_000}
        assert site.control.call("PUT", f"/v1/limits/tenant/{name}", same)["applied"]

    def left() -> tuple[int, int]:
        headers = ask(site, question(site, "a", tokens=1, max_tokens=None)).head.headers
        return tuple(int(headers[f"x-ratelimit-remaining-{kind}"]) for kind in ("requests", "tokens"))  # type: ignore[return-value]

    first = left()
    for number in range(30):
        answer = ask(site, question(site, "b", tokens=900, max_tokens=None), number % 2)
        assert answer.json["usage"]["completion_tokens"] == 900
    second = left()
    assert second[0] >= first[0] - 1
    assert second[1] >= first[1] - 100, "what A is expected to use is learnt from A's own answers"
    for name, own in ((A, LIMITS_OF_A), (B, LIMITS_OF_B)):
        assert site.control.call("PUT", f"/v1/limits/tenant/{name}", own)["applied"]


def cached(api: str, answer: Response) -> int:
    """Tokens out of the prefix cache, as the API tells them."""
    assert answer.status == 200, answer.body
    usage = answer.json["usage"]
    if api == "messages":
        return int(usage["cache_read_input_tokens"])
    kind = "input" if api == "responses" else "prompt"
    return int(usage[f"{kind}_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("api", PATHS)
def test_a_prefix_cache_tells_nothing_of_another_tenant(site: Site, api: str) -> None:
    """On one replica: nothing is there the first time, whatever B asked before; a tenant's keys, its tokens and its
    cache group share. What a caller says of salts changes nothing."""
    text = f"{api}: the same long question " * 100

    def found(who: str, worker: int = 1, **more: Any) -> bool:
        return cached(api, ask(site, question(site, who, api, text=text, **more), worker)) > 0

    assert [found("b"), found("b"), found("b2", 0)] == [False, True, True]
    assert [found("a"), found("a"), found("a2", 0), found(site.token(A))] == [False, True, True, True]
    assert found("a", cache_salt="mine")
    assert [found("kin"), found("kin", route="nest")] == [True, True]
    assert found(site.token(B))


def test_an_engine_s_leftovers_of_one_answer_reach_nobody_else(site: Site) -> None:
    """More bytes than its answer has, on a connection that the next request would use: it goes as they come."""
    scripted = site.engines.scripted
    mine, more = gateway.http_answer(answer_of("burrow muttered")), gateway.http_answer(answer_of("burrow muttered on"))
    endings: list[list[gateway.Piece]] = [[mine + more], [mine, more], [mine, more[:40]], [streamed("burrow") + more]]
    for ending in endings:
        scripted.scripts = [ending]
        site.serve(ready("engine-1", scripted.address, MODEL))
        left = scripted.left
        ask(site, question(site, "b", stream=ending is endings[3]), 0)
        wait_until(lambda n=left: scripted.left > n, SECONDS, "the connection is closed")  # type: ignore[misc]
        scripted.scripts = [[gateway.http_answer(answer_of("for anthill", MODEL))]]
        answer = ask(site, question(site, "a"), 0)
        assert b"for anthill" in answer.body
        clean(site, answer.head.raw + answer.body)


def test_the_same_request_id_at_the_same_time_is_two_requests(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        wires = {}
        for who in ("b", "a"):
            wire = wires[who] = stack.enter_context(client.connect(site.workers[0].url))
            data = question(site, who, stream=True, tokens=200)
            wire.send(data.replace(b"host: test\r\n", b"host: test\r\nx-request-id: the-same\r\n", 1))
        heads = {who: wire.read_head() for who, wire in wires.items()}
        wires.pop("b").close()
        events = list(wires["a"].events(heads["a"]))
        assert gateway.stream_text("chat", events) == gateway.expected_text("chat", 200)
        clean(site, heads["a"].raw + b"".join(event.raw for event in events))


# What control says


def operations(site: Site) -> Iterator[tuple[str, str]]:
    """Every method and path of control, on things of B's."""
    address = site.control.address
    document = client.ask(address, client.get("/openapi.json")).json
    for path, methods in document["paths"].items():
        for name, value in (("name", B), ("key_id", site.ids["b"]), ("kind", "tenant"), ("replica", "engine-0")):
            path = path.replace(f"{{{name}}}", value)
        assert "{" not in path
        yield from ((method.upper(), path) for method in methods)


@pytest.mark.parametrize(("who", "opens"), [("a", []), ("a-debug", []), ("token", []), ("a-metrics", ["/metrics"])])
def test_tenants_credentials_open_nothing_of_control(site: Site, who: str, opens: Sequence[str]) -> None:
    traffic(site)
    asked = [op for op in operations(site) if op[1] != "/healthz"]
    assert len(asked) > 20
    for method, path in asked:
        own = auth(site, site.token(A) if who == "token" else who)
        answer = client.ask(site.control.address, client.request(method, path, b"", own), 10)
        clean(site, answer.head.raw + answer.body, "warren-day", "warren-night", "warren-model")
        if path in opens:
            assert answer.status == 200
        else:
            assert (answer.status, error_code(answer)) == (403, "scope_missing"), (method, path)
            assert b"warren" not in answer.body


def test_metrics_name_no_tenant_key_or_user(site: Site) -> None:
    for worker in (0, 1):
        traffic(site, worker)
        for data in calls(site, "a"):
            ask(site, data, worker)
        ask(site, question(site, "a", route="never-heard-of"), worker)
    answer = client.ask(site.control.address, client.get("/metrics", auth(site, "a-metrics")), 10)
    assert answer.status == 200
    page = answer.body.decode()
    assert 'vitalis_requests_total{code="",outcome="ok",route="warren-day"' in page
    hidden = [
        A,
        B,
        "somebody",
        "whispered",
        "muttered",
        "never-heard-of",
        "oidc",
        *site.ids.values(),
        *site.keys.values(),
    ]
    assert not [word for word in hidden if word in page.lower() or word in page]
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    assert set(labels) <= {
        "route",
        "outcome",
        "code",
        "worker",
        "class",
        "replica",
        "state",
        "reason",
        "kind",
        "model",
        "le",
    }
    assert labels["route"] <= {"", *(route["name"] for route in ROUTES)}
    assert labels["worker"] == {"worker-0", "worker-1"}


# What is written down


def test_nothing_that_was_asked_answered_or_opens_is_written_anywhere(site: Site) -> None:
    """Logs, spool, store, snapshot, sums: all files of control and the workers."""
    tokens = [site.token(A), site.token(B)]
    for worker in (0, 1):
        traffic(site, worker)
        for data in calls(site, "a"):
            ask(site, data, worker)
        for token in tokens:
            assert ask(site, question(site, token), worker).status == 200
        for data in (
            client.get(f"/v1/models?api_key={site.keys['a']}", auth(site, "a")),
            post(site, "a", f"{PATHS['chat']}?key={site.keys['a']}", {"model": "shared", "whispered": "whispered"}),
            post(site, "a", PATHS["chat"], b'{"model": "shared", "messages": "anthill whispered'),
            post(site, "a", PATHS["chat"], {"model": "shared", "user": "whispered", "messages": "whispered"}),
            client.get("/v1/models", {"authorization": f"Basic {site.keys['a']}"}),
            post(site, "a", PATHS["chat"], {"model": "shared"}, x_api_key=site.keys["b"]),
        ):
            ask(site, data, worker)
    for secret in (site.keys["a"], *tokens, site.keys["a"] + "x", site.token(A) + "x"):
        client.ask(site.control.address, client.get(f"/v1/keys?key={secret}", {"authorization": f"Bearer {secret}"}))
    with contextlib.suppress(Refused):
        Client(site.control.address, site.keys["a"]).call("POST", "/v1/keys", {"tenant": B, "notes": "whispered"})
    wait_until(lambda: all(w.records() for w in site.workers), SECONDS, "access logs")

    def charged() -> set[str]:
        rows = site.control.call("GET", "/v1/usage/requests?limit=1000")["requests"]
        return {row["tenant"] for row in rows}

    wait_until(lambda: charged() >= {A, B}, SECONDS, "the ledger has both")
    assert {key for w in site.workers for key in (r.get("key") for r in w.records())} >= {site.ids["a"], site.ids["b"]}
    secrets = [*site.keys.values(), *(part for token in tokens for part in token.split("."))]
    hidden = [b"whispered", b"muttered", *(secret.encode() for secret in secrets)]
    hidden += [secret.split("_")[2].encode() for secret in site.keys.values()]
    names = set()
    for path in site.folder.rglob("*"):
        if path.is_file():
            names.add(path.name)
            content = path.read_bytes()
            assert not [word for word in hidden if word in content], path
    assert {"vitalis.db", "snapshot.json", "spent.json", "control.log", "access.jsonl"} <= names
    assert [name for name in names if name.endswith(".spool")]
