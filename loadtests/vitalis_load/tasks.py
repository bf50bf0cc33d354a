"""One sort of request of a scenario, and the JSON document that each API wants of it."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from vitalis_load.arrivals import Constant, Poisson, Trace
from vitalis_load.complaints import check_slo
from vitalis_load.layers import SPREAD
from vitalis_load.lengths import MOST, STRICT, Length
from vitalis_load.prompts import File, Prompt
from vitalis_load.shapes import Shape

# names as metrics.Slo has them
Limits = Annotated[dict[str, float], AfterValidator(check_slo)]
Message = dict[str, Any]
# The fields that are made here; `body` may not name them.
MADE = ("model", "stream", "messages", "prompt", "input", "system")
_LIMIT = {
    "chat": "max_completion_tokens",
    "completions": "max_tokens",
    "responses": "max_output_tokens",
    "messages": "max_tokens",
}
# APIs of vLLM that have a field for the fewest tokens
_HAS_MIN_TOKENS = ("chat", "completions")


class Output(BaseModel):
    """How long answers shall be: `150` or a spread, or {tokens: ..., exact: false}, or {max_tokens: 300}."""

    model_config = STRICT

    tokens: Length | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    exact: bool = True

    @model_validator(mode="before")
    @classmethod
    def _spread_alone(cls, value: Any) -> Any:
        spread = isinstance(value, dict) and value and value.keys() <= SPREAD
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {"tokens": value} if spread or number else value

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.tokens is None) == (self.max_tokens is None):
            raise ValueError("needs either tokens (a length to reach) or max_tokens (the model ends when it likes)")
        return self


class Task(BaseModel):
    """`tenant` is the label of the credential, `klass` (in YAML: class) the class that this credential has."""

    model_config = ConfigDict(**STRICT, serialize_by_alias=True)

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_.-]+$")]
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    api: Literal["chat", "completions", "responses", "messages"] = "chat"
    stream: bool = True
    tenant: str = ""
    klass: Annotated[Literal["", "emergency", "interactive", "standard", "batch"], Field(alias="class")] = ""
    model: str = ""
    prompt: Prompt
    output: Output
    turns: Annotated[int, Field(ge=1, le=1000)] = 1
    follow_up_tokens: Length | None = None
    think_seconds: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    body: dict[str, JsonValue] = {}
    slo: Limits = {}
    arrivals: Annotated[Constant | Poisson | Trace, Field(discriminator="kind")] | None = None
    shape: Shape | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        made = [name for name in self.body if name in MADE]
        if made:
            raise ValueError(f"body must not have {', '.join(made)}: made by the load test itself")
        if isinstance(self.prompt, File) and self.turns > 1:
            raise ValueError("turns must be 1 where prompts come from a file: its lines are whole conversations")
        if self.shape is not None and self.arrivals is None:
            raise ValueError("shape needs arrivals of its own beside it")
        if self.shape is not None and self.shape.seconds is not None:
            raise ValueError("shape must not have seconds of its own: the scenario's shape has them for all")
        return self


def document(task: Task, model: str, system: str, messages: list[Message], tokens: int, exact: bool) -> dict[str, Any]:
    """The request's body.

    Args:
        system: Text of the system message, "" for none.
        messages: User and assistant by turns, each {"role", "content"}.
        tokens: The most that may be generated, and the fewest too where `exact` and the API has a field for it.
    """
    made: dict[str, Any] = {"model": task.model or model, "stream": task.stream}
    with_system = [{"role": "system", "content": system}, *messages] if system else messages
    if task.api == "chat":
        made["messages"] = with_system
    elif task.api == "completions":
        made["prompt"] = "\n\n".join(str(message["content"]) for message in with_system)
    elif task.api == "responses":
        made["input"] = with_system
        made["store"] = False
    else:
        made["messages"] = messages
        if system:
            made["system"] = system
    made[_LIMIT[task.api]] = tokens
    if exact and task.api in _HAS_MIN_TOKENS:
        made["min_tokens"] = tokens
    if task.stream and task.api in ("chat", "completions"):
        made["stream_options"] = {"include_usage": True}
    if task.temperature is not None:
        made["temperature"] = task.temperature
    return made | task.body
