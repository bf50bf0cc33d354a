"""Keeping secrets out of what is printed, and placeholders out of what is run."""

import re
from collections.abc import Mapping
from typing import Any, Final

REDACTED: Final = "[redacted]"
# A name says that its value is secret. `max-num-batched-tokens` and `tokenizer` are not secrets.
_SECRET: Final = re.compile(
    r"(^|[_.-])(token|secret|passwd|password|passphrase|credentials?|apikey|auth|key)$"
    r"|api[_-]?key|access[_-]?key|private[_-]?key|secret|password|bearer",
    re.IGNORECASE,
)
# To the last @, since a password in a URL may have been written without encoding it.
_IN_URL: Final = re.compile(r"(?<=://)([^:@/\s]*):\S*@|(?<=[?&])((?:ssl)?password)=[^&\s]*", re.IGNORECASE)
_PLACEHOLDER: Final = re.compile(
    r"^(<.*>|\$\{.*\}|x{3,}|\.{3,}|\*+|(hf_)?x{3,}|hf_\.{3}|"
    r"(change|replace|fill|set)[-_ ]?(me|this|it|in)?|todo|fixme|placeholder|example|dummy|none|null|"
    r"(my|your)[-_ ].*|(insert|enter|put)[-_ ].*|secret|password|token|changeit)$",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a variable, key or flag of this name holds a secret."""
    return _SECRET.search(name) is not None


def is_placeholder(value: str) -> bool:
    """Whether a secret's value is one that documentation or an example file put there."""
    return _PLACEHOLDER.match(value.strip()) is not None


def redact(value: Any) -> Any:
    """The same value with what stands under a secret's name, and passwords in URLs, replaced; maps and lists are
    walked."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret(str(key)) and item not in (None, "") else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _IN_URL.sub(_hidden, value) if isinstance(value, str) else value


def _hidden(found: re.Match[str]) -> str:
    return f"{found[1]}:{REDACTED}@" if found[2] is None else f"{found[2]}={REDACTED}"


def redact_argv(argv: tuple[str, ...] | list[str]) -> list[str]:
    """The same command line with the words after a secret flag replaced (`--api-key a b`, `--api-key=a`)."""
    shown: list[str] = []
    hiding = False
    for word in argv:
        if word.startswith("--"):
            flag, equals, _ = word.partition("=")
            hiding = is_secret(flag)
            shown.append(f"{flag}={REDACTED}" if hiding and equals else word)
        else:
            shown.append(REDACTED if hiding else word)
    return shown
