"""A body to what the engine must do, with vLLM's checks and vLLM's sentences where it refuses. Pure."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from simulator.answers import Layout, chat_layout, completion_layout, natural_tokens, prompt_tokens
from simulator.options import Options
from simulator.shapes import error_body

APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
_PROMPT_FIELDS = {"chat": "messages", "completions": "prompt", "responses": "input", "messages": "messages"}
_LIMIT_FIELDS = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
}
_BLOCK_BYTES_PER_TOKEN = 4
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_TRUE = {True, "true", "True", "TRUE", "1", "yes", "Yes", "YES", "on", "t", "y"}
MOST_ANSWERS = 16_384  # vLLM's default, VLLM_MAX_N_SEQUENCES
_FALSE = {False, "false", "False", "FALSE", "0", "no", "No", "NO", "off", "f", "n", None}


class Refused(Exception):
    """A request vLLM would answer with an error: the status and the whole body of that answer."""

    def __init__(self, status: int, message: str, error_type: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, error_type, param)


@dataclass(slots=True)
class Work:
    """One request for generation, checked. `tokens` are completion tokens of each of `count` choices.

    `spoken`: those before the answer's end, fewer where ignore_eos made the model go on. `tool`: the name of the one
    to call, "" for none; `named` where the client chose it. `logprobs`: how many alternatives, -1 without logprobs.
    """

    api: str
    model: str
    fields: tuple[str, ...]
    prompt: bytes
    prompt_tokens: int
    tokens: int
    finish_reason: str
    stream: bool = False
    include_usage: bool = False
    continuous: bool = False
    count: int = 1
    priority: int = 0
    request_id: str = ""
    salt: str = ""
    spoken: int = 0
    tool: str = ""
    named: bool = False
    logprobs: int = -1

    def layout(self) -> Layout:
        """Which tokens are what. After the end of a chat's answer vLLM's Harmony parser swallows every token."""
        if self.api == "completions":
            return completion_layout(self.tokens)
        if self.spoken == self.tokens:
            return chat_layout(self.tokens, self.finish_reason)
        answer = chat_layout(self.spoken, "stop")
        return replace(answer, tail=answer.tail + self.tokens - self.spoken)

    def block_hashes(self, block_tokens: int) -> tuple[int, ...]:
        """A chain of hashes over the prompt's full blocks, starting from the salt."""
        size = block_tokens * _BLOCK_BYTES_PER_TOKEN
        chain, prompt = hash(self.salt), self.prompt
        hashes = []
        for start in range(0, len(prompt) - size + 1, size):
            chain = hash((chain, prompt[start : start + size]))
            hashes.append(chain)
        return tuple(hashes)


def _invalid(place: str, message: str) -> Refused:
    text = f"1 validation error:\n  {{'type': 'value_error', 'loc': ('body', '{place}'), 'msg': '{message}'}}"
    return Refused(400, text, "Bad Request", place)


def _value(fields: dict[str, msgspec.Raw], name: str) -> Any:
    raw = fields.get(name)
    return None if raw is None else msgspec.json.decode(raw)


