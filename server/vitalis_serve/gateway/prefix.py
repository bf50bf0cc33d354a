"""What decides a request's home: everything of it through the first user message, as the client wrote it. Pure.

Two requests of one conversation share it, and so do all that begin with the same instructions and question; an
engine that has computed it finds it in its prefix cache.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

MAX_PREFIX_BYTES: Final = 16_384

_Fields = Mapping[str, msgspec.Raw]
_LEADING: Final = {"chat": ("tools",), "responses": ("instructions", "tools"), "messages": ("system", "tools")}
_TURNS: Final = {"chat": "messages", "responses": "input", "messages": "messages", "completions": "prompt"}


class _Turn(msgspec.Struct):
    role: str = ""


_turns = msgspec.json.Decoder(list[msgspec.Raw]).decode
_turn = msgspec.json.Decoder(_Turn).decode


def prefix(fields: _Fields, dialect: str) -> bytes:
    """At most MAX_PREFIX_BYTES of it. What the engine would refuse anyway still has one: it goes by its bytes."""
    parts = [bytes(fields[name]) for name in _LEADING.get(dialect, ()) if name in fields]
    turns = fields.get(_TURNS.get(dialect, ""))
    if turns is not None:
        parts.append(_through_first_user(turns))
    return b"".join(parts)[:MAX_PREFIX_BYTES]


def _through_first_user(turns: msgspec.Raw) -> bytes:
    text = bytes(memoryview(turns)[:MAX_PREFIX_BYTES])
    if not text.startswith(b"["):
        return text
    kept: list[bytes] = []
    try:
        for turn in _turns(turns):
            kept.append(bytes(turn))
            if _turn(turn).role == "user":
                break
    except msgspec.DecodeError:
        return text
    return b"".join(kept)
