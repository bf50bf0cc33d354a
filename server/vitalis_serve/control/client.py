"""Asking a running control over its HTTP API, from this machine. Synchronous and of the standard library only:
the command line uses it, and must start fast."""

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitalis_serve import __version__


class NotRunning(Exception):
    """No control answers. The message is one sentence with the remedy."""


class Refused(Exception):
    """Control answered with an error: its status, its code, and its sentence as the message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        super().__init__(message)


class Client:
    """One control; `seconds` bounds each wait for it."""

    def __init__(self, address: str, token: str, *, seconds: float = 30) -> None:
        self._address = address
        self._token = token
        self._seconds = seconds

    @classmethod
    def of_folder(cls, data_folder: Path, *, seconds: float = 30) -> "Client":
        """The control that runs on this data folder. Raises NotRunning if there is none."""
        try:
            address = (data_folder / "control.address").read_text("ascii").strip()
            token = (data_folder / "control.token").read_text("ascii").strip()
        except FileNotFoundError as error:
            raise NotRunning(_not_running(str(data_folder))) from error
        except OSError as error:
            raise NotRunning(
                f"control's token cannot be read ({error.strerror}: {error.filename}): run this as the user that "
                "runs vitalis-serve"
            ) from error
        return cls(address, token, seconds=seconds)

    def call(self, method: str, path: str, body: dict[str, Any] | bytes | None = None) -> Any:
        """The decoded answer; bytes are sent as the YAML that they are. Raises NotRunning or Refused."""
        parts = urlsplit(self._address)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=self._seconds)
        headers = {
            "authorization": f"Bearer {self._token}",
            "content-type": "application/yaml" if isinstance(body, bytes) else "application/json",
            "user-agent": f"vitalis-serve/{__version__}",
        }
        # As official clients write JSON: where a request would go depends on its bytes (`/v1/explain`).
        content = body if body is None or isinstance(body, bytes) else _encoded(body)
        try:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            told = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise NotRunning(_not_running(self._address)) from error
        finally:
            connection.close()
        return _decoded(answer.status, told)


def _encoded(body: object) -> bytes:
    """Written as the official clients do, since the home of a request goes by its bytes; half of a surrogate pair can
    only be written escaped."""
    try:
        return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode()


def _decoded(status: int, content: bytes) -> Any:
    try:
        document = json.loads(content)
        if status < 400:
            return document
        facts = document["error"]
        raise Refused(status, facts["code"], facts["message"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(status, "internal", f"control answered {status} without a reason") from error


def _not_running(where: str) -> str:
    return f"control is not running ({where}): start it with `vitalis-serve up`, or name the right --config"
