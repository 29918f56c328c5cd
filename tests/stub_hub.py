"""A stand-in for the Hugging Face hub on loopback: repositories in memory, and the part of its API that runs need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StubHub:
    """What it holds, and what was asked of it."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


def _handler(hub: StubHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

        def do_HEAD(self) -> None:
            self._file()

        def do_GET(self) -> None:
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/?]+|/tree/[^/?]+)?(\?.*)?", self.path)
            if match and (match[2] or "").startswith("/tree"):
                files = hub.repositories[match[1]].items()
                self._json([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files])
            elif not match:
                self._file()
            elif match[1] in hub.repositories:
                names = [{"rfilename": name} for name in hub.repositories[match[1]]]
                self._json({"id": match[1], "sha": COMMIT, "siblings": names, "private": False, "tags": []})
            else:
                self._absent()

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
            elif self.path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif match := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
                files = json.loads(body)["files"]
                self._json(
                    {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
                )
            elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        hub.repositories[match[1]][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "deletedFile":
                        del hub.repositories[match[1]][line["value"]["path"]]
                self._json({"commitUrl": f"{hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self._absent()

        def _file(self) -> None:
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
            data = hub.repositories.get(match[1], {}).get(match[2]) if match else None
            if data is None:
                self._absent()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self._end(data)

        def _json(self, content: Any) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self._end(json.dumps(content).encode())

        def _absent(self) -> None:
            hub.asked.append(f"absent: {self.path}")
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self._end(b"")

        def _end(self, data: bytes) -> None:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Serve until the context ends."""
    hub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
