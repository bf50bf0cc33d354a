"""The allow-list: what the data port answers, and how each API is spoken. Everything else is 404 here.

vLLM leaves several routes open whatever its API key says (`/invocations` runs a full chat), so nothing is
passed on that is not in this table.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Api:
    """One POST route of the engines. `dialect` tells how its errors, events and endings look."""

    name: str
    path: bytes
    dialect: str  # chat, completions, responses, messages, guidance, plain
    streams: bool
    request_line: bytes = b""

    @staticmethod
    def of(path: bytes, dialect: str, *, streams: bool) -> "Api":
        name = dialect if streams else path.rpartition(b"/")[2].decode()
        return Api(name, path, dialect, streams, b"POST %b HTTP/1.1\r\nhost: engine\r\n" % path)


GUIDANCE: Final = b"/emergency-guidance"
CHAT: Final = Api.of(b"/v1/chat/completions", "chat", streams=True)
APIS: Final[dict[bytes, Api]] = {
    api.path: api
    for api in (
        CHAT,
        Api(
            "guidance", GUIDANCE, "guidance", True, CHAT.request_line
        ),  # asked and answered as Vitalis' present callers do
        Api.of(b"/v1/completions", "completions", streams=True),
        Api.of(b"/v1/responses", "responses", streams=True),
        Api.of(b"/v1/messages", "messages", streams=True),
        Api.of(b"/v1/messages/count_tokens", "messages", streams=False),
        Api.of(b"/tokenize", "plain", streams=False),
        Api.of(b"/detokenize", "plain", streams=False),
    )
}

# Answered by the worker itself. The value says whether a key is needed.
OWN: Final[dict[bytes, bool]] = {
    b"/v1/models": True,
    b"/health": True,
    b"/healthz": False,
    b"/readyz": False,
}
MODEL_PREFIX: Final = b"/v1/models/"


def path_of(target: bytes) -> bytes:
    """The path of a request's target without its query, also where the target is an http URL, whose host does not
    count. A target that has no path comes back as it is, without a slash at its beginning."""
    path = target.partition(b"?")[0]
    if path.startswith(b"/"):
        return path
    scheme, _, rest = path.partition(b"://")
    host, slash, inner = rest.partition(b"/")
    if scheme.lower() in (b"http", b"https") and host:
        return b"/" + inner if slash else b"/"
    return path
