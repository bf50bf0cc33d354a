"""What a body is refused for, in words of ours: what the validating library found, without its vocabulary."""

from typing import Any


def reason(error: dict[str, Any] | Any) -> str:
    """The sentence for one of pydantic's errors, without the field it is about."""
    if error["type"] == "missing":
        return "this field is missing"
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    return str(error["msg"]).removeprefix("Value error, ")
