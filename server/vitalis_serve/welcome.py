"""What a person needs after the first start: a tenant, a key shown once, and two requests that work when
pasted."""

import http.client
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from vitalis_serve.errors import StartError

FIRST_KEY = "first-key"
QUESTION = "What is the capital of France?"


class Welcome:
    """Talks to control once; `screen` is where people read (standard output)."""

    def __init__(self, data_folder: Path, control_address: Path, screen: TextIO | None = None) -> None:
        self._data_folder = data_folder
        self._control_address = control_address
        self._screen = sys.stdout if screen is None else screen
        self._key = ""

    def first_key(self) -> None:
        """Where there is no tenant yet: makes `default` and a key, shown on a terminal, else kept in a 0600
        file.

        Blocking. Raises StartError.
        """
        if self._ask("GET", "/v1/tenants")["tenants"]:
            return
        self._ask("POST", "/v1/tenants", {"name": "default"})
        made = self._ask("POST", "/v1/keys", {"tenant": "default", "name": "first"})
        if self._screen.isatty():
            self._key = made["key"]
            self._say(
                "\nThe first key, of tenant default, kept nowhere else; this line gives it to another shell:\n\n"
                f"    {self._export()}\n"
            )
            return
        path = self._data_folder / FIRST_KEY
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(made["key"] + "\n")
        except OSError as exc:
            raise StartError(f"the first key could not be written to {path}: {exc.strerror}.") from exc
        self._say(f"The first key, of tenant default, is in {path} (readable by this user only).")

    def show_requests(self, host: str, port: int, model: str) -> None:
        """A curl line and a Python snippet for the gateway at `host`:`port`, and before them what gives a new shell the
        key, where it was just made and is in no file."""
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        url = f"http://{reachable}:{port}/v1"
        in_shell, in_python = self._key_as_words()
        messages = [{"role": "user", "content": QUESTION}]
        body = json.dumps({"model": model, "messages": messages, "temperature": 0})
        bearer, kind = f"Authorization: Bearer {in_shell}", "Content-Type: application/json"
        chat = f'model="{model}", messages=[{{"role": "user", "content": "{QUESTION}"}}], temperature=0'
        known = f"{self._export()}\n" if self._key else ""
        self._say(
            f"""
Ready. Try it:

{known}curl -s {url}/chat/completions -H "{bearer}" -H "{kind}" -d {shlex.quote(body)}

or, with `pip install openai`, in Python:

import os
from openai import OpenAI
client = OpenAI(base_url="{url}", api_key={in_python})
print(client.chat.completions.create({chat}).choices[0].message.content)
"""
        )

    def _key_as_words(self) -> tuple[str, str]:
        """The key as a shell and as Python find it."""
        path = self._data_folder / FIRST_KEY
        if path.exists() and not self._key:
            return f"$(cat {shlex.quote(str(path))})", f"open({json.dumps(str(path))}).read().strip()"
        return "$VITALIS_KEY", 'os.environ["VITALIS_KEY"]'

    def _export(self) -> str:
        return f"export VITALIS_KEY={self._key}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            address = urlsplit(self._control_address.read_text().strip())
            token = (self._data_folder / "control.token").read_text().strip()
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
            try:
                headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            finally:
                connection.close()
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise StartError(f"control did not answer when the first key was to be made: {exc}") from exc
        if response.status >= 400 or not isinstance(answer, dict):
            raise StartError(f"control refused to make the first key ({response.status}): {answer}")
        return answer

    def _say(self, text: str) -> None:
        self._screen.write(text + "\n")
        self._screen.flush()
