"""Who writes the events of each API's streams.

A writer is made for each request; `opening`, `token` and `closing` return whole SSE events, without HTTP framing.
`group` is for an engine that tells several tokens at once (`--stream-interval`): in one event (Messages: one of each
sort; Responses: one of each token).
The parts of an event that do not change are encoded once a request, because tens of thousands are made a second.
"""

from collections.abc import Callable

from simulator.shapes import Answer
from simulator.write_chat import ChatWriter, CompletionWriter
from simulator.write_messages import MessageWriter
from simulator.write_responses import ResponseWriter

__all__ = ["WRITERS", "MessageWriter", "ResponseWriter", "Writer"]

Writer = ChatWriter | CompletionWriter | MessageWriter | ResponseWriter
WRITERS: dict[str, Callable[[Answer], Writer]] = {
    "chat": ChatWriter,
    "completions": CompletionWriter,
    "messages": MessageWriter,
    "responses": ResponseWriter,
}
