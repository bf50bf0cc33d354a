"""A called tool as vLLM 0.32 writes it: pieces of its arguments, plain and streamed. Pure.

The arguments are a JSON object whose one text counts its tokens, `{"text":"tok0 tok1"}`, so a reader can tell whether
they arrived whole. An answer that calls a tool has its content's tokens as arguments.
"""

import json
from typing import Any

from simulator.answers import content_text

LEAKED = "<|start|>assistant"  # what a malformed header leaves in a tool's name: seen with vLLM 0.32's own parser
CALL_TOKEN = 200012  # <|call|>, which ends a call and is told as stop_reason


def piece(index: int, count: int, whole: bool) -> str:
    """The arguments' token with this number, from 0. `whole`: no length limit cut them."""
    if whole and count == 1:
        return "{}"
    if index == 0:
        return '{"text":"'
    if whole and index + 1 == count:
        return '"}'
    return "tok0" if index == 1 else f" tok{index - 1}"


def arguments(count: int, whole: bool) -> str:
    """All of them, as they are streamed."""
    if whole and count == 1:
        return "{}"
    if not count:
        return ""
    return '{"text":"' + content_text(count - 1 - whole) + ('"}' if whole else "")


def rewritten(text: str) -> str:
    """As a plain chat answer has them: parsed and written back where they are whole."""
    try:
        return json.dumps(json.loads(text))
    except ValueError:
        return text


def chat_call(identity: str, name: str, text: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": text}}


def first_delta(identity: str, name: str) -> dict[str, Any]:
    """The delta that announces a call."""
    function = {"name": name, "arguments": ""}
    return {"tool_calls": [{"id": identity, "type": "function", "index": 0, "function": function}]}


def next_delta(text: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}


def message_block(identity: str, name: str, text: str) -> dict[str, Any]:
    """Messages' tool_use, with its arguments parsed; empty while it is streamed or where they were cut."""
    try:
        given = json.loads(text)
    except ValueError:
        given = {}
    return {"type": "tool_use", "id": identity, "name": name, "input": given}


def response_item(identity: str, name: str, text: str, status: str) -> dict[str, Any]:
    """Responses' function_call."""
    return {
        "arguments": text,
        "call_id": f"call_{identity}",
        "name": name,
        "type": "function_call",
        "id": f"fc_{identity}",
        "status": status,
    }
