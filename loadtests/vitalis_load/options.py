"""Who is asked, with which key: the options that `vitalis-load` commands and Locust have in common."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitalis_load import discovery
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.plain_http import check_url
from vitalis_load.scenario import Scenario
from vitalis_load.target import Target

DATA_FOLDER = "var"


def target(
    scenario: Scenario | None,
    *,
    url: str = "",
    model: str = "",
    key_file: str = "",
    key_env: str = "",
    keys: Sequence[str] = (),
    data_folder: str = "",
    metrics_url: str = "",
    metrics_token_env: str = "",
    engines: Sequence[str] = (),
    direct: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Target:
    """The server at `url`; without one, that which runs on the data folder (var/ where none is named).

    Args:
        key_file, key_env: Where the run's own key is; without both, VITALIS_KEY or the data folder's first key.
        scenario: Whose labels of credentials are looked for in their variables.
        keys: "LABEL=VARIABLE", a key for one label of the scenario each.
        engines: "NAME=ADDRESS", where an engine's metrics are.
        direct: An engine is asked, no gateway.

    Raises:
        LoadFailure: With what is missing.
    """
    key = _key(key_file, key_env, environ) or environ.get("VITALIS_KEY", "").strip()
    if url:
        found = Target(url=check_url(url), model=model, keys={"": key} if key else {}, gateway=not direct)
    else:
        found = discovery.find(Path(data_folder or DATA_FOLDER), key=key, model=model)
    by_label = found.keys | _by_label(scenario, keys, environ)
    named = dict(_pair(text, "--engine", "NAME=ADDRESS") for text in engines)
    return Target(
        url=found.url,
        model=model,
        keys=by_label,
        metrics_url=check_url(metrics_url) if metrics_url else found.metrics_url,
        metrics_token=_variable(metrics_token_env, environ) if metrics_token_env else found.metrics_token,
        engines=found.engines | {name: check_url(address) for name, address in named.items()},
        engine_pids=found.engine_pids,
        gateway=found.gateway,
    )


def overrides(texts: Sequence[str]) -> dict[str, str]:
    """Of "a.b=c" as `--set` takes it."""
    return pairs(texts, "--set", "tasks.chat.output=16")


def pairs(texts: Sequence[str], option: str, example: str) -> dict[str, str]:
    """Of NAME=VALUE, as an option may be given several times. Raises LoadFailure."""
    return dict(_pair(text, option, example) for text in texts)


def without_own_key(scenario: Scenario, target: Target) -> list[str]:
    """Labels whose tasks use the run's own key for want of theirs: what tells tenants apart does not happen then."""
    return [label for label in scenario.labels if label and not target.keys.get(label)]


def _key(file: str, variable: str, environ: Mapping[str, str]) -> str:
    if file and variable:
        raise LoadFailure("give --key-file or --key-env, not both")
    if variable:
        return _variable(variable, environ)
    if not file:
        return ""
    try:
        key = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LoadFailure(f"the key file {file} cannot be read ({why})") from None
    if not key or "\n" in key:
        raise LoadFailure(f"the key file {file} needs one key and nothing else")
    return key


def _variable(name: str, environ: Mapping[str, str]) -> str:
    if not (value := environ.get(name, "").strip()):
        raise LoadFailure(f"the variable {name} is not set: export {name}=... first")
    return value


def _by_label(scenario: Scenario | None, keys: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    labels = scenario.labels if scenario is not None else []
    for label in labels:
        if scenario is not None and label and (value := environ.get(scenario.credential(label).env, "").strip()):
            found[label] = value
    for text in keys:
        label, variable = _pair(text, "--keys", "TENANT=VARIABLE")
        if scenario is not None and label not in labels:
            have = ", ".join(label for label in labels if label) or "none"
            raise LoadFailure(f"--keys {text}: the scenario has no tenant {label!r}; it has {have}", Exit.BAD_INPUT)
        found[label] = _variable(variable, environ)
    return found


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise LoadFailure(f"{option} {text}: give it as {example}")
    return name.strip(), value.strip()
