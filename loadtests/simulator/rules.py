"""Misbehaviours: what they are called, what they need, and which request they strike. Pure.

How it works: a rule is one JSON object, given by `--misbehave` or `POST /sim/misbehave`. Rules about the whole engine
hold until `POST /sim/reset`. Rules about requests strike requests for generation, in the order the rules were given:
the first whose filter matches is used up by one (`requests`, null for ever), after letting `skip` matches pass.
"""

import msgspec

ENGINE_KINDS = {
    "freeze": "work stands still; heads, /health and /metrics are answered",
    "unhealthy": "/health says 503",
    "sluggish": "/health and /metrics are answered `seconds` late",
    "ignore_sigterm": "SIGTERM does nothing",
    "refuse": "the port is closed (for `seconds`, or until reset)",
    "exit": "the process exits with `code` once `after_requests` have been seen",
    "crash": "the process dies by SIGKILL once `after_requests` have been seen",
}
REQUEST_KINDS = {
    "status": "answers `status` as JSON with `message`",
    "delay": "waits `seconds` before anything",
    "silent": "takes the request and never answers",
    "stale": "closes a kept-alive connection just when its next request arrives (RST with `point` start)",
    "reset": "RST at `point`",
    "cut": "closes at `point`",
    "half_close": "ends its sending side at `point`, keeps reading",
    "stall": "sends nothing more after `after_events` events (resumes after `seconds` if given)",
    "dribble": "one byte a write, `seconds` apart",
    "wrong_length": "a content-length that is too `length`: short or long",
    "garbage": "bytes that are not HTTP, at `point`: head or chunk",
    "huge_head": "one header of `size` bytes",
    "stream_error": "vLLM's error event and [DONE] after `after_events` events; 500 if not streamed; says `message`",
    "harmony": "as stream_error, and says what Harmony's parser says (vLLM up to 0.31, with ignore_eos)",
    "role_done": "a role chunk (or `after_events` events), then [DONE], no finish_reason: a draining vLLM",
    "abort": "gives up after `after_events` events, or as it answers, and says so as the finish reason",
    "no_done": "a stream that ends well framed, without [DONE]",
    "leak": "Harmony's special tokens where the text begins",
    "leak_tool_name": "a tool call whose name has a special token in it, whatever was asked; a leak on completions",
}
POINTS = ("start", "head", "after_head", "chunk", "event", "boundary")


class Rule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One misbehaviour. `point` of reset, cut and half_close: start (before any byte), head (in its middle),
    after_head, chunk (in the middle of one, after `after_events` events), event (a chunk that holds half an event;
    `terminate` ends the chunked body properly after it), boundary (after `after_events` whole events).
    An answer that is not streamed is struck in the middle of its body by the last three."""

    kind: str
    requests: int | None = None
    skip: int = 0
    path: str | None = None
    stream: bool | None = None
    after_events: int = 0
    after_requests: int = 0
    point: str = ""
    status: int = 500
    message: str = ""  # if none is given, what vLLM says there
    error_type: str = ""
    seconds: float = 0
    length: str = "long"
    size: int = 1 << 20
    code: int = 0
    terminate: bool = False
    retry_after: str = ""


_DEFAULT_MESSAGE = {
    "status": "cannot schedule new futures after shutdown",
    "stream_error": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "harmony": "Unexpected token 200002 while expecting start token 200006",
}
_DEFAULT_POINT = {"reset": "start", "cut": "chunk", "half_close": "boundary", "garbage": "head"}


def parse_rule(document: bytes) -> Rule:
    """The rule this JSON asks for. Raises ValueError or msgspec.MsgspecError with a sentence saying what is wrong."""
    rule = msgspec.json.decode(document, type=Rule)
    if rule.kind not in ENGINE_KINDS and rule.kind not in REQUEST_KINDS:
        raise ValueError(f"no kind {rule.kind!r}; there are: {', '.join([*ENGINE_KINDS, *REQUEST_KINDS])}")
    rule.point = rule.point or _DEFAULT_POINT.get(rule.kind, "")
    rule.message = rule.message or _DEFAULT_MESSAGE.get(rule.kind, "")
    if rule.kind == "garbage" and rule.point not in ("head", "chunk"):
        raise ValueError(f"garbage has no point {rule.point!r}; it has head and chunk")
    if rule.point and rule.point not in POINTS:
        raise ValueError(f"no point {rule.point!r}; there are: {', '.join(POINTS)}")
    if rule.length not in ("short", "long"):
        raise ValueError(f"no length {rule.length!r}; there are short and long")
    return rule


class Rules:
    """The rules in force. `hits` counts the requests struck, by kind."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.hits: dict[str, int] = {}

    def add(self, rule: Rule) -> None:
        self.rules.append(rule)

    def clear(self) -> None:
        self.rules.clear()

    def has(self, kind: str) -> bool:
        return any(rule.kind == kind for rule in self.rules)

    @property
    def lateness(self) -> float:
        """Seconds by which probes are answered late."""
        return sum(rule.seconds for rule in self.rules if rule.kind == "sluggish")

    def deadly(self, requests_seen: int) -> Rule | None:
        """The rule that now ends the process, if one does."""
        for rule in self.rules:
            if rule.kind in ("exit", "crash") and requests_seen >= rule.after_requests:
                return rule
        return None

    def strike(self, path: str, stream: bool, reused: bool) -> Rule | None:
        """The rule for a request that has just arrived, used up by one. `reused`: not its connection's first."""
        for rule in self.rules:
            if not _matches(rule, path, stream, reused):
                continue
            if rule.skip:
                rule.skip -= 1
                continue
            if rule.requests is not None:
                rule.requests -= 1
            self.hits[rule.kind] = self.hits.get(rule.kind, 0) + 1
            return rule
        return None


def _matches(rule: Rule, path: str, stream: bool, reused: bool) -> bool:
    return (
        rule.kind in REQUEST_KINDS
        and rule.requests != 0
        and (rule.path is None or rule.path == path)
        and (rule.stream is None or rule.stream == stream)
        and (rule.kind != "stale" or reused)
    )
