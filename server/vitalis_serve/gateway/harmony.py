"""What goes wrong with Harmony, gpt-oss' own format of answers: recognised, named, and refused where it is known. Pure.

The engine reads the model's tokens with openai_harmony's parser. What the parser does not expect becomes an error
(vLLM up to 0.31: an HTTP 500, or an error event inside a 200), or special tokens end up where no client looks for
them. The model samples, so the next try mostly goes well: such a failure is worth one more try before the first
token, on any replica, and never says that a replica is ill.

    kind             counted as harmony_<kind>; what it is
    unexpected_token a message ended and no new one began (ignore_eos, a forgotten <|start|>)
    header           a message's header that cannot be read
    role             a message by somebody who does not exist
    text             content that is not UTF-8
    vocabulary       o200k_base.tiktoken cannot be loaded: every request fails until it can
    other            HarmonyError with words not known here
    tool_name        a special token inside a called tool's name: an error, for no client has such a tool
    content          a special token where an answer's text begins: counted, never touched
"""

import re
from typing import Any, Final

import msgspec

from vitalis_serve.gateway.events import UNREADABLE

# The words are in openai_harmony.abi3.so of oss-harmony 0.0.11; the first five were seen by feeding its
# StreamableParser. vLLM 0.32 swallows them while it parses (vllm/parser/harmony.py lines 141, 340, 385) and then
# leaks (below); older ones answer them as `error.message`, as 0.32 still does with what Harmony raises elsewhere
# (vllm/entrypoints/serve/exception_handling/error_response.py line 86: 500, str(exc); in a stream
# vllm/entrypoints/openai/chat_completion/serving.py line 931: an event, [DONE] after it). Known from vLLM's issues
# 22515, 22519, 46464, 50690 (unexpected_token), 23567, 51977, 57099 (header), openai/harmony's pull request 114 (role).
_MESSAGES: Final[tuple[tuple[str, str], ...]] = (
    ("Unexpected token ", "unexpected_token"),
    ("unexpected tokens remaining in message header", "header"),
    ("channel marker present but no channel value found in header", "header"),
    ("Unexpected EOS while waiting for message header to complete", "header"),
    ("Unknown role: ", "role"),
    ("message header did not contain a role", "header"),
    ("could not decode header", "header"),
    ("Invalid utf-8 sequence: ", "text"),
    ("error downloading or loading vocab file", "vocabulary"),
)
# As a traceback's last line or Python's repr, where something between the parser and us prints it so.
_PREFIX: Final = re.compile(r"""(?:openai_harmony\.)?HarmonyError(?:: |\(['"])""")
_FAILED: Final = frozenset({200, 500, 502, 503})  # 200: an error event; 502 and 503: from whatever stands between

_MARKS: Final = rb"<\|(?:start|end|message|channel|constrain|return|call)\|>"
# A quotation mark inside JSON's text is escaped, so nothing that an answer says can look like a key.
_NAME: Final = re.compile(rb'"name": ?"(?:[^"\\]|\\.)*?' + _MARKS)
_TEXT: Final = re.compile(rb'"(?:content|reasoning|reasoning_content|text|thinking|delta)": ?"' + _MARKS)
_MARK: Final = re.compile(_MARKS)

# Streams in which vLLM does not say what the parser raised, and what they look like instead: Responses breaks its
# chunked body without an event, Messages says a validation dump in which two letters of the message are left.
UNSAID: Final = frozenset({("responses", "cut"), ("messages", "in_stream_error")})

_OFF: Final = frozenset({b"false", b"null", b"0", b"0.0", b"off", b"f", b"n", b"no"})  # as pydantic reads a boolean
_decode = msgspec.json.Decoder().decode


def failure(status: int, body: bytes) -> str:
    """The kind of Harmony's failure that a plain answer, or an error event's data (status 200), tells of; "" for any
    other.

    Two cannot be seen (UNSAID): they are retried as what they look like, but say nothing of the replica.
    """
    if status not in _FAILED:
        return ""
    return _kind(_message(body))


def sentence(kind: str) -> str:
    """What the client is told: never the parser's own words, which may hold the model's."""
    if kind == "vocabulary":
        return "The engine cannot load Harmony's vocabulary, so it cannot serve this model."
    if kind == "tool_name":
        return "The model called a tool by a name that cannot be read."
    return "The model's answer was not in its own format (Harmony) and could not be read."


def _message(body: bytes) -> str:
    """The sentence of an error in any of the APIs' envelopes; the text itself where it is no JSON."""
    try:
        document = _decode(body)
    except UNREADABLE:
        return body[:4096].decode("utf-8", "replace").strip()
    if not isinstance(document, dict):
        return ""
    response = document.get("response")  # response.failed
    error: Any = (response if isinstance(response, dict) else document).get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def _kind(message: str) -> str:
    named = _PREFIX.match(message)
    words = message[named.end() :] if named else message
    for start, kind in _MESSAGES:
        if words.startswith(start):
            # Python's own tokenizer errors begin like this one too
            return kind if kind != "unexpected_token" or " while expecting start token " in words else ""
    return "other" if named else ""