def _integer(fields: dict[str, msgspec.Raw], name: str) -> int | None:
    value = _value(fields, name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    raise _invalid(name, "Input should be a valid integer")


def _flag(fields: dict[str, msgspec.Raw], name: str) -> bool:
    value = _value(fields, name)
    if not isinstance(value, (bool, int, str, float, type(None))) or value not in _TRUE | _FALSE:
        raise _invalid(name, "Input should be a valid boolean, unable to interpret input")
    return value in _TRUE


def read_object(body: bytes) -> dict[str, msgspec.Raw]:
    """The body's top level, values still raw. Raises Refused as vLLM does for what is not a JSON object."""
    try:
        return _decode_object(body)
    except msgspec.ValidationError:
        raise _invalid("body", "Input should be a valid dictionary") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        place = str(error).rpartition("(byte ")[2].rstrip(")")
        at = place if place.isdigit() else "0"
        message = (
            f"1 validation error:\n  {{'type': 'json_invalid', 'loc': ('body', {at}), 'msg': 'JSON decode error'}}"
        )
        raise Refused(400, message, "Bad Request", f"body.{at}") from None


def served_model(fields: dict[str, msgspec.Raw], options: Options, required: bool = False) -> str:
    """The name the answer will carry. Raises Refused for a model that is not served."""
    model = _value(fields, "model")
    if model is None and required:
        raise _invalid("model", "Field required")
    if model is not None and not isinstance(model, str):
        raise _invalid("model", "Input should be a valid string")
    if not model:
        return options.models[0]
    if model not in options.models:
        names = ", ".join(f"`{name}`" for name in options.models)
        raise Refused(
            404, f"The model `{model}` does not exist. Valid models: {names}.", "NotFoundError", "model"
        )  # fmt: skip
    return model


def read_work(path: str, body: bytes, options: Options) -> Work:
    """What a request for generation asks for. Raises Refused."""
    api = APIS[path]
    fields = read_object(body)
    model = served_model(fields, options, required=api == "messages")
    prompt_field = _PROMPT_FIELDS[api]
    raw = fields.get(prompt_field)
    if raw is None:
        raise _invalid(prompt_field, "Field required")
    prompt = bytes(raw)
    if api in ("chat", "messages") and not prompt.startswith(b"["):
        raise _invalid(prompt_field, "Input should be a valid list")
    if api == "messages" and "system" in fields:
        prompt = bytes(fields["system"]) + prompt
    if api == "messages" and "max_tokens" not in fields:
        raise _invalid("max_tokens", "Field required")
    told = _integer(fields, "sim_prompt_tokens")
    length = prompt_tokens(prompt) if told is None else max(1, told)
    tokens, finish_reason, spoken = _length(api, fields, prompt, length, options)
    work = Work(api, model, tuple(fields), prompt, length, tokens, finish_reason)
    work.spoken = spoken
    work.stream = _flag(fields, "stream")
    work.count = max(1, _integer(fields, "n") or 1) if api in ("chat", "completions") else 1
    if work.count > MOST_ANSWERS:
        raise Refused(400, f"n must be at most {MOST_ANSWERS}, got {work.count}.", "BadRequestError", "n")
    work.priority = _integer(fields, "priority") or 0
    request_id, salt = _value(fields, "request_id"), _value(fields, "cache_salt")
    work.request_id = request_id if isinstance(request_id, str) else ""
    if salt == "":
        raise _invalid("cache_salt", "Parameter 'cache_salt' must be a non-empty string if provided.")
    work.salt = salt if isinstance(salt, str) else ""
    _read_stream_options(work, _value(fields, "stream_options"))
    _read_tools(work, fields)
    _read_logprobs(work, fields)
    return work


def _read_tools(work: Work, fields: dict[str, msgspec.Raw]) -> None:
    """The tool to call: the one that tool_choice names, the first where some tool must be called. With "auto" this
    model never calls one."""
    tools, choice = _value(fields, "tools"), _value(fields, "tool_choice")
    if work.api == "completions":
        return
    if tools == [] and work.api == "chat":
        text = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        raise Refused(400, text, "BadRequestError", "tools")
    if choice in (None, "none", "auto") or (isinstance(choice, dict) and choice.get("type") in ("none", "auto")):
        return
    if not isinstance(tools, list) or not tools:
        raise Refused(400, "When using `tool_choice`, `tools` must be set.", "BadRequestError", "tool_choice")
    names = [_tool_name(tool) for tool in tools]
    if isinstance(choice, dict) and choice.get("type") != "any":
        work.tool, work.named = _tool_name(choice), True
    elif choice == "required" or isinstance(choice, dict):
        work.tool = names[0]
    else:
        text = (
            f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.'
        )
        raise Refused(400, text, "BadRequestError", "tool_choice")
    if not work.tool or work.tool not in names:
        text = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise Refused(400, text, "BadRequestError", "tool_choice")


def _tool_name(tool: Any) -> str:
    """Of a tool or of a choice: chat has it in `function`, the others beside the type."""
    holder = tool.get("function", tool) if isinstance(tool, dict) else None
    name = holder.get("name") if isinstance(holder, dict) else None
    return name if isinstance(name, str) else ""


def _read_logprobs(work: Work, fields: dict[str, msgspec.Raw]) -> None:
    if work.api == "completions":
        wanted = _integer(fields, "logprobs")
        work.logprobs = -1 if wanted is None else max(0, wanted)
    elif work.api == "chat":
        top = _integer(fields, "top_logprobs") or 0
        if _flag(fields, "logprobs"):
            work.logprobs = top
        elif top:
            text = "when using `top_logprobs`, `logprobs` must be set to true."
            raise Refused(400, text, "BadRequestError", "top_logprobs")
    elif work.api == "responses":
        include = _value(fields, "include")
        if isinstance(include, list) and "message.output_text.logprobs" in include:
            raise Refused(400, "logprobs are not supported with gpt-oss models", "invalid_request_error", "logprobs")


def _read_stream_options(work: Work, wanted: Any) -> None:
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        raise _invalid("stream_options", "Input should be a valid dictionary")
    if not work.stream:
        raise Refused(400, "Stream options can only be defined when `stream=True`.", "BadRequestError")
    work.include_usage = bool(wanted.get("include_usage"))
    # alone it does nothing: seen with vLLM 0.32
    work.continuous = work.include_usage and bool(wanted.get("continuous_usage_stats"))


def _length(
    api: str, fields: dict[str, msgspec.Raw], prompt: bytes, length: int, options: Options
) -> tuple[int, str, int]:
    """Completion tokens, why they end, and how many of them stand before the answer's end."""
    limit, name = None, _LIMIT_FIELDS[api][0]
    for candidate in _LIMIT_FIELDS[api]:
        value = _integer(fields, candidate)
        if value is not None:
            limit, name = value, candidate
            break
    if limit is not None and limit < 1:
        raise Refused(400, f"{name} must be at least 1, got {limit}.", "BadRequestError", name)
    room = options.max_model_len - length
    if room < 1 or (limit is not None and limit > room and api in ("completions", "responses")):
        raise Refused(400, _too_long(api, length, limit, options.max_model_len), "BadRequestError", "input_tokens")
    if limit is None:
        limit = 16 if api == "completions" else room
    limit = min(limit, room)
    forced = _integer(fields, "sim_output_tokens")
    natural = natural_tokens(prompt) if forced is None else max(1, forced)
    natural = max(natural, _integer(fields, "min_tokens") or 0)
    if api != "messages" and _flag(fields, "ignore_eos"):  # Messages has no such field
        return limit, "length", min(natural, limit)
    return (limit, "length", limit) if natural > limit else (natural, "stop", natural)


def _too_long(api: str, length: int, limit: int | None, context: int) -> str:
    if api in ("chat", "messages"):
        return (
            f"This model's maximum context length is {context} tokens. However, your request has {length} input "
            "tokens. Please reduce the length of the input messages."
        )
    return (
        f"This model's maximum context length is {context} tokens. However, you requested {limit or 0} output tokens "
        f"and your prompt contains at least {length} input tokens, for a total of at least {length + (limit or 0)} "
        "tokens. Please reduce the length of the input prompt or the number of requested output tokens."
    )
