"""The fleet as it was ordered, on disk (`fleet.json`): written before an order acts, so that a killed
supervisor resumes it. A finished or resumed order leaves `order` empty."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Desired:
    """`replicas`: how many there are to be. `configured`: how many the configuration file asked for when that
    was decided; a file that has changed since wins. `stopped`: drained replicas, which stay stopped until
    restarted."""

    replicas: int
    configured: int
    stopped: tuple[str, ...] = ()
    order: dict[str, Any] | None = None


class Journal:
    """One writer: the supervisor."""

    def __init__(self, path: Path, configured: int) -> None:
        self._path = path
        self.desired = Desired(configured, configured)
        self.complaint = ""
        try:
            document = json.loads(path.read_text())
            found = Desired(
                int(document["replicas"]),
                int(document["configured"]),
                tuple(str(name) for name in document["stopped"]),
                document["order"],
            )
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as exc:
            self.complaint = f"{path} could not be read ({exc}): set aside, starting from the configuration"
            with contextlib.suppress(OSError):
                os.replace(path, f"{path}.broken")
            return
        self.desired = found if found.configured == configured else replace(self.desired, stopped=found.stopped)

    def write(self, **changes: Any) -> None:
        """Durable before it returns. Raises OSError (a full disk): the order must then not act."""
        desired = replace(self.desired, **changes)
        trial = f"{self._path}.new"
        with open(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(desired), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(trial, self._path)
        self.desired = desired
