"""`vitalis-serve up|gateway|engine|smoke`."""

import http.client
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vitalis_serve import main
from vitalis_serve.cli.failure import fail
from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings import Settings, load
from vitalis_serve.supervise.commands import NotRunning, request
from vitalis_serve.supervise.folders import run_folder
from vitalis_serve.welcome import FIRST_KEY, QUESTION

CONFIG_HELP = "The configuration file; default: $VITALIS_CONFIG, else config/gpt-oss.yaml."
Config = Annotated[Path | None, typer.Option("--config", envvar="VITALIS_CONFIG", help=CONFIG_HELP)]


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(gateway)
    app.command()(engine)
    app.command()(smoke)


def up(config: Config = None) -> None:
    """Run everything on this host: engines, the gateway before them, control."""
    raise typer.Exit(main.up(load(config, os.environ)))


def gateway(
    engines: Annotated[
        list[str], typer.Option("--engine", help="http://HOST:PORT or unix:/PATH; once for each engine.")
    ],
    model: Annotated[str | None, typer.Option(help="The model they serve; default: those they list.")] = None,
    config: Config = None,
) -> None:
    """Run the gateway and control in front of engines that are already there."""
    raise typer.Exit(main.gateway(load(config, os.environ, engines_here=False), engines, model))


def engine(config: Config = None) -> None:
    """Run one engine, kept alive, in the foreground, without a gateway."""
    raise typer.Exit(main.engine(load(config, os.environ)))


def smoke(
    key: Annotated[
        str | None, typer.Option(envvar="VITALIS_KEY", help="Default: the file first-key in the data folder.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Default: the gateway of the running supervisor.")] = None,
    model: Annotated[str | None, typer.Option(help="A route; default: the first that the key may use.")] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One real chat through the gateway, plain and streamed, with timings."""
    settings = load(config, os.environ)
    host, port = _gateway_place(settings, url)
    credential = _key(settings, key)
    try:
        name = model or _first_model(host, port, credential)
        results = [_chat(host, port, credential, name, stream=stream) for stream in (False, True)]
    except (OSError, http.client.HTTPException, ValueError) as exc:
        fail(f"the gateway at {host}:{port} did not answer as it should: {exc}")
    if as_json:
        print(json.dumps([result.as_mapping() for result in results], indent=2))
    else:
        for result in results:
            print(result)
    raise typer.Exit(0 if all(result.ok for result in results) else 1)


@dataclass(frozen=True, slots=True)
class Chat:
    """One answer. `first_seconds`: to the first token where streamed, to the head where not."""

    streamed: bool
    status: int
    text: str
    first_seconds: float
    seconds: float
    tokens: int
    request_id: str

    @property
    def ok(self) -> bool:
        return self.status == 200 and bool(self.text)

    def as_mapping(self) -> dict[str, Any]:
        return {"ok": self.ok} | {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        kind = "streamed" if self.streamed else "plain   "
        rate = f", {self.tokens / self.seconds:.1f} tokens/s" if self.seconds and self.tokens else ""
        times = f"first {self.first_seconds * 1000:.0f} ms, whole {self.seconds * 1000:.0f} ms{rate}"
        verdict = "ok    " if self.ok else "FAILED"
        return f"{kind} {verdict} {self.status}  {times}\n         {self.text.strip()[:300]!r}"


def _key(settings: Settings, given: str | None) -> str:
    if given:
        return given
    path = settings.data_folder / FIRST_KEY
    try:
        return path.read_text().strip()
    except OSError as exc:
        raise ConfigurationError(
            "no key: paste the line `export VITALIS_KEY=...` that the first start has shown, or give --key (there is "
            f"no {path}; `vitalis-serve keys create --tenant default` makes another key)"
        ) from exc


def _gateway_place(settings: Settings, url: str | None) -> tuple[str, int]:
    if url is not None:
        host, _, port = url.removeprefix("http://").strip("/").removesuffix("/v1").rpartition(":")
        if not host or not port.isdigit():
            raise ConfigurationError(f"--url {url} is no gateway's address: give http://HOST:PORT")
        return host.strip("[]"), int(port)
    try:
        *_, answer = request(run_folder(settings.data_folder) / "supervisor.sock", {"command": "status"}, seconds=10)
        host, port_number = answer["gateway"]["host"], answer["gateway"]["port"]
    except NotRunning:
        host, port_number = settings.gateway.host, settings.gateway.port
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port_number


def _first_model(host: str, port: int, key: str) -> str:
    """The first route that the key may use. Raises ValueError with the gateway's own words where it says no."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{response.status}: {answer['error']['message']}")
    if not answer["data"]:
        raise ValueError("the key may use no route")
    return str(answer["data"][0]["id"])


def _chat(host: str, port: int, key: str, model: str, *, stream: bool) -> Chat:
    messages = [{"role": "user", "content": QUESTION}]
    # Temperature 0: the same answer each time, and a small model stays with what it knows.
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": 256, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(host, port, timeout=300)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        identity = response.headers.get("x-request-id", "")
        first = time.monotonic() - began
        if response.status != 200 or not stream:
            answer = json.loads(response.read())
            text, tokens = _plain(answer) if response.status == 200 else (str(answer["error"]["message"]), 0)
        else:
            text, tokens, first_at = _streamed(_events(response))
            first = first_at - began
    finally:
        connection.close()
    return Chat(stream, response.status, text, first, time.monotonic() - began, tokens, identity)


def _plain(answer: dict[str, Any]) -> tuple[str, int]:
    return answer["choices"][0]["message"]["content"] or "", answer["usage"]["completion_tokens"]


def _streamed(events: Iterator[dict[str, Any]]) -> tuple[str, int, float]:
    """The text, its tokens, and when the first of them came (`time.monotonic`). Raises ValueError on an error
    event."""
    text, tokens, first_at = "", 0, 0.0
    for event in events:
        if "error" in event:
            raise ValueError(f"the stream ended with an error: {event['error'].get('message')}")
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            if not first_at and any(delta.get(part) for part in ("content", "reasoning", "reasoning_content")):
                first_at = time.monotonic()
            text += delta.get("content") or ""
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens, first_at or time.monotonic()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Raises ValueError where the stream ends without its `[DONE]`."""
    for line in response:
        if line.startswith(b"data: "):
            if line.strip() == b"data: [DONE]":
                return
            yield json.loads(line[6:])
    raise ValueError("the stream ended without [DONE]")
