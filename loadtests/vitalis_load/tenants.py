"""Tenants and keys for a scenario that needs several, made through the control of a server that is ours and taken back
when the run is over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from vitalis_load import plain_http
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.scenario import Scenario
from vitalis_load.target import Target

PREFIX = "load-"  # of their names
LONGEST_SECONDS = 86_400  # a key that could not be taken back opens nothing after that
DEFAULT_CLASS = "standard"


@contextmanager
def with_keys(target: Target, scenario: Scenario, say: Callable[[str], None]) -> Iterator[Target]:
    """The target with a key of its own for each of the scenario's labels that has none. Raises LoadFailure."""
    lacking = [label for label in scenario.labels if label and not target.keys.get(label)]
    if lacking and not (target.metrics_url and target.metrics_token):
        raise LoadFailure("--make-keys needs control: use it with --data-folder, or give the tenants' keys with --keys")
    made: dict[str, str] = {}
    keys = dict(target.keys)
    try:
        for label in lacking:
            identity, keys[label] = _make(target, label, scenario.credential(label).klass or DEFAULT_CLASS)
            made[label] = identity
        if made:
            say(f"made tenants {', '.join(PREFIX + label for label in made)} with a key each, taken back at the end")
        yield msgspec.structs.replace(target, keys=keys)
    finally:
        for label, identity in made.items():
            _take_back(target, label, identity, say)


def _make(target: Target, label: str, klass: str) -> tuple[str, str]:
    """A tenant, if it is not there, and a key: its id and itself."""
    name = PREFIX + "".join(c if c.isalnum() else "-" for c in label.lower())
    tenants = _ask(target, "/v1/tenants", None)
    known = {tenant["name"]: tenant["status"] for tenant in tenants["tenants"]}
    if known.get(name, "active") != "active":
        raise LoadFailure(f"the tenant {name} was revoked: give a key for {label} with --keys {label}=VARIABLE")
    if name not in known:
        _ask(target, "/v1/tenants", {"name": name, "notes": "of load tests"})
    key = {"tenant": name, "name": "load test", "class": klass, "expires_in_seconds": LONGEST_SECONDS}
    answer = _ask(target, "/v1/keys", key)
    return str(answer["id"]), str(answer["key"])


def _take_back(target: Target, label: str, identity: str, say: Callable[[str], None]) -> None:
    try:
        answer = plain_http.ask(
            target.metrics_url, f"/v1/keys/{identity}", token=target.metrics_token, method="DELETE", seconds=30
        )
        why = "" if answer.status < 400 else answer.words
    except OSError as error:
        why = plain_http.reason(error)
    if why:
        say(f"the key {identity} of {PREFIX}{label} could not be taken back ({why}); it expires within a day")


def _ask(target: Target, path: str, document: Any) -> Any:
    try:
        answer = plain_http.ask(
            target.metrics_url, path, document=document, token=target.metrics_token, seconds=30
        )  # fmt: skip
        if answer.status < 300:
            return msgspec.json.decode(answer.body)
        why = f"{answer.status}: {answer.words}"
    except OSError as error:
        why = plain_http.reason(error)
    except msgspec.DecodeError:
        why = "it answers no JSON"
    raise LoadFailure(f"control at {target.metrics_url} made no key ({why}): give keys with --keys", Exit.NO_TARGET)