def leak(payload: bytes) -> str:
    """ "tool_name" or "content" where Harmony's special tokens got into a whole answer or whole events; else "".

    For chat, Responses and Messages; a text completion is raw and may hold them. One search for most payloads, and of
    one byte, which costs half of that for two, or a fortieth in a long one.

    A called tool's name is an error: no client has a tool of that name, an agent that keeps it in its history makes
    the model repeat it, and nobody quotes in a name. vLLM 0.32 cuts it at <|constrain|>, its parser at <|channel|>,
    and at no other: `get<|start|>assistant` was seen. A name with a recipient glued on without a special token
    (`getjson`, `functions.get`) is a name like any other, which only the client can tell.

    In content it is counted only. A text that quotes a token further on is the same bytes as one that leaked it, so
    only a text that begins with one counts: so begin the raw tokens that vLLM 0.32 sends where a header was left
    unfinished (vllm/parser/harmony.py line 148), and a special token in a stream, which is one delta of its own, while
    a quoted one is spelled by several. Taking it out would be guessing what the model meant.
    Logprobs name every token, and Responses repeats its request: neither is looked at.
    """
    if payload.rfind(b"|") < 0 or _MARK.search(payload) is None:
        return ""
    if _NAME.search(payload) is not None and not _is_argument(payload):
        return "tool_name"
    return "content" if _TEXT.search(payload) is not None else ""


def _is_argument(payload: bytes) -> bool:
    """Whether what looked like a tool's name is an argument called `name`: a plain answer of Messages has arguments as
    objects, all others as text."""
    if not payload.startswith(b"{") or b'"tool_use"' not in payload:
        return False
    try:
        names = _tool_names([_decode(payload)])
    except UNREADABLE:
        return False
    return not any(_MARK.search(name.encode("utf-8", "replace")) for name in names)


def may_break(raw: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether a request has anything that `breaks` looks for; most have not."""
    return "ignore_eos" in fields or raw.rfind(b"|") >= 0


def breaks(fields: dict[str, msgspec.Raw], dialect: str) -> str:
    """Why this request is known to fail on a Harmony model: a sentence naming the field first; "" where it may go on.

    A text completion knows no Harmony. What the engine itself refuses with 400 (other reasoning efforts than low,
    medium and high; logprobs on Responses) is left to it. Messages has no ignore_eos: vLLM drops it.
    """
    if dialect == "completions":
        return ""
    if dialect != "messages" and "ignore_eos" in fields and not _is_off(bytes(fields["ignore_eos"])):
        # vllm/entrypoints/openai/chat_completion/protocol.py line 767. Up to 0.31 an error at the first token after
        # <|return|>; in 0.32 these tokens are generated, charged, and swallowed.
        return (
            "`ignore_eos` cannot be used with this model here: what follows the end of its answer is not Harmony and "
            "is lost; use /v1/completions for answers of a fixed length, or `min_tokens`."
        )
    # Texts are encoded as ordinary tokens, whatever they quote; names are not: one that holds a special token ends the
    # header it stands in (vllm/entrypoints/openai/parser/harmony_utils.py lines 389 and 405; seen).
    for field in ("tools", "messages", "input"):
        if field in fields and _names_mark(bytes(fields[field])):
            return (
                f"`{field}` has one of Harmony's special tokens (such as <|channel|>) in a tool's name; give the tool "
                "its plain name."
            )
    return ""


def _is_off(raw: bytes) -> bool:
    return raw.strip(b'"').lower() in _OFF


def _names_mark(raw: bytes) -> bool:
    """Whether a tool's name holds a special token: one that is defined, or one that was called earlier."""
    if raw.rfind(b"|") < 0 or _MARK.search(raw) is None:
        return False
    try:
        entries = _decode(raw)
    except UNREADABLE:
        return False  # the engine says what is wrong
    return any(_MARK.search(name.encode("utf-8", "replace")) for name in _tool_names(entries))


def _tool_names(entries: Any) -> list[str]:
    """Names of tools in `tools`, `messages` or `input`, wherever the three APIs put them."""
    found: list[Any] = []
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        parts = [] if "role" in entry else [entry]  # beside a role it is a participant's name, which is not used
        for below in (entry.get("tool_calls"), entry.get("content")):
            parts += [part for part in below if isinstance(part, dict)] if isinstance(below, list) else []
        for part in parts:
            function = part.get("function")
            found += [part.get("name"), function.get("name") if isinstance(function, dict) else None]
    return [name for name in found if isinstance(name, str)]
