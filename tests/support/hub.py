"""A stand-in for the Hugging Face hub: the part of its API that fetching a model uses, on loopback.

    python tests/support/hub.py STATE_FOLDER        prints "listening on http://127.0.0.1:PORT"

STATE_FOLDER/repo/ holds the repository's files. Every request is appended to STATE_FOLDER/requests.jsonl. A file
STATE_FOLDER/faults.json says what to do wrong: {"cut": {"path": bytes}} ends that file's transfer after so many
bytes, once; {"token": "..."} refuses requests without it; {"corrupt": "path"} flips a byte; {"dribble": "path"}
sends so slowly that it can be interrupted; {"no_ranges": true} ignores Range.
"""

import hashlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "acme/small"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        entry = {
            "method": self.command,
            "path": path,
            "range": headers.get("range"),
            "auth": headers.get("authorization"),
        }
        with (self.state / "requests.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        if (token := self.fault("token")) and headers.get("authorization") != f"Bearer {token}":
            return self.json(401, {"error": "Invalid username or password."}, code="RepoNotFound")
        if path == f"/api/models/{NAME}" or path.startswith(f"/api/models/{NAME}/revision/"):
            if path.endswith("/nowhere"):
                return self.json(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
            return self.json(
                200, {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": [], "tags": [], "private": False}
            )
        if path.startswith(f"/api/models/{NAME}/tree/"):
            return self.json(200, [self.described(file) for file in self.files()])
        if path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            return self.send(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"), headers.get("range"), body=body)
        return self.json(404, {"error": "Repository not found"}, code="RepoNotFound")

    def fault(self, name: str) -> object:
        try:
            return json.loads((self.state / "faults.json").read_text()).get(name)
        except FileNotFoundError:
            return None

    def files(self) -> list[Path]:
        return sorted(path for path in (self.state / "repo").rglob("*") if path.is_file())

    def described(self, file: Path) -> dict[str, object]:
        content, path = file.read_bytes(), str(file.relative_to(self.state / "repo"))
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "oid": blob, "size": len(content), "path": path}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def json(self, status: int, document: object, *, code: str = "") -> None:
        raw = json.dumps(document).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def send(self, path: str, wanted: str | None, *, body: bool) -> None:
        content = (self.state / "repo" / path).read_bytes()
        start = 0
        if wanted and not self.fault("no_ranges"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        if self.fault("corrupt") == path:
            content = content[:-1] + bytes([content[-1] ^ 1])
        cuts, marker = self.fault("cut") or {}, self.state / f"cut-{path.replace('/', '_')}"
        if isinstance(cuts, dict) and path in cuts and not marker.exists():
            marker.touch()
            self.wfile.write(content[start : start + cuts[path]])
            self.wfile.flush()
            self.close_connection = True
            return
        if self.fault("dribble") == path:
            for i in range(start, len(content), 1 << 20):
                self.wfile.write(content[i : i + (1 << 20)])
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(content[start:])


def main() -> None:
    Hub.state = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
