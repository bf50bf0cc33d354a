"""What the simulated model says: lengths drawn from the prompt, words that count themselves.

Pure and deterministic: the same body always gets the same answer, in every process, so a test can work out what it
must have received. A chat answer of 20 tokens and more has Harmony's hidden tokens (channel markers that cost tokens
and make no event), because whoever counts events instead of reading usage must be found out.
"""

import math
import zlib
from dataclasses import dataclass

MEDIAN_TOKENS = 150
P95_TOKENS = 500
SIGMA = math.log(P95_TOKENS / MEDIAN_TOKENS) / 1.6449  # of the log-normal that has this median and this p95
MOST_TOKENS = 4096
BYTES_PER_TOKEN = 4

HARMONY_FROM_TOKENS = 20
LEAD_TOKENS = 3  # <|channel|>analysis<|message|>
MIDDLE_TOKENS = 6  # <|end|><|start|>assistant<|channel|>final<|message|>
TAIL_TOKENS = 1  # <|return|>, missing where the length limit cut the answer


@dataclass(frozen=True, slots=True)
class Layout:
    """How many tokens of each sort an answer has, in this order."""

    lead: int
    reasoning: int
    middle: int
    content: int
    tail: int

    @property
    def total(self) -> int:
        """All tokens, as usage counts them."""
        return self.lead + self.reasoning + self.middle + self.content + self.tail


def chat_layout(tokens: int, finish_reason: str) -> Layout:
    """The layout of a chat, Responses or Messages answer of so many completion tokens."""
    if tokens < HARMONY_FROM_TOKENS:
        return Layout(0, tokens // 4, 0, tokens - tokens // 4, 0)
    tail = TAIL_TOKENS if finish_reason == "stop" else 0
    reasoning = min(8, tokens // 4)
    return Layout(LEAD_TOKENS, reasoning, MIDDLE_TOKENS, tokens - reasoning - LEAD_TOKENS - MIDDLE_TOKENS - tail, tail)


def completion_layout(tokens: int) -> Layout:
    """The layout of a text completion: no reasoning, nothing hidden."""
    return Layout(0, 0, 0, tokens, 0)


def content_text(tokens: int) -> str:
    """The whole text of an answer with so many content tokens: "tok0 tok1 tok2"."""
    return " ".join(f"tok{index}" for index in range(tokens))


def reasoning_text(tokens: int) -> str:
    """The whole reasoning of so many tokens: "think0 think1"."""
    return " ".join(f"think{index}" for index in range(tokens))


def prompt_tokens(prompt: bytes) -> int:
    """Tokens of a prompt, given the JSON bytes of its messages."""
    return max(1, len(prompt) // BYTES_PER_TOKEN)


def natural_tokens(prompt: bytes) -> int:
    """The length the model would choose for this prompt: log-normal, median 150, p95 500, at least 1."""
    # two independent 16-bit halves of the checksum make one normal deviate (Box-Muller)
    checksum = zlib.crc32(prompt)
    radius = math.sqrt(-2 * math.log(((checksum & 0xFFFF) + 1) / 65537))
    deviate = radius * math.cos(2 * math.pi * (checksum >> 16) / 65536)
    return max(1, min(MOST_TOKENS, round(MEDIAN_TOKENS * math.exp(SIGMA * deviate))))
