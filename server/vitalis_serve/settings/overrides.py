"""Which values of the configuration file a profile replaces: the file is the user's own, and nobody likes to change a
number without effect."""

from collections.abc import Iterator, Mapping
from json import dumps
from typing import Any

from vitalis_serve.settings.loading import Resolved
from vitalis_serve.settings.redaction import redact
from vitalis_serve.settings.schema import Settings
from vitalis_serve.settings.sources import KeyPath
from vitalis_serve.settings.variables import VARIABLES


def overridden(resolved: Resolved) -> list[str]:
    """One sentence for each. Left out are the program's own defaults, which the shipped file states in full, and what
    a variable decides anyway."""
    base, overlay, _ = resolved.layers
    return [
        f"{'.'.join(path)}: {_shown(path, lower)} at {base.place(path)} is overridden by profile"
        f" {resolved.settings.profile}: {_shown(path, upper)} at {overlay.place(path)}; {_remedy(path)}"
        for path, lower, upper in _replaced(base.values, overlay.values, Settings().model_dump())
        if resolved.place(path) == overlay.place(path)
    ]


def _replaced(
    below: Mapping[str, Any], above: Mapping[str, Any], defaults: Mapping[str, Any], path: KeyPath = ()
) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Paths at which both give a value, and not the same one, where the lower is not the default."""
    for key in (key for key in below if key in above):
        lower, upper, default = below[key], above[key], defaults.get(key)
        if isinstance(lower, Mapping) and isinstance(upper, Mapping):
            yield from _replaced(lower, upper, default if isinstance(default, Mapping) else {}, (*path, key))
        elif lower not in (upper, default) and not isinstance(lower, Mapping):
            yield (*path, key), lower, upper


def _shown(path: KeyPath, value: Any) -> str:
    shown = redact({path[-1]: value})[path[-1]]
    return shown if isinstance(shown, str) else dumps(shown)


def _remedy(path: KeyPath) -> str:
    variable = next((f"set {name} or " for name, known in VARIABLES.items() if path[: len(known)] == known), "")
    return f"to have yours, {variable}write a profile of your own"
