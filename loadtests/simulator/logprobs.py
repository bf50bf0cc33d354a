"""Logprobs as vLLM 0.32 writes them, of tokens that nobody sampled. Pure.

Every token has its entry, Harmony's hidden ones too: a stream that asks for logprobs has an event for each of them.
"""

from typing import Any

from simulator import calls
from simulator.answers import Layout

CHOSEN = -0.5
NEXT = -2.0  # of the alternatives, less 1 for each further one
_LEAD = ("<|channel|>", "analysis", "<|message|>")
_MIDDLE = ("<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>")


def _word(stem: str, index: int) -> str:
    return f"{stem}0" if index == 0 else f" {stem}{index}"


def token_text(layout: Layout, index: int, call: str, whole: bool) -> str:
    """The text of an answer's token with this number, from 0."""
    if index < layout.lead:
        return _LEAD[index]
    index -= layout.lead
    if index < layout.reasoning:
        return _word("think", index)
    index -= layout.reasoning
    if index < layout.middle:
        return _MIDDLE[index]
    index -= layout.middle
    if index < layout.content:
        return calls.piece(index, layout.content, whole) if call else _word("tok", index)
    return "<|call|>" if call else "<|return|>"


def _ranked(token: str, top: int) -> list[tuple[str, float]]:
    return [(token, CHOSEN), *((f"alt{number}", NEXT - number) for number in range(top - 1))][: max(top, 0)]


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def chat(tokens: list[str], top: int) -> dict[str, Any]:
    """Chat's object for these tokens."""
    return {
        "content": [
            {**_entry(token, CHOSEN), "top_logprobs": [_entry(*ranked) for ranked in _ranked(token, top)]}
            for token in tokens
        ]
    }


def completion(tokens: list[str], top: int, offset: int = 0) -> dict[str, Any]:
    """A text completion's object for these tokens, the first of which begins at `offset` characters."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [CHOSEN] * len(tokens),
        "tokens": tokens,
        "top_logprobs": [dict(_ranked(token, top + 1)) for token in tokens],  # the chosen one comes on top
    }
